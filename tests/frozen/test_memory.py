"""Memory that is freed in between goes back to the system."""

import sys
from pathlib import Path

import pytest
import torch

from ofb_hf.frozen import memory
from ofb_hf.frozen.memory import trim_memory

# Below the size from which the C library asks the system for every block by itself.
BLOCK = 100 * 1024
BLOCKS = 1000


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return 4096 * pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_blocks_between_used_ones_are_given_back():
    blocks = [torch.zeros(BLOCK, dtype=torch.uint8) for _ in range(BLOCKS)]
    # What is used at the end keeps the others from going back by themselves.
    used = blocks[-1]
    before = resident_bytes()
    del blocks
    trim_memory()
    assert resident_bytes() < before - 0.8 * BLOCK * BLOCKS
    assert used.numel() == BLOCK


def test_systems_without_it_do_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    assert trim_memory() is None
