"""Two real processes: masks, weights and moments stay identical on both while the network shrinks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_ranks_hold_the_same_network_after_every_step(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    result = subprocess.run(
        [
            *command,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            str(here / "search_on_two_ranks.py"),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    reports = [line for line in result.stdout.splitlines() if line.startswith('{"world_size"')]
    assert reports, result.stderr[-3000:]
    report = json.loads(reports[0])
    assert report["world_size"] == 2
    assert [step["different"] for step in report["steps"]] == [[]] * 20
    assert len({step["macs"] for step in report["steps"]}) > 1
