"""Searches in processes of their own that tests watch, interrupt and kill."""

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
    """Run a search in processes of its own, and collect its output while it runs."""

    def __init__(self, folder: Path, options: dict, ranks: int):
        self.process = start_search(folder, options, ranks)
        self.lines: list[str] = []
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(iter(self.process.stdout.readline, ""))
        )
        self.reader.start()

    def wait_for(self, happened, timeout: float = 120) -> bool:
        """Wait until `happened()`; return False if the process ends before."""
        end = time.monotonic() + timeout
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "".join(self.lines)[-2000:]
            time.sleep(0.0005)
        return True

    def said(self, start: str) -> bool:
        """Return whether some line of the output begins with `start`."""
        return any(line.startswith(start) for line in self.lines)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to all processes, as clusters do; return exit status and output."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        self.process.wait(120)
        self.reader.join()
        return self.process.returncode, "".join(self.lines)

    def kill(self) -> None:
        """Kill the process and all processes that it has started."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.wait()
        self.reader.join()
