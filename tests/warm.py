"""Start scripts in processes of their own without waiting for imports.

A process that trains needs several seconds to import torch, transformers and datasets, and the
suite starts a hundred of them. One process per test session imports all of it, never computes
anything, and forks: every script runs in a fresh copy of it, with its own session, environment,
streams and exit status. On several ranks, a launcher forks them and ends all of them when one
fails, as torchrun does.

Some libraries read the environment while they are imported: the address of the Hub, say. A second
process, forked from the first one early, has imported `INDEPENDENT` only, which is most of the
time; a script forked from it (`start(..., fresh=True)`) imports transformers and this package by
itself, or proves that it can do without them.

`start` returns an object with the part of the interface of `subprocess.Popen` that tests use.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# Libraries of others that read nothing from the environment that tests change.
INDEPENDENT = (
    "aiohttp",
    "matplotlib.pyplot",
    "pyarrow.dataset",
    "sklearn.datasets",
    "sklearn.metrics",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
)
PRELOADED = (
    "accelerate",
    "datasets",
    "hypothesis",
    "pytest",
    "transformers",
    "transformers.trainer",
    "ofb_hf.cli",
    "ofb_hf.search.trainer",
    "ofb_hf.workflow.search",
)


class Process:
    """A script that runs in a process of its own.

    Attributes:
        pid: of the script, or of the launcher of its ranks; it leads a session and a process group.
        stdout: text stream of what it prints, errors included.
        returncode: exit status, negative for a signal as in `subprocess`; None while it runs.
    """

    def __init__(self, connection: socket.socket, stdout: int):
        self._connection = connection
        self.stdout = os.fdopen(stdout, "r", encoding="utf-8", errors="replace")
        self.pid = self._receive()
        self.returncode: int | None = None

    def _receive(self) -> int:
        """Return the next number that the supervisor sends: the pid, then the status."""
        digits = b""
        while not digits.endswith(b"\n"):
            received = self._connection.recv(1)
            if not received:
                raise RuntimeError("the process that starts scripts is gone")
            digits += received
        return int(digits)

    def poll(self) -> int | None:
        """Return the exit status, None while the process runs."""
        if self.returncode is None:
            self._connection.setblocking(False)
            try:
                self._connection.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return None
            finally:
                self._connection.setblocking(True)
            self.returncode = self._receive()
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status as soon as there is one."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Return everything that the process prints, when it has ended."""
        said = self.stdout.read()
        self.wait(timeout)
        return said, None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


# ----------------------------------------------------------------------------------- asking for one

# What the address of the process with few imports ends in.
FRESH = "-fresh"
_server: subprocess.Popen | None = None
_address: str | None = None


def start(
    script: Path,
    *words: str,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    fresh: bool = False,
) -> Process:
    """Start a script on one rank or several.

    Args:
        script: a Python file, run as `__main__`.
        words: its command line.
        ranks: how many processes form one gloo group.
        environment: all its variables; by default, those of this process.
        fresh: whether it imports transformers, huggingface_hub and this package by itself.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(_serve() + (FRESH if fresh else ""))
    reading, writing = os.pipe()
    job = {
        "script": str(script),
        "words": list(words),
        "ranks": ranks,
        "environment": dict(os.environ) if environment is None else environment,
        "folder": os.getcwd(),
    }
    socket.send_fds(connection, [b" "], [writing])
    os.close(writing)
    connection.sendall(json.dumps(job).encode() + b"\n")
    return Process(connection, reading)


def _serve() -> str:
    """Return the address of this session's server, which starts with the first question for it."""
    global _server, _address
    if _server is None or _server.poll() is not None:
        # An abstract address: there is no file that a killed session could leave behind.
        _address = f"\0ofb-hf-tests-{os.getpid()}-{time.monotonic_ns()}"
        _server = subprocess.Popen(
            [sys.executable, __file__, _address[1:], str(os.getpid())],
            env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(_server.kill)
        # It says one line when it listens.
        _server.stdout.readline()
    return _address


# -------------------------------------------------------------------------------- the one who forks


def serve(name: str, parent: int) -> None:
    """Import everything, then fork scripts until the parent is gone; so does a child of this
    process that has imported less."""
    # Children are waited for by nobody here; their supervisors wait for the scripts.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Questions wait until there is somebody to answer them.
    everything, fresh = _listen(name), _listen(name + FRESH)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    for module in INDEPENDENT:
        __import__(module)
    early = {"huggingface_hub", "transformers", "ofb_hf"} & set(sys.modules)
    if early:
        raise RuntimeError(f"fresh scripts would find what read another environment: {early}")
    # Scripts need not look for garbage among modules, nor copy their pages while they do.
    gc.freeze()
    first = os.getpid()
    if os.fork() == 0:
        everything.close()
        _answer(fresh, first)
        os._exit(0)
    fresh.close()
    for module in PRELOADED:
        __import__(module)
    gc.freeze()
    _answer(everything, parent)


def _listen(name: str) -> socket.socket:
    """Return a socket that listens at an abstract address."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"\0{name}")
    listener.listen(64)
    listener.settimeout(2.0)
    return listener


def _answer(listener: socket.socket, parent: int) -> None:
    """Fork a supervisor for every question until the parent is gone."""
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            _supervise(connection)
            os._exit(0)
        connection.close()


def _supervise(connection: socket.socket) -> None:
    """Fork one script, report its pid and later its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    _, (output,), _, _ = socket.recv_fds(connection, 1, 1)
    text = b""
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    job = json.loads(text)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(job, output)
    os.close(output)
    connection.sendall(f"{child}\n".encode())
    connection.sendall(f"{_status(os.waitpid(child, 0)[1])}\n".encode())
    connection.close()


def _status(waited: int) -> int:
    """Return an exit status as `subprocess` gives it."""
    return os.waitstatus_to_exitcode(waited)


def _become(job: dict[str, Any], output: int) -> None:
    """Turn this process into the script, or into the launcher of its ranks; never returns."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.closerange(3, 256)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"] == 1:
        _run(job)
    _launch(job)


def _launch(job: dict[str, Any]) -> None:
    """Fork the ranks of a job and exit as torchrun does: 0 if all ended well, else 1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(job["ranks"]):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(job["ranks"]),
                LOCAL_WORLD_SIZE=str(job["ranks"]),
                MASTER_ADDR="localhost",
                MASTER_PORT=str(port),
            )
            _run(job)
        children.add(child)

    def forward(number: int, frame: Any) -> None:
        for child in children:
            os.kill(child, number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    failed = False
    while children:
        child, waited = os.wait()
        children.discard(child)
        if waited != 0 and not failed:
            failed = True
            # The others would wait for it forever. They may save what they have first.
            for other in children:
                os.kill(other, signal.SIGTERM)
    os._exit(int(failed))


def _run(job: dict[str, Any]) -> None:
    """Run the script in this process and exit with its status."""
    sys.argv = [job["script"], *job["words"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    # New streams: what the server has buffered belongs to it.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    status = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Like the end of an interpreter, without the minutes that threads of gloo may take for it.
    os._exit(status & 0xFF)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
