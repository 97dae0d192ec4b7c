"""A search in processes of its own that is watched, interrupted and killed."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from runs import start_search

OPTIONS = {
    "config": {"importance_hold": 0.1, "retire_begin": 0.6, "settle_at": 0.8},
    "shrink_at": [6, 9, 13],
}


class Watched:
    """A search in its own processes, whose lines are collected while it runs."""

    def __init__(self, folder: Path, options: dict, ranks: int):
        self.process = start_search(folder, options, ranks)
        self.lines: list[str] = []
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(iter(self.process.stdout.readline, ""))
        )
        self.reader.start()

    def wait_for(self, happened, timeout: float = 120) -> bool:
        """Waits until `happened()`; False if the process ends before."""
        end = time.monotonic() + timeout
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "".join(self.lines)[-2000:]
            time.sleep(0.0005)
        return True

    def said(self, start: str) -> bool:
        """Whether some line begins like this."""
        return any(line.startswith(start) for line in self.lines)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal to all its processes, as clusters do, and waits: (exit status, everything
        it said)."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        self.process.wait(120)
        self.reader.join()
        return self.process.returncode, "".join(self.lines)

    def kill(self) -> None:
        """Kills the process and all it started, at once."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.wait()
        self.reader.join()
