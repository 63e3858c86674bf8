"""A Hugging Face hub in a thread: enough of its API to load models and data sets, and to push.

Weights are served as the hub serves them: the hub's own host redirects to another (`localhost`
beside `127.0.0.1`), which knows no accounts, and honors ranges of bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"


@dataclasses.dataclass
class Repo:
    """A repository: commits by their hash, branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        said = json.dumps([sorted((k, sha256(v)) for k, v in files.items()), len(self.commits)])
        sha = hashlib.sha1(said.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclasses.dataclass
class Fault:
    """What happens to the next requests whose "METHOD /path" a pattern finds."""

    pattern: str
    times: int = 1
    status: int | None = None  # the answer's, without content
    cut: int | None = None  # the connection ends before this byte of the file
    stall: float = 0.0  # seconds of silence in the middle
    pause: float = 0.0  # seconds after every 10,000 bytes
    flip: bool = False  # one bit of the content is another
    ranges: bool = True  # False: the range that was asked for is ignored
    short: int | None = None  # the file has only this many bytes, whatever was announced


@dataclasses.dataclass
class Request:
    method: str
    path: str
    start: int | None  # of the range that was asked for
    authorized: bool


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class HubServer:
    """The hub; `with HubServer() as hub:` serves at `hub.url` until the block ends."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.role = "write"
        self.uploaded: dict[str, bytes] = {}  # by sha256, not yet in a commit
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, pattern: str, **what: object) -> None:
        self.faults.append(Fault(pattern, **what))

    def asked(self, pattern: str) -> list[Request]:
        return [r for r in self.log if re.search(pattern, f"{r.method} {r.path}")]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunked()
        path = unquote(urlsplit(self.path).path)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else None
        self.authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.fault = Fault("")
        with self.hub.lock:
            known = "Authorization" in self.headers
            self.hub.log.append(Request(self.command, path, start, known))
            for fault in self.hub.faults:
                if fault.times and re.search(fault.pattern, f"{self.command} {path}"):
                    fault.times -= 1
                    self.fault = fault
                    break
        if self.fault.status:
            self._json({"error": "a fault of the test"}, self.fault.status)
            return
        for pattern, action in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                action(self, *found.groups())
                return
        self._json({"error": f"no route {self.command} {path}"}, 404)

    def _chunked(self) -> bytes:
        content = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    def _json(self, content: object, status: int = 200, **headers: str) -> None:
        encoded = json.dumps(content).encode()
        self._head(status, {"Content-Type": "application/json", **headers}, len(encoded))
        if self.command != "HEAD":
            self.wfile.write(encoded)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _repo(self, name: str, revision: str, content: bool = False) -> tuple[Repo, str] | None:
        """A repository and a commit of it; None where the error has been sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.authorized):
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self._json({"error": "Invalid rev"}, 404, X_Error_Code="RevisionNotFound")
            return None
        if content and repo.gated:
            status = 403 if self.authorized else 401
            self._json({"error": "Access is restricted"}, status, X_Error_Code="GatedRepo")
            return None
        return repo, commit

    def info(self, name: str, revision: str | None) -> None:
        if found := self._repo(name, revision or "main"):
            repo, commit = found
            files = [{"rfilename": file} for file in repo.commits[commit]]
            about = {
                "_id": "1",
                "id": name.removeprefix("datasets/"),
                "sha": commit,
                "siblings": files,
                "tags": [],
            }
            self._json(about | {"private": repo.private, "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        if found := self._repo(name, revision):
            files = found[0].commits[found[1]]
            self._json(
                [
                    {"type": "file", "path": path, "size": len(x), "oid": _git_id(x)}
                    for path, x in files.items()
                ]
            )

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self._repo(name, revision, content=True)
        if not found:
            return
        repo, commit = found
        content = repo.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            self._json({"error": "not found"}, 404, X_Error_Code="EntryNotFound", **headers)
        elif not file.endswith((".safetensors", ".gguf", ".parquet", ".jsonl")):
            self._content(content, headers | {"ETag": f'"{_git_id(content)}"'})
        else:
            place = f"http://localhost:{self.hub.port}/cdn/{name}/{commit}/{file}"
            linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._head(302, headers | linked | {"Location": place}, 0)

    def cdn(self, name: str, commit: str, file: str) -> None:
        self._content(self.hub.repos[name].commits[commit][file], {})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for, with the faults of this request."""
        fault, asked = self.fault, re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and fault.ranges else 0
        content = content[: fault.short]
        if start and start >= len(content):
            self._json({"error": "no such range"}, 416)
            return
        if asked and fault.ranges:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._head(206 if "Content-Range" in headers else 200, headers, len(content) - start)
        if self.command == "HEAD":
            return
        if fault.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = len(content) if fault.cut is None else max(fault.cut, start)
        for at in range(start, end, 10_000):
            self.wfile.write(content[at : min(at + 10_000, end)])
            self.wfile.flush()
            time.sleep(fault.pause)
            if fault.stall:
                time.sleep(fault.stall)
                break
        if end < len(content) or fault.stall:
            self.close_connection = True

    def whoami(self) -> None:
        if not self.authorized:
            self._json({"error": "Invalid credentials"}, 401)
            return
        token = {"displayName": "test", "role": self.hub.role}
        orgs = [{"name": "org", "roleInOrg": "write"}]
        me = {"type": "user", "name": "me", "orgs": orgs}
        self._json(me | {"auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repos
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.repos[name] = Repo(private=private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors lfs"})
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, name: str, _: str) -> None:
        files = [file["path"] for file in json.loads(self.body)["files"]]
        old = self.hub.repos[name].files
        self._json(
            {
                "files": [
                    {
                        "path": path,
                        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": _git_id(old[path]) if path in old else None,
                    }
                    for path in files
                ]
            }
        )

    def batch(self, name: str) -> None:
        here = {sha256(x) for x in self.hub.repos[name].files.values()} | set(self.hub.uploaded)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            missing = {} if wanted["oid"] in here else {"actions": {"upload": upload}}
            objects.append(wanted | missing)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert sha256(self.body) == oid
        self.hub.uploaded[oid] = self.body
        self._json({})

    def commit(self, name: str, ref: str) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.files)
        stored = {sha256(x): x for x in files.values()} | self.hub.uploaded
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, ref)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"((?:datasets/)?[^/]+/[^/]+)"  # data sets are kept under datasets/ORG/NAME
_ROUTES = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"GET /api/(?:models/)?{_NAME}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(.+)", _Handler.put),
    (rf"(?:GET|HEAD) /cdn/{_NAME}/([^/]+)/(.+)", _Handler.cdn),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
