"""A Hugging Face hub in a thread, enough of it to load and to push; and a model on it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from port_files import assert_same_tree, random_tree, small_config

from zephyr_jax.weights.huggingface import export_hf, load_hf

NAME = "org/little"
TOKEN = "hf_of_the_test"


@dataclasses.dataclass
class Repo:
    """A repository: commits by their hash, branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = [(path, git_id(files[path])) for path in sorted(files)]
        sha = hashlib.sha1(json.dumps([content, len(self.commits)]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclasses.dataclass
class Fault:
    """What happens to the next requests whose "METHOD /path" a pattern matches."""

    pattern: str
    times: int = 1
    status: int | None = None  # of a response without content
    cut: int | None = None  # the connection ends before this byte of the file


class HubServer:
    """The hub; `with HubServer() as hub:` serves at `hub.url` until the block ends."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}  # data sets are kept under datasets/ORG/NAME
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def requests(self, pattern: str) -> list[str]:
        """The requests so far, as "METHOD /path", that match a pattern."""
        return [line for line in self.log if re.search(pattern, line)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.fault = Fault("")
        line = f"{self.command} {unquote(urlsplit(self.path).path)}"
        with self.hub.lock:
            self.hub.log.append(line)
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault.status:
            self.send(json.dumps({"error": "a fault of the test"}), self.fault.status)
            return
        for pattern, action in _ROUTES:
            if match := re.fullmatch(pattern, line):
                action(self, *match.groups())
                return
        self.send(json.dumps({"error": f"no route {line}"}), 404)

    do_HEAD = do_POST = do_GET

    def send(self, content: str | bytes, status: int = 200, **headers: str) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: self.fault.cut])
            self.close_connection = self.fault.cut is not None

    def find(self, name: str, revision: str | None) -> tuple[Repo, str] | None:
        """A repository and a commit of it; None where the error has been sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorized):
            self.send("{}", 404, X_Error_Code="RepoNotFound")
            return None
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            self.send("{}", 404, X_Error_Code="RevisionNotFound")
            return None
        return repo, commit

    def info(self, name: str, revision: str | None) -> None:
        if found := self.find(name, revision):
            siblings = [{"rfilename": file} for file in found[0].commits[found[1]]]
            self.send(json.dumps({"id": name, "sha": found[1], "siblings": siblings}))

    def tree(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            files = []
            for path, content in found[0].commits[found[1]].items():
                size, oid = len(content), git_id(content)
                if path.endswith(".safetensors"):  # Git has a pointer to it
                    sha256 = hashlib.sha256(content).hexdigest()
                    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}"
                    oid = git_id(f"{text}\nsize {size}\n".encode())
                files.append({"type": "file", "path": path, "size": size, "oid": oid})
            self.send(json.dumps(files))

    def resolve(self, name: str, revision: str, file: str) -> None:
        if not (found := self.find(name, revision)):
            return
        repo, commit = found
        content = repo.commits[commit].get(file)
        if repo.gated:
            self.send("{}", 403 if self.authorized else 401, X_Error_Code="GatedRepo")
        elif content is None:
            self.send("{}", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self.send(content, ETag=f'"{git_id(content)}"', X_Repo_Commit=commit)

    def whoami(self) -> None:
        self.send(json.dumps({"type": "user", "name": "me"}), 200 if self.authorized else 401)

    def create(self) -> None:
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}"
        exists = name in self.hub.repos
        if not exists:
            private = request.get("visibility") == "private" or request.get("private", False)
            self.hub.repos[name] = Repo(private=private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors lfs"})
        self.send(json.dumps({"url": f"{self.hub.url}/{name}"}), 409 if exists else 200)

    def preupload(self, _: str) -> None:
        regular = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.send(json.dumps({"files": [{"path": path} | regular for path in paths]}))

    def commit(self, name: str, ref: str) -> None:
        files = dict(self.hub.repos[name].files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repos[name].commit(files, ref)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.send(json.dumps({"commitOid": sha, "commitUrl": url}))


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"((?:datasets/)?[^/]+/[^/]+)"
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"GET /api/(?:models/)?{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"GET /api/(?:models/)?{_NAME}(?:/revision/(.+))?", _Handler.info),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", lambda handler: handler.send('{"errors": [], "warnings": []}')),
    (rf"POST /api/models/{_NAME}/preupload/.+", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """A model in shards with an index, the largest of a few hundred kilobytes."""
    cfg = small_config(hidden_size=64)
    path = tmp_path_factory.mktemp("hub") / "model"
    return export_hf(cfg, random_tree(cfg), toy, path, max_shard_bytes=150_000)


@contextlib.contextmanager
def serving(tmp_path, monkeypatch):
    """An empty server and an empty cache; no waiting between two tries."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda _: None)
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A server with the model and much that is not needed, and an empty cache."""
    with serving(tmp_path, monkeypatch) as server:
        server.repos[NAME] = Repo()
        extra = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors")
        extra += ("model.Q4.gguf", "onnx/model.onnx", "notes.txt")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        server.repos[NAME].commit(files | dict.fromkeys(extra, b"x" * 100))
        yield server


@contextlib.contextmanager
def hub_offline():
    """As HF_HUB_OFFLINE=1, which the client reads when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield


def assert_same_model(a, b):
    (cfg_a, params_a), (cfg_b, params_b) = load_hf(a), load_hf(b)
    assert cfg_a == cfg_b
    assert_same_tree(params_a, params_b)
