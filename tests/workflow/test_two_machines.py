"""Two "machines" on this one: network namespaces with addresses of their own, joined by a virtual
cable."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import warm
from runs import TESTS, finish, results

from ofb_hf.training.checkpoints import newest_checkpoint

ADDRESSES = ("10.213.77.1", "10.213.77.2")
NAMES = tuple(f"ofb{os.getpid()}host{index}" for index in range(2))
OPTIONS = {"compare_ranks": True, "shrink_at": [7, 10]}
OPTIONS["config"] = {"importance_hold": 0.1, "retire_begin": 0.8, "settle_at": 0.9}


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
        ip(
            "link",
            "add",
            "ofbcable0",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "ofbcable1",
            "netns",
            NAMES[1],
        )
        for index, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"ofbcable{index}")
            ip("-n", name, "link", "set", f"ofbcable{index}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


# What `accelerate launch` tells the process that it starts on the machine of this rank.
LAUNCHED = {
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": ADDRESSES[0],
    "MASTER_PORT": "29577",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
}
LAUNCH = [
    *("--num_machines", "2", "--num_processes", "2", "--multi_gpu"),
    *("--main_process_ip", ADDRESSES[0], "--main_process_port", "29577"),
    *("--rdzv_backend", "static", "--mixed_precision", "no", "--dynamo_backend", "no"),
]


def start_machine(rank: int, folder: Path, options: dict, launch: bool = False) -> warm.Process:
    """Start one process in one namespace, by `accelerate launch` or as that would start it."""
    search = [str(TESTS / "search_process.py"), str(folder), json.dumps(options)]
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
        "GLOO_SOCKET_IFNAME": f"ofbcable{rank}",
    }
    if launch:
        search = ["accelerate", *LAUNCH, "--machine_rank", str(rank), *search]
    else:
        environment |= LAUNCHED | {"RANK": str(rank)}
    script = TESTS / "machine_process.py"
    return warm.start(script, NAMES[rank], *search, environment=environment)


def run(
    folders: list[Path], arguments: dict, stop_at: int | None = None, launch: bool = False
) -> list[str]:
    """Run the search on both machines and return what they said; with `stop_at`, both are told to
    stop at about that step."""
    options = OPTIONS | {"arguments": arguments}
    processes = [
        start_machine(rank, folder, options, launch) for rank, folder in enumerate(folders)
    ]
    if stop_at is not None:
        while (line := processes[0].stdout.readline()) and not line.startswith(f"step {stop_at}"):
            pass
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)
    ended = [finish(process) for process in processes]
    if stop_at is None:
        assert [status for status, _ in ended] == [0, 0], "\n".join(
            said[-3000:] for _, said in ended
        )
    return [said for _, said in ended]


@pytest.mark.slow
def test_a_search_across_two_machines_gives_one_network(tmp_path, machines):
    """Straight with a disk that both see; then, stopped and resumed, with a disk for each. The one
    that is stopped runs under `accelerate launch`, which takes ten seconds longer."""
    shared = tmp_path / "shared"
    shared.mkdir()
    run([shared] * 2, {"save_strategy": "steps", "save_steps": 8})
    first, second = results(shared, ranks=2)
    assert first["world_size"] == second["world_size"] == 2
    assert [step["different"] for step in first["steps"]] == [[]] * 24
    assert first["weights"] == second["weights"]
    assert sorted(path.name for path in shared.glob("checkpoint-*")) == [
        f"checkpoint-{s}" for s in (16, 24, 8)
    ]

    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    settings = {"save_on_each_node": True, "save_strategy": "no"}
    said = run(disks, settings, stop_at=11, launch=True)
    assert "stopped by SIGTERM after step" in said[0]
    stopped = [[path.name for path in disk.glob("checkpoint-*")] for disk in disks]
    assert len(stopped[0]) == 1
    assert stopped[0] == stopped[1]
    run(disks, settings)
    for rank, disk in enumerate(disks):
        assert json.loads((disk / f"result-{rank}.json").read_text())["weights"] == first["weights"]


@pytest.mark.slow
def test_a_checkpoint_that_only_one_machine_sees_is_not_resumed_from(tmp_path, machines):
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    run(disks, {"save_strategy": "no"}, stop_at=11)
    assert newest_checkpoint(disks[0]) is not None
    assert newest_checkpoint(disks[1]) is None
    processes = [start_machine(rank, disk, OPTIONS) for rank, disk in enumerate(disks)]
    for status, said in [finish(process) for process in processes]:
        assert status != 0
        assert "not all machines see the complete checkpoint" in said
