"""A model hub on this machine: as much of its HTTP interface as downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves `files` of one `repository` at `url` while it is entered.

    `denial` is the (status, error code) that all requests get, where set. The connection closes
    after the bytes in `cut`, one entry for each time that a file is asked for. `requests` logs
    method, path and the range asked for, `tokens` the credentials.
    """

    repository: str
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    denial: tuple[int, str] | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloaded(self) -> list[str]:
        """The files that were asked for, once each, in the order of their names."""
        marker = f"/resolve/{COMMIT}/"
        return sorted(
            {p.split(marker)[1] for m, p, _ in self.requests if m == "GET" and marker in p}
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: FakeHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.served, urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        hub.tokens.add(self.headers.get("Authorization"))
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if hub.denial is not None:
            self._refuse(*hub.denial)
        elif path == api or path.startswith(api + "/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            self._describe(revision, body)
        elif path.startswith(api + "/tree/"):
            self._list(body)
        elif path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            self._send_file(revision, name, body)
        else:
            self._refuse(404, "RepoNotFound")

    def _describe(self, revision: str, body: bool) -> None:
        hub = self.served
        if revision not in hub.revisions:
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
        info = {"id": hub.repository, "modelId": hub.repository, "sha": COMMIT}
        self._send_json({**info, "siblings": siblings, "tags": [], "private": False}, body)

    def _list(self, body: bool) -> None:
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.served.files.items()
        ]
        self._send_json(tree, body)

    def _send_json(self, value: Any, body: bool) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _send_file(self, revision: str, name: str, body: bool) -> None:
        hub = self.served
        if revision not in hub.revisions or name not in hub.files:
            self._refuse(404, "EntryNotFound")
            return
        data = hub.files[name]
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and body else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            cuts = hub.cut.get(name)
            stop = cuts.pop(0) if cuts else len(data)
            self.wfile.write(data[start:stop])
            self.close_connection = stop < len(data)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
