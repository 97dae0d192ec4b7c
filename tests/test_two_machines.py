"""Two "machines" on this one: network namespaces with addresses of their own, joined by a virtual cable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TESTS, finish, results

ADDRESSES = ("10.213.77.1", "10.213.77.2")
NAMES = ("ofbhost0", "ofbhost1")


def ip(*words: str) -> None:
    """Runs the `ip` command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two network namespaces that reach each other at `ADDRESSES`."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    try:
        ip("link", "add", "ofbcable0", "netns", NAMES[0], "type", "veth", "peer", "ofbcable1", "netns", NAMES[1])
        for index, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"ofbcable{index}")
            ip("-n", name, "link", "set", f"ofbcable{index}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start_machine(rank: int, folder: Path, options: dict) -> subprocess.Popen:
    """`accelerate launch` in one namespace, one process, on a disk that both see."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    launch = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank), "--multi_gpu"]
    launch += ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29577", "--rdzv_backend", "static"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    search = [str(TESTS / "search_process.py"), str(folder), json.dumps(options)]
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[rank], *accelerate, *launch, *search],
        env=os.environ
        | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"ofbcable{rank}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_search_across_two_machines_gives_one_network(tmp_path, machines):
    options = {"compare_ranks": True, "shrink_at": [7, 10], "arguments": {"save_strategy": "steps", "save_steps": 8}}
    options["config"] = {"importance_hold": 0.1, "retire_begin": 0.8, "settle_at": 0.9}
    processes = [start_machine(rank, tmp_path, options) for rank in range(2)]
    for status, said in [finish(process) for process in processes]:
        assert status == 0, said[-3000:]
    first, second = results(tmp_path, ranks=2)
    assert first["world_size"] == second["world_size"] == 2
    assert [step["different"] for step in first["steps"]] == [[]] * 24
    assert first["weights"] == second["weights"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{s}" for s in (16, 24, 8)]
