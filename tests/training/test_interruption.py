"""A search that is terminated or interrupted saves a checkpoint and resumes to the same result."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from invariants import assert_equal_states
from runs import finish, results, searcher, start_search
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from watched import OPTIONS, Watched

from ofb_hf.training.checkpoints import newest_checkpoint
from ofb_hf.training.interruption import Interruption, TrainingInterrupted, shield_workers


def latest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    newest = newest_checkpoint(folder)
    return int(newest.rpartition("-")[2]) if newest else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.thorough),
        (signal.SIGINT, 1),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.thorough),
    ],
    ids=["TERM", "INT", "TERM-2", "INT-2"],
)
def test_a_signal_saves_a_checkpoint_and_the_search_goes_on_from_it(tmp_path, number, ranks):
    """Sent to every process, as clusters do, in the middle of an epoch of 16 steps, while loaders
    have workers."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir(), stopped.mkdir()
    arguments = {
        "save_strategy": "no",
        "dataloader_num_workers": 1,
        "dataloader_multiprocessing_context": "fork",  # starts much faster
        "per_device_train_batch_size": 2 // ranks,
    }
    options = OPTIONS | {"arguments": arguments}
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


class Sends(TrainerCallback):
    """Sends SIGTERM to its own process at one event of a step."""

    def __init__(self, step: int, event: str = "on_step_begin"):
        self.step = step - 1 if event == "on_step_begin" else step
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_in_a_program_of_ones_own_ends_training_and_gives_the_signals_back(tmp_path):
    trainer = searcher(tmp_path, max_steps=5)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer.add_callback(Sends(3))
    with pytest.raises(
        TrainingInterrupted, match=r"stopped by SIGTERM after step 3 of 5.*checkpoint-3"
    ) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert trainer.state.global_step == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the trainer of a search with these settings that nothing interrupts; the same settings
    are searched with once."""
    finished = {}

    def search(**settings):
        key = tuple(settings.items())
        if key not in finished:
            finished[key] = searcher(tmp_path_factory.mktemp("straight"), **settings)
            finished[key].train()
        return finished[key]

    return search


@pytest.mark.slow
@pytest.mark.parametrize(
    "event", ["on_step_begin", "on_step_end", "on_log", "on_epoch_end", "on_evaluate"]
)
def test_a_signal_in_the_last_step_is_not_lost(tmp_path, straight, event):
    """Not even while the last evaluation runs; nothing is left to train afterwards."""
    settings = {"max_steps": 4, "eval_strategy": "epoch"}
    stopped = searcher(tmp_path / "stopped", **settings)
    stopped.add_callback(Sends(4, event))
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    resumed = searcher(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint="auto")
    expected = straight(**settings).compress().state_dict()
    assert_equal_states(expected, resumed.compress().state_dict())


def test_a_signal_that_comes_too_late_takes_its_usual_course(tmp_path):
    trainer = searcher(tmp_path, max_steps=2)
    trainer.add_callback(Sends(2, "on_train_end"))
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 6])
@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_a_signal_does_not_disturb_what_belongs_to_the_end_of_an_epoch(
    tmp_path, straight, step, strategy
):
    """In the middle and at the end of an epoch (4 steps), with evaluation that draws random
    numbers."""
    settings = {
        "max_steps": 8,
        "eval_strategy": "epoch",
        "save_strategy": strategy,
        "family": "swin",
    }
    settings |= {"metric_for_best_model": "eval_loss"} if strategy == "best" else {}
    stopped = searcher(tmp_path / "stopped", **settings)
    stopped.add_callback(Sends(step))
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    assert newest_checkpoint(tmp_path / "stopped") == str(
        tmp_path / "stopped" / f"checkpoint-{step}"
    )
    resumed = searcher(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint="auto")
    expected = straight(**settings)
    evaluated = [
        [row["step"] for row in t.state.log_history if "eval_loss" in row]
        for t in (expected, resumed)
    ]
    assert evaluated[0] == evaluated[1] == [4, 8]
    assert_equal_states(expected.compress().state_dict(), resumed.compress().state_dict())


def test_a_second_interrupt_stops_at_once_unless_it_is_the_first_passed_on(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def interrupt_thrice():
        with Interruption():
            for wait in (0.0, 0.5, 1.0):
                clock[0] += wait
                signal.raise_signal(signal.SIGINT)
            pytest.fail("the third one should have stopped it")

    # pytest's own workers ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_thrice()
    finally:
        signal.signal(signal.SIGINT, before)
    assert clock == [101.5]


class SlowImages:
    """Images that take their time."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.05)
        return index


@pytest.mark.parametrize("prepared", [False, True])
def test_workers_obey_their_parent_only(prepared):
    loader = DataLoader(SlowImages(), num_workers=1, persistent_workers=True)
    loader = shield_workers(Accelerator(cpu=True).prepare(loader) if prepared else loader)
    before = {child.pid for child in psutil.Process().children()}
    batches = iter(loader)
    next(batches)
    (worker,) = [child for child in psutil.Process().children() if child.pid not in before]
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    assert len(list(batches)) == 7
    assert worker.is_running()
    assert shield_workers(loader).worker_init_fn.args == (None,)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) is not None or not worker.is_running()
