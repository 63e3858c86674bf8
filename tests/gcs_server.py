"""The part of Google Cloud Storage's JSON interface that TensorStore uses, over a folder."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_LOCK = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Says nothing."""

    def _answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _parts(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        name = url.path.partition("/o/")[2]
        return query, self.folder / unquote(name) if name else None

    @staticmethod
    def _generation(path):
        return path.stat().st_mtime_ns if path.is_file() else 0

    def _hindered(self, query, path):
        """Whether a precondition does not hold, as (status,)."""
        now = self._generation(path)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            return 412
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            return 304
        return 0

    def _told(self, path):
        stat = path.stat()
        return {
            "name": str(path.relative_to(self.folder)),
            "size": str(stat.st_size),
            "generation": str(stat.st_mtime_ns),
            "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def do_GET(self):
        query, path = self._parts()
        if path is None:
            return self._list(query)
        with _LOCK:
            if not path.is_file():
                return self._answer(404)
            if hindered := self._hindered(query, path):
                return self._answer(hindered)
            if query.get("alt") != "media":
                return self._answer(200, self._told(path))
            content, generation = path.read_bytes(), self._generation(path)
        extra = {"x_goog_generation": generation, "Cache_Control": "no-store"}
        asked = self.headers.get("Range")
        if not asked:
            return self._answer(200, content, **extra)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin = int(first) if first else len(content) - int(last)
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        if begin >= len(content):
            return self._answer(416)
        extra["Content_Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self._answer(206, content[begin : end + 1], **extra)

    def _list(self, query):
        prefix = query.get("prefix", "")
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        items = [self._told(path) for path in found]
        start, end = query.get("startOffset", ""), query.get("endOffset")
        kept = [
            item
            for item in items
            if item["name"].startswith(prefix)
            and item["name"] >= start
            and (end is None or item["name"] < end)
        ]
        return self._answer(200, {"items": kept})

    def do_POST(self):
        query, _ = self._parts()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.folder / query["name"]
        with _LOCK:
            if hindered := self._hindered(query, path):
                return self._answer(hindered)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            return self._answer(200, self._told(path))

    def do_DELETE(self):
        query, path = self._parts()
        with _LOCK:
            if not path.is_file():
                return self._answer(404)
            if hindered := self._hindered(query, path):
                return self._answer(hindered)
            path.unlink()
            return self._answer(204)


def serve(folder):
    """A running server of one bucket whose objects are the folder's files; its address."""
    handler = type("Handler", (_Handler,), {"folder": Path(folder)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"
