"""A Hub on this machine: what clients ask a Hub for, data and models, answered from memory, with faults on demand."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
REVISION = re.compile(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")


@dataclass
class Repository:
    """A data set or a model.

    Args:
        files: path -> content.
        denied: status, X-Error-Code and X-Error-Message of the answers about it.
        listed: whether its list of files and its README.md are shown all the same.
    """

    files: dict[str, bytes]
    denied: tuple[int, str, str] | None = None
    listed: bool = False


@dataclass
class HubServer:
    """Serves repositories under `url` while it is used as a context.

    Args:
        repositories: by name, `owner/data`.
        fault: called with the path of every request, one at a time; an integer is answered as that status, "cut" sends
            half of the body and closes the connection.
        requests: all of them, as lines.
    """

    repositories: dict[str, Repository]
    fault: Callable[[str], int | str | None] = lambda path: None
    requests: list[str] = field(default_factory=list)

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
        """What goes into HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of processes for which this is the Hub, and which have never been there before.

        Args:
            home: their HF_HOME, an empty folder.
        """
        tests = Path(__file__).parent
        inherited = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": f"{tests}:{tests.parent}",
            "OMP_NUM_THREADS": "1",
        }

    def note(self, line: str, path: str) -> int | str | None:
        """Writes a request down, and says what goes wrong with it."""
        with self._lock:
            self.requests.append(line)
            return self.fault(path)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range", "")
        self._fault = self.hub.note(f"{self.command} {path} {span}".strip(), path)
        if isinstance(self._fault, int):
            self._send(self._fault, b"{}", {"Content-Type": "application/json"})
        elif match := REVISION.fullmatch(path):
            self._file(match[1], match[3], span)
        elif match := API.fullmatch(path):
            self._api(match[1], match[2], match[4] or "", body)
        else:
            self._send(404, b"{}")

    def _file(self, name: str, path: str, span: str) -> None:
        repository = self._repository(name, public=path == "README.md")
        if repository is None:
            return
        if path not in repository.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[path]
        headers = {
            "X-Repo-Commit": SHA,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", span):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _api(self, name: str, kind: str | None, path: str, body: bytes) -> None:
        repository = self._repository(name, public=True)
        if repository is None:
            return
        if kind == "tree":
            prefix = f"{path}/" if path else ""
            below = [file for file in repository.files if file.startswith(prefix)]
            answer = [self._entry(repository, file) for file in below if "/" not in file[len(prefix) :]]
            folders = {prefix + file[len(prefix) :].split("/")[0] for file in below if "/" in file[len(prefix) :]}
            answer += [{"type": "directory", "path": folder, "oid": SHA, "size": 0} for folder in sorted(folders)]
            if "recursive=true" in self.path.lower():
                answer = [self._entry(repository, file) for file in below]
        elif kind == "paths-info":
            wanted = json.loads(body)["paths"]
            answer = [self._entry(repository, file) for file in wanted if file in repository.files]
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            answer = {"id": name, "sha": SHA, "private": False, "gated": False, "siblings": siblings, "tags": []}
            answer |= {"downloads": 0, "likes": 0, "disabled": False}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _entry(self, repository: Repository, path: str) -> dict:
        content = repository.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _repository(self, name: str, public: bool) -> Repository | None:
        """The one that was asked for; None once the request is answered with a refusal."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            status, code, message = 401, "RepoNotFound", "Invalid username or password."
        elif repository.denied is None or (repository.listed and public):
            return repository
        else:
            status, code, message = repository.denied
        headers = {name: value for name, value in (("X-Error-Code", code), ("X-Error-Message", message)) if value}
        self._send(status, json.dumps({"error": message}).encode(), headers)
        return None

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
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
