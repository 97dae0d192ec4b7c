"""Killed, terminated, interrupted: the search goes on from its last checkpoint and ends where it would have ended.

`KILLS=10 pytest tests/test_interruption.py` kills more often.
"""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from runs import finish, results, searcher, start_search
from transformers import TrainerCallback, TrainerState

from ofb_hf.checkpoints import ASIDE, is_complete, move_into_place, newest_checkpoint
from ofb_hf.interruption import TrainingInterrupted

KILLS = int(os.environ.get("KILLS", "3"))
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "ema_decay": 0.9}
OPTIONS = {"config": {"importance_hold": 0.1, "retire_begin": 0.6, "settle_at": 0.8}, "shrink_at": [6, 9, 13]}


class Watched:
    """A search in its own processes, whose lines are collected while it runs."""

    def __init__(self, folder: Path, options: dict, ranks: int):
        self.process = start_search(folder, options, ranks)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")))
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
        """Sends a signal and waits: (exit status, everything it said)."""
        self.process.send_signal(number)
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


def latest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    newest = newest_checkpoint(folder)
    return int(newest.rpartition("-")[2]) if newest else 0


def kill_once(folder: Path, options: dict, ranks: int, when: str, rng: random.Random) -> bool:
    """Starts or resumes the search and kills it: during a save, right after a shrink, or at some moment.

    Returns:
        Whether it was killed before it ended.
    """
    search, after = Watched(folder, options, ranks), latest_step(folder) + rng.randint(1, 5)
    if when == "save":
        running = search.wait_for(lambda: search.said("step") and any((folder / ASIDE).glob("checkpoint-*/*")))
    elif when == "shrink":
        running = search.wait_for(lambda: sum(line.startswith("shrunk") for line in search.lines) > 1)
    else:
        running = search.wait_for(lambda: search.said(f"step {after}"))
        time.sleep(rng.random() * 0.05)
    search.kill() if running else search.reader.join()
    return running


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "family"), [(1, "swin"), (2, "vit")])
def test_a_killed_search_ends_where_the_straight_one_ends(tmp_path, ranks, family):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    options = OPTIONS | {"family": family, "arguments": SAVING}
    status, said = finish(start_search(straight, options, ranks))
    assert status == 0, said[-3000:]
    rng, kills = random.Random(ranks), 0
    for when in (["save", "shrink", "random"] * KILLS)[:KILLS]:
        kills += kill_once(killed, options, ranks, when, rng)
        if (killed / "result-0.json").exists():
            break
    assert kills >= min(2, KILLS)
    status, said = finish(start_search(killed, options, ranks))
    assert status == 0, said[-3000:]
    for expected, result in zip(results(straight, ranks), results(killed, ranks), strict=True):
        assert result["subnet"] == expected["subnet"]
        assert result["weights"] == expected["weights"]
    assert len(list(killed.glob("checkpoint-*"))) == 2
    assert not (killed / ASIDE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)], ids=["TERM", "INT", "TERM-2"]
)
def test_a_signal_saves_a_checkpoint_and_the_search_goes_on_from_it(tmp_path, number, ranks):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir(), stopped.mkdir()
    options = OPTIONS | {"arguments": {"save_strategy": "no"}}
    status, said = finish(start_search(straight, options, ranks))
    assert status == 0, said[-3000:]
    search = Watched(stopped, options, ranks)
    assert search.wait_for(lambda: search.said("step 8"))
    status, said = search.end(number)
    assert status == (128 + number if ranks == 1 else 1) or (ranks == 2 and status != 0)
    assert f"stopped by {number.name} after step" in said
    assert "--resume_from_checkpoint auto" in said
    assert 8 <= latest_step(stopped) < 24
    status, said = finish(start_search(stopped, options, ranks))
    assert status == 0, said[-3000:]
    assert results(stopped)[0]["weights"] == results(straight)[0]["weights"]


class Terminates(TrainerCallback):
    """Sends SIGTERM to its own process in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_a_program_of_ones_own_ends_training_and_gives_the_signals_back(tmp_path):
    trainer = searcher(tmp_path, max_steps=5)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer.add_callback(Terminates(3))
    with pytest.raises(TrainingInterrupted) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert trainer.state.global_step == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def _SendsItself(step):
    from transformers import TrainerCallback

    class SendsItself(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    return SendsItself()


def test_only_complete_checkpoints_are_resumed_from(tmp_path, caplog):
    trainer = searcher(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    newest = tmp_path / "checkpoint-4"
    assert newest_checkpoint(tmp_path) == str(newest)
    assert not (tmp_path / ASIDE).exists()
    state = (newest / "trainer_state.json").read_text()
    (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    assert not is_complete(newest)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_of_the_same_step_is_replaced_and_the_best_one_keeps_its_name(tmp_path):
    written, place = tmp_path / ASIDE / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, text in ((place, "old"), (written, "new")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    state = TrainerState(best_model_checkpoint=str(written))
    move_into_place(written, place, state)
    assert (place / "weights").read_text() == "new"
    assert state.best_model_checkpoint == str(place)
    assert json.loads((place / "trainer_state.json").read_text())["best_model_checkpoint"] == str(place)
    assert not list((tmp_path / ASIDE).iterdir())
    move_into_place(written, place, state)  # another machine was faster
    assert (place / "weights").read_text() == "new"
