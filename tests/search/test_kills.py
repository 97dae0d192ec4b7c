"""Killed at any moment, a search goes on from its last checkpoint and ends where it would have
ended.

`KILLS=10 KILLS_SEED=7 pytest tests/test_kills.py` kills more often, and at other moments.
"""

import os
import random
import shutil
import time
from itertools import cycle
from pathlib import Path

import pytest
from runs import finish, results, start_search
from watched import OPTIONS, Watched

from ofb_hf.training.checkpoints import ASIDE

KILLS = int(os.environ.get("KILLS", "1"))
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "ema_decay": 0.9}
# The last MLP is gone after five of these.
LEAVE_OUT = {
    "config": OPTIONS["config"] | {"search_depth": True},
    "shrink_at": [4, 6, 7, 9, 11, 13],
}
MOMENTS = ("in a save", "after a shrink", "somewhere")


def kill_at(folder: Path, options: dict, ranks: int, moment: str, rng: random.Random) -> bool:
    """Starts the search and kills it: during a save, right after a shrink, or somewhere. False if
    it was faster."""
    search, step = Watched(folder, options, ranks), rng.randint(3, 20)
    if moment == "in a save":
        search.wait_for(lambda: search.said(f"step {step}"))
        running = search.wait_for(lambda: any((folder / ASIDE).glob("checkpoint-*/*")))
    elif moment == "after a shrink":
        shrink = rng.randint(2, 4)  # the first line says "shrunk" as well
        running = search.wait_for(
            lambda: sum(line.startswith("shrunk") for line in search.lines) >= shrink
        )
    else:
        running = search.wait_for(lambda: search.said(f"step {step}"))
        time.sleep(rng.random() * 0.05)
    search.kill() if running else search.reader.join()
    return running and not (folder / "result-0.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "family", "depth", "first"),
    [(1, "swin", LEAVE_OUT, 0), (2, "vit", {}, 1), (1, "vit", LEAVE_OUT, 2)],
)
def test_a_killed_search_ends_where_the_straight_one_ends(tmp_path, ranks, family, depth, first):
    """Each begins with another of the moments."""
    straight, rng = tmp_path / "straight", random.Random(int(os.environ.get("KILLS_SEED", ranks)))
    straight.mkdir()
    options = OPTIONS | depth | {"family": family, "arguments": SAVING}
    status, said = finish(start_search(straight, options, ranks))
    assert status == 0, said[-3000:]
    assert not depth or [] in results(straight, ranks)[0]["subnet"]["kept"].values()
    for number, moment in zip(range(KILLS), cycle(MOMENTS[first:] + MOMENTS[:first]), strict=False):
        killed = tmp_path / str(number)
        killed.mkdir()
        while not kill_at(killed, options, ranks, moment, rng):
            shutil.rmtree(killed)
            killed.mkdir()
        status, said = finish(start_search(killed, options, ranks))
        assert status == 0, said[-3000:]
        for expected, result in zip(results(straight, ranks), results(killed, ranks), strict=True):
            assert result["subnet"] == expected["subnet"], f"kill {number}, {moment}"
            assert result["weights"] == expected["weights"], f"kill {number}, {moment}"
        assert len(list(killed.glob("checkpoint-*"))) == 2
        assert not (killed / ASIDE).exists()
