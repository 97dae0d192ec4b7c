"""Trainings that stop and resume: stock models, last steps, best models, averages, checkpoints."""

import shutil
import signal

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from factories import OURS, tiny_model
from invariants import assert_equal_states
from PIL import Image as PILImage
from runs import arguments, rows, searcher
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ofb_hf import ClassifierTrainer
from ofb_hf.data import SeededImages
from ofb_hf.training.checkpoints import ASIDE, is_complete, move_into_place, newest_checkpoint
from ofb_hf.training.interruption import TrainingInterrupted

# Whole runs: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

SAVING = {"save_strategy": "steps", "save_steps": 3}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
BEST |= {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "learning_rate": 0.05,
}
BEST |= {"greater_is_better": True}  # so that it is not simply the last one


def finetuning(folder, model, **changes) -> ClassifierTrainer:
    """A training of a plain classifier on 32 images, 4 steps per epoch."""
    args = arguments(folder, **({"max_steps": 6} | changes))
    return ClassifierTrainer(
        model.train(), args, train_dataset=rows(), eval_dataset=rows(8, seed=5)
    )


def states(trainer):
    """All weights, copied."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


class Stop(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step
        return control


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("stock", [True, False])
def test_training_of_a_plain_classifier_resumes_exactly(tmp_path, family, stock):
    """Stock models are saved under older names of their weights."""

    def model():
        return tiny_model(family) if stock else OURS[family].from_dense(tiny_model(family))

    straight = finetuning(tmp_path / "straight", model(), ema_decay=0.9)
    straight.train()
    cut = finetuning(tmp_path / "cut", model(), ema_decay=0.9, **SAVING)
    cut.add_callback(Stop(3))
    cut.train()
    resumed = finetuning(tmp_path / "cut", model(), ema_decay=0.9, **SAVING)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6
    assert_equal_states(states(straight), states(resumed))


@pytest.mark.parametrize("steps", [6, 8])
def test_resuming_from_the_last_step_trains_no_more(tmp_path, steps):
    """In the middle of an epoch (4 steps) as at its end."""
    first = finetuning(
        tmp_path, tiny_model("vit"), max_steps=steps, save_strategy="steps", save_steps=steps
    )
    first.train()
    again = finetuning(tmp_path, tiny_model("vit"), max_steps=steps)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert_equal_states(states(first), states(again))


def test_auto_starts_from_scratch_where_there_is_nothing_yet(tmp_path):
    trainer = finetuning(tmp_path / "new", tiny_model("vit"), max_steps=2)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_the_best_model_is_what_remains(tmp_path, ema_decay):
    """With an average, the average is evaluated, chosen by, and kept."""
    trainer = finetuning(tmp_path, tiny_model("vit"), ema_decay=ema_decay, **BEST)
    trainer.train()
    losses = {
        row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    }
    best = max(losses, key=losses.__getitem__)
    assert best != 6, "choose settings in which the last step is not the best"
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


class Sends(TrainerCallback):
    """Pretends that SIGTERM came in a step."""

    def __init__(self, trainer, step):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.trainer.interruption._receive(signal.SIGTERM, None)


@pytest.mark.parametrize("step", [5, 6])
def test_a_stopped_training_keeps_its_last_checkpoint_and_the_best_one(tmp_path, step):
    """However few are to be kept; and it is the best of all that remains in the end."""
    settings = BEST | {"save_total_limit": 1}
    straight = finetuning(tmp_path / "straight", tiny_model("vit"), **settings)
    straight.train()
    stopped = finetuning(tmp_path / "stopped", tiny_model("vit"), **settings)
    stopped.add_callback(Sends(stopped, step))
    with pytest.raises(TrainingInterrupted, match=f"checkpoint-{step}"):
        stopped.train()
    assert is_complete(tmp_path / "stopped" / f"checkpoint-{step}")
    resumed = finetuning(tmp_path / "stopped", tiny_model("vit"), **settings)
    resumed.train("auto")
    assert_equal_states(states(straight), states(resumed))


def test_a_signal_in_a_last_step_within_an_epoch_does_not_cost_its_evaluation(tmp_path):
    settings = BEST | {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "greater_is_better": False,
    }
    straight = finetuning(tmp_path / "straight", tiny_model("vit"), **settings)
    straight.train()
    stopped = finetuning(tmp_path / "stopped", tiny_model("vit"), **settings)
    stopped.add_callback(Sends(stopped, 6))
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    resumed = finetuning(tmp_path / "stopped", tiny_model("vit"), **settings)
    resumed.train("auto")
    evaluated = [
        [row["step"] for row in t.state.log_history if "eval_loss" in row]
        for t in (straight, resumed)
    ]
    assert evaluated == [[4, 6], [4, 6]]
    assert_equal_states(states(straight), states(resumed))


def test_where_only_models_are_saved_a_stopped_training_can_still_go_on(tmp_path):
    settings = SAVING | {"save_only_model": True}
    stopped = finetuning(tmp_path, tiny_model("vit"), **settings)
    stopped.add_callback(Sends(stopped, 4))
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    assert stopped.args.save_only_model
    resumed = finetuning(tmp_path, tiny_model("vit"), **settings)
    resumed.train("auto")
    assert resumed._initial_global_step == 4


def test_the_best_model_is_found_again_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first = finetuning("run", tiny_model("vit"), **BEST, save_total_limit=2)
    first.add_callback(Sends(first, 5))
    with pytest.raises(TrainingInterrupted):
        first.train()
    monkeypatch.chdir(tmp_path)
    resumed = finetuning("here/run", tiny_model("vit"), **BEST, save_total_limit=2)
    resumed.train("auto")
    losses = {
        row["step"]: row["eval_loss"] for row in resumed.state.log_history if "eval_loss" in row
    }
    best = max(losses, key=losses.__getitem__)
    assert best < 5, "choose settings in which the best step comes before the interruption"
    assert resumed.state.best_model_checkpoint == f"here/run/checkpoint-{best}"
    assert resumed.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


def test_evaluating_the_average_leaves_the_training_alone(tmp_path):
    runs = []
    for name, changes in (("a", {}), ("b", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = finetuning(tmp_path / name, tiny_model("vit"), ema_decay=0.5, **changes)
        trainer.train()
        runs.append(states(trainer))
    assert_equal_states(*runs)


@pytest.mark.parametrize(
    ("before", "after", "has"), [(None, 0.9, "no weight average"), (0.9, None, "a weight average")]
)
def test_resuming_with_and_without_an_average_is_refused_with_an_explanation(
    tmp_path, before, after, has
):
    finetuning(tmp_path, tiny_model("vit"), max_steps=3, ema_decay=before, **SAVING).train()
    with pytest.raises(ValueError, match=f"ema_decay is {after}.*{has}"):
        finetuning(tmp_path, tiny_model("vit"), ema_decay=after).train(
            resume_from_checkpoint="auto"
        )


def test_a_failed_step_does_not_spoil_the_next_training(tmp_path):
    trainer = finetuning(tmp_path, tiny_model("vit"), max_steps=2)
    broken, trainer.train_dataset = (
        trainer.train_dataset,
        [row | {"pixel_values": row["pixel_values"] * torch.nan} for row in rows()],
    )
    with pytest.raises(FloatingPointError):
        trainer.train()
    trainer.train_dataset = broken
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with complete checkpoints of steps 2 and 4 of a search."""
    folder = tmp_path_factory.mktemp("checkpoints")
    searcher(folder, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.9).train()
    return folder


FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors")
FILES += ("bi_mask_config.json",)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in ("truncated", "missing")]
    + [("ema.safetensors", "truncated")],
)
def test_only_complete_checkpoints_are_resumed_from(checkpoints, tmp_path, name, damage):
    folder = shutil.copytree(checkpoints, tmp_path / "copy")
    assert newest_checkpoint(folder) == str(folder / "checkpoint-4")
    file = folder / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    assert not is_complete(folder / "checkpoint-4")
    assert newest_checkpoint(folder) == str(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-4")
    assert newest_checkpoint(folder) is None


@pytest.mark.parametrize(
    "name", ["checkpoint-²", "checkpoint-backup-99", "checkpoint-", "checkpoint-99.old"]
)
def test_folders_with_other_names_are_no_checkpoints(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints, tmp_path / "copy")
    shutil.copytree(folder / "checkpoint-2", folder / name)
    assert newest_checkpoint(folder) == str(folder / "checkpoint-4")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    written, place = tmp_path / ASIDE / "checkpoint-2", tmp_path / "checkpoint-2"
    for folder, text in ((place, "old"), (written, "new")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    move_into_place(written, place)
    assert (place / "weights").read_text() == "new"
    assert not list((tmp_path / ASIDE).iterdir())
    move_into_place(written, place)  # another machine was faster
    assert (place / "weights").read_text() == "new"


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_between_the_renames_loses_nothing(checkpoints, tmp_path, monkeypatch, moment):
    """There is one checkpoint, and it is being replaced by another one of the same step."""
    folder = shutil.copytree(checkpoints, tmp_path / "copy")
    shutil.rmtree(folder / "checkpoint-2")
    shutil.copytree(folder / "checkpoint-4", folder / ASIDE / "checkpoint-4")
    renames = []

    def rename(*paths):
        renames.append(paths)
        if len(renames) == moment:
            raise KeyboardInterrupt
        shutil.move(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", rename)
        with pytest.raises(KeyboardInterrupt):
            move_into_place(folder / ASIDE / "checkpoint-4", folder / "checkpoint-4")
    assert newest_checkpoint(folder) == str(folder / "checkpoint-4")


def test_workers_that_live_on_see_the_epoch_change():
    pictures = [PILImage.new("RGB", (2, 2), (n, n, n)) for n in range(4)]
    features = Features({"image": Image(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": pictures, "label": [0] * 4}, features=features)
    images = SeededImages(dataset, lambda image: torch.rand(3), "image", "label", seed=0)
    loader = DataLoader(images, 4, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        seen.append(next(iter(loader))["pixel_values"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
