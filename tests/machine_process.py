"""A program on a "machine" of its own: `machine_process.py NAMESPACE SCRIPT WORDS...`.

Enters a network namespace, none for an empty name, and runs SCRIPT there. `accelerate` as SCRIPT is
the command `accelerate launch`.
"""

import ctypes
import os
import runpy
import sys


def enter(namespace: str) -> None:
    """Move this process, and all that it starts, to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        # 0: whatever kind of namespace it is
        if libc.setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


if __name__ == "__main__":
    _, namespace, script, *words = sys.argv
    if namespace:
        enter(namespace)
    sys.argv = [script, *words]
    if script == "accelerate":
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
