"""A Hub on this machine for tests: downloads and uploads, kept in memory, with faults on demand.

Models are uploaded by what the Hub calls LFS, for which a client needs HF_HUB_DISABLE_XET=1;
`environment` sets it. A client with Xet asks for /api/models/{repo}/xet-write-token/{revision},
gets 404 as from a Hub without Xet, and gives up.
"""

import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from hub_uploads import INVALID_TOKEN, Call, Large, Refusal, Repository, Token, answer, git_hash

__all__ = ["HubServer", "Repository", "Token"]

FILE = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(
    r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?"
)
ABOUT_A_REPOSITORY = re.compile(r"/api/(?:datasets|models|spaces)/.+|/.+/resolve/.+")
JSON = {"Content-Type": "application/json"}
Fault = int | tuple[int, int] | str | None


@dataclass
class HubServer:
    """Serve repositories under `url` while it is used as a context.

    Args:
        repositories: by name, `owner/data`.
        fault: called with the path of every request, one at a time, when the request is the last of
            `requests` and its body has not been read. Returns what goes wrong: a status; (429, 3),
            a status and Retry-After; "cut upload", the connection is closed when half of the
            request's body has arrived; "cut", the request is done, but half of the answer's body is
            sent; "lose", the request is done, but not answered.
        requests: all requests, as lines.
        tokens: access token -> its owner. Without any, no request needs one, and nothing can be
            uploaded.
    """

    repositories: dict[str, Repository]
    fault: Callable[[str], Fault] = lambda path: None
    requests: list[str] = field(default_factory=list)
    tokens: dict[str, Token] = field(default_factory=dict)

    def __enter__(self) -> "HubServer":
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Return the value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """Return the environment of processes that use this Hub and have nothing in their caches.

        Args:
            home: their HF_HOME, an empty folder.
            token: their HF_TOKEN.
        """
        tests = Path(__file__).parent
        unwanted = ("_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
        inherited = {
            name: value for name, value in os.environ.items() if not name.endswith(unwanted)
        }
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": f"{tests}:{tests.parent}",
            "OMP_NUM_THREADS": "1",
        }

    def note(self, line: str, path: str) -> Fault:
        """Record a request, and return what goes wrong with it."""
        with self._lock:
            self.requests.append(line)
            return self.fault(path)

    def owner(self, authorization: str) -> Token | None:
        """Return the token that was sent, None if there is none."""
        if not authorization or not self.tokens:
            return None
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, INVALID_TOKEN)
        if token.expired:
            raise Refusal(401, 'User Access Token "tests" is expired')
        return token

    def change(self, call: Call, command: str, path: str) -> dict | None:
        """Do what a request asks for, one request at a time; None if it only reads."""
        with self._lock:
            return answer(call, command, path)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        url, size = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        path, span = unquote(url.path), self.headers.get("Range", "")
        self._fault = self.hub.note(f"{self.command} {path} {span}".strip(), path)
        if self._fault == "cut upload":
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        body = self.rfile.read(size)
        status, wait = self._fault if isinstance(self._fault, tuple) else (self._fault, None)
        try:
            if isinstance(status, int):
                self._send(
                    status, b"{}", JSON | ({} if wait is None else {"Retry-After": str(wait)})
                )
            else:
                self._serve(url, span, body)
        except Refusal as refusal:
            self._refuse(refusal, path)

    do_GET = do_POST = do_PUT = do_HEAD

    def _serve(self, url: SplitResult, span: str, body: bytes) -> None:
        query = parse_qs(url.query)
        token = self.hub.owner(self.headers.get("Authorization", ""))
        call = Call(
            self.hub.url, self.hub.repositories, token, body, create_pr="create_pr" in query
        )
        if (done := self.hub.change(call, self.command, url.path)) is not None:
            self._send(200, json.dumps(done).encode(), JSON)
        elif match := FILE.fullmatch(url.path):
            self._file(call, *map(unquote, match.groups()), span)
        elif match := API.fullmatch(url.path):
            name, kind, revision, path = (unquote(group or "") for group in match.groups())
            self._send(
                200, json.dumps(self._api(call, query, name, kind, revision, path)).encode(), JSON
            )
        else:
            self._send(404, b"{}")

    def _file(self, call: Call, name: str, revision: str, path: str, span: str) -> None:
        commit = call.repository(name, public=path == "README.md").at(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        headers = {
            "X-Repo-Commit": commit.sha,
            "ETag": f'"{git_hash(content)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if isinstance(content, Large):
            headers |= {"X-Linked-Etag": f'"{content.oid}"', "X-Linked-Size": str(len(content))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", span):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _api(
        self, call: Call, query: dict, name: str, kind: str, revision: str, path: str
    ) -> dict | list[dict]:
        repository = call.repository(name, public=True)
        commit = repository.at(revision or "main")
        if kind == "tree":
            return self._tree(commit.files, path, "true" in query.get("recursive", [""])[0].lower())
        if kind == "paths-info":
            # Some clients send JSON, huggingface_hub a form.
            wanted = (
                json.loads(call.body)
                if call.body.startswith(b"{")
                else parse_qs(call.body.decode())
            )
            return [
                self._entry(file, commit.files[file])
                for file in wanted["paths"]
                if file in commit.files
            ]
        siblings = [{"rfilename": file} for file in commit.files]
        if "blobs" in query:
            siblings = [self._blob(file, content) for file, content in commit.files.items()]
        info = {
            "id": name,
            "sha": commit.sha,
            "private": repository.private,
            "gated": False,
            "siblings": siblings,
        }
        return info | {"tags": [], "downloads": 0, "likes": 0, "disabled": False}

    def _tree(self, files: dict[str, bytes], path: str, recursive: bool) -> list[dict]:
        prefix = f"{path}/" if path else ""
        below = {file: content for file, content in files.items() if file.startswith(prefix)}
        if recursive:
            return [self._entry(file, content) for file, content in below.items()]
        entries = [
            self._entry(file, content)
            for file, content in below.items()
            if "/" not in file[len(prefix) :]
        ]
        folders = {
            prefix + file[len(prefix) :].split("/")[0]
            for file in below
            if "/" in file[len(prefix) :]
        }
        return entries + [
            {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            for folder in sorted(folders)
        ]

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if isinstance(content, Large):
            entry["lfs"] = {
                "oid": content.oid,
                "size": len(content),
                "pointerSize": len(content.pointer),
            }
        return entry

    def _blob(self, path: str, content: bytes) -> dict:
        blob = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
        if isinstance(content, Large):
            blob["lfs"] = {
                "sha256": content.oid,
                "size": len(content),
                "pointerSize": len(content.pointer),
            }
        return blob

    def _refuse(self, refusal: Refusal, path: str) -> None:
        code = refusal.code
        # Over https clients take such an answer for a missing repository by themselves, over http
        # only with the code.
        if (
            refusal.status == 401
            and refusal.message != INVALID_TOKEN
            and ABOUT_A_REPOSITORY.fullmatch(path)
        ):
            code = code or "RepoNotFound"
        headers = (
            JSON | {"X-Error-Message": refusal.message} | ({"X-Error-Code": code} if code else {})
        )
        self._send(
            refusal.status, json.dumps({"error": refusal.message, **refusal.more}).encode(), headers
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self._fault == "lose":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)
