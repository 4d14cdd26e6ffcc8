"""A small server with the part of the Hub's protocol that a download and a commit of small files need."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    repos: dict[str, dict[str, bytes]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes = b"{}", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        found = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo = self.repos.get(found[1]) if found else None
        if found is None or repo is None:
            self._answer(b'{"error": "Repository not found"}', 404, X_Error_Code="RepoNotFound")
        elif found[3] not in repo:
            self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            content = repo[found[3]]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, X_Repo_Commit=COMMIT, ETag=etag)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.repos.setdefault(name, {})
            self._answer(json.dumps({"url": f"{url}/{name}", "id": name}).encode())
        elif "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self._answer(json.dumps({"files": files}).encode())
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.repos[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitOid": COMMIT, "commitUrl": f"{url}/{found[1]}/commit/{COMMIT}", "success": True}
            self._answer(json.dumps(commit).encode())
        else:  # checks of the card
            self._answer(b'{"errors": [], "warnings": []}')


@contextmanager
def running() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """(its address, its repositories' files) while the server runs."""
    repos: dict[str, dict[str, bytes]] = {}
    handler = type("Handler", (_Handler,), {"repos": repos})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", repos
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
