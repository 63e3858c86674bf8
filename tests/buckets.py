"""A folder of this machine as gs://bucket: for epath, and over HTTP for TensorStore."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from etils.epath import backend as backends
from etils.epath import gpath

_LOCK = threading.Lock()


def stand_in(monkeypatch, folder, opened=None):
    """epath finds the folder where gs://bucket is; `opened` gets the paths of what it opens."""

    class Bucket(backends._OsPathBackend):
        def __getattribute__(self, name):
            method = object.__getattribute__(self, name)
            if name.startswith("_") or not callable(method):
                return method

            def call(*args, **options):
                places = [str(arg).replace("gs://bucket", str(folder)) for arg in args]
                if name == "open":
                    assert "a" not in args[1], "nothing can be appended to an object"
                    if opened is not None:
                        opened.append(str(args[0]))
                    if "w" in args[1]:  # an object needs no folder
                        Path(places[0]).parent.mkdir(parents=True, exist_ok=True)
                out = method(*places, **options)
                if name == "glob":
                    return [path.replace(str(folder), "gs://bucket") for path in out]
                return out

            return call

    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket())


class _Handler(BaseHTTPRequestHandler):
    """The part of Google Cloud Storage's JSON interface that TensorStore uses."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Logs nothing."""

    def _reply(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _request(self):
        """The query, the object's path, and the status of a precondition that does not hold."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = unquote(url.path.partition("/o/")[2]) or query.get("name")
        if name is None:
            return query, None, 0
        path = self.folder / name
        now = path.stat().st_mtime_ns if path.is_file() else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            return query, path, 412
        return query, path, 304 if query.get("ifGenerationNotMatch") == str(now) else 0

    def _object(self, path):
        fixed = dict.fromkeys(("updated", "timeCreated"), "2026-01-01T00:00:00.000Z")
        size, generation = str(path.stat().st_size), str(path.stat().st_mtime_ns)
        fixed |= {"name": str(path.relative_to(self.folder)), "metageneration": "1"}
        return fixed | {"size": size, "generation": generation}

    def do_GET(self):
        with _LOCK:
            query, path, refused = self._request()
            if path is None:
                return self._list(query)
            if refused or not path.is_file():
                return self._reply(refused or 404)
            if query.get("alt") != "media":
                return self._reply(200, self._object(path))
            content = path.read_bytes()
            extra = {"x_goog_generation": path.stat().st_mtime_ns, "Cache_Control": "no-store"}
        if "Range" not in self.headers:
            return self._reply(200, content, **extra)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        begin = int(first) if first else len(content) - int(last)
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        extra["Content_Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self._reply(206, content[begin : end + 1], **extra)

    def _list(self, query):
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        prefix, start, end = (query.get(x, "") for x in ("prefix", "startOffset", "endOffset"))
        items = [
            item
            for item in map(self._object, files)
            if item["name"].startswith(prefix)
            and item["name"] >= start
            and not (end and item["name"] >= end)
        ]
        return self._reply(200, {"items": items})

    def do_POST(self):
        with _LOCK:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            _, path, refused = self._request()
            if refused:
                return self._reply(refused)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            return self._reply(200, self._object(path))

    def do_DELETE(self):
        with _LOCK:
            _, path, refused = self._request()
            if refused or not path.is_file():
                return self._reply(refused or 404)
            path.unlink()
            return self._reply(204)


def serve(folder):
    """A running server of one bucket whose objects are the folder's files; its address."""
    handler = type("Handler", (_Handler,), {"folder": Path(folder)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
