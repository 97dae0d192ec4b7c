"""The guard that keeps the best of a training: before, after, or the average."""

import copy

import pytest
import torch
from factories import search_config, tiny_images, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from runs import arguments, rows

from ofb_hf import OFBTrainer
from ofb_hf.training.distillation import DistillationTrainer
from ofb_hf.training.guard import Outcome, best_version


def outcome(correct, losses=None):
    correct = torch.tensor(correct, dtype=torch.float64)
    losses = torch.ones_like(correct) if losses is None else torch.tensor(losses).double()
    return Outcome(correct, losses)


def trainer(folder, model, guard=None, **changes):
    data = {"train_dataset": rows(), "eval_dataset": rows(8, seed=5)}
    changes = {"max_steps": 4, "learning_rate": 1e-3} | changes
    return DistillationTrainer(model, arguments(folder, **changes), guard_dataset=guard, **data)


def labeled_by(model, count=40):
    """Images that a model classifies without a mistake."""
    images = tiny_images(count, model.config.image_size, seed=9)
    with torch.no_grad():
        labels = model.eval()(images).logits.argmax(-1)
    return [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]


def test_a_clear_difference_of_accuracy_decides():
    before = outcome([1] * 60 + [0] * 40, [9.0] * 100)
    after = outcome([1] * 90 + [0] * 10, [9.5] * 100)
    name, shares = best_version({"before": before, "after": after})
    assert name == "after"
    assert shares == {"before": 0.6, "after": 0.9}


def test_within_one_standard_error_the_loss_decides():
    # 3 images the one way, 2 the other: a difference of 1 with a standard error of 2.2
    before = outcome([1, 1, 1, 0, 0] + [1] * 95, [1.0] * 100)
    after = outcome([0, 0, 0, 1, 1] + [1] * 95, [0.9] * 100)
    assert best_version({"before": before, "after": after})[0] == "after"
    after = outcome([0, 0, 0, 1, 1] + [1] * 95, [1.1] * 100)
    assert best_version({"before": before, "after": after})[0] == "before"


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 9)), min_size=1, max_size=40))
def test_nothing_far_behind_is_kept(images):
    one = outcome([a for a, _, _ in images], [loss for _, _, loss in images])
    other = outcome([b for _, b, _ in images], [9.0 for _ in images])
    name, shares = best_version({"one": one, "other": other})
    difference = abs(shares["one"] - shares["other"])
    disagreements = sum(a != b for a, b, _ in images) / len(images)
    if difference**2 > disagreements / len(images):
        assert shares[name] == max(shares.values())


def test_a_training_that_destroys_is_undone(tmp_path, caplog):
    model = tiny_vit(num_labels=3)
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, model, labeled_by(model), learning_rate=1.0)
    run.train()
    assert run.guard.kept == "before"
    assert run.guard.top1["before"] == 100
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert "kept the weights from before the training" in caplog.text


def test_a_training_that_gains_is_kept(tmp_path):
    better = tiny_vit(seed=3, num_labels=3)
    guard = labeled_by(better)
    model = tiny_vit(seed=3, num_labels=3)
    with torch.no_grad():
        model.classifier.weight.neg_()
    run = trainer(tmp_path, model, guard, learning_rate=0.05, max_steps=30)
    run.train_dataset = guard
    run.train()
    assert run.guard.kept == "after"
    assert run.guard.top1["after"] > run.guard.top1["before"]


def test_the_average_is_one_of_three(tmp_path):
    model = tiny_vit(num_labels=3)
    run = trainer(tmp_path, model, labeled_by(model), ema_decay=0.5)
    run.train()
    assert set(run.guard.top1) == {"before", "after", "average"}


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_resumed_training_knows_the_weights_from_before(tmp_path, ema_decay):
    start = tiny_vit(num_labels=3)
    guard = labeled_by(copy.deepcopy(start))
    settings = {"learning_rate": 1.0, "save_strategy": "steps", "save_steps": 2}
    settings |= {"ema_decay": ema_decay}
    whole = copy.deepcopy(start)
    trainer(tmp_path / "a", whole, guard, **settings).train()
    other = tiny_vit(seed=8, num_labels=3)
    resumed = trainer(tmp_path / "b", other, guard, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.guard.kept == "before"
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize("preset", ["default", "bi_mask"])
def test_a_search_is_guarded_from_its_choice_on(tmp_path, preset):
    config = search_config(preset=preset, target_macs=0.6)
    model = tiny_vit(num_labels=3)
    run = OFBTrainer(
        model.train(),
        arguments(tmp_path, max_steps=8, learning_rate=0.3),
        config,
        train_dataset=rows(),
        guard_dataset=labeled_by(copy.deepcopy(model)),
    )
    run.train()
    assert run.guard.kept is not None
    assert run.guard.top1[run.guard.kept] >= run.guard.top1["before"] - 15
    names = {name for name, _ in run.supernet.named_parameters()}
    assert set(run.guard._before) == names


def test_a_search_that_chooses_at_its_end_has_nothing_to_compare(tmp_path):
    run = OFBTrainer(
        tiny_vit(num_labels=3).train(),
        arguments(tmp_path, max_steps=3),
        search_config(preset="paper", target_macs=0.6),
        train_dataset=rows(),
        guard_dataset=rows(8, seed=4),
    )
    run.train()
    assert run.guard.kept is None
