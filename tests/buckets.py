"""A folder of this machine in the place of gs://bucket, for epath."""

from etils.epath import backend as backends
from etils.epath import gpath


def stand_in(monkeypatch, folder, opened=None):
    """epath finds the folder where gs://bucket is; `opened` gets the paths of what it opens."""

    class Bucket(backends._OsPathBackend):
        def __getattribute__(self, name):
            found = object.__getattribute__(self, name)
            if name.startswith("_") or not callable(found):
                return found

            def call(*args, **options):
                if name == "open":
                    assert "a" not in args[1], "nothing can be appended to an object"
                    if opened is not None:
                        opened.append(str(args[0]))
                    if "w" in args[1]:  # an object needs no folder
                        found_at = str(args[0]).replace("gs://bucket", str(folder))
                        backends._OsPathBackend().makedirs(
                            found_at.rsplit("/", 1)[0], exist_ok=True
                        )
                places = [str(arg).replace("gs://bucket", str(folder)) for arg in args]
                out = found(*places, **options)
                if name == "glob":
                    return [path.replace(str(folder), "gs://bucket") for path in out]
                return out

            return call

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket())
