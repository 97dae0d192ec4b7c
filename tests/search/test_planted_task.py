"""A search led by data finds the units that were made useless before dense training; the published
recipe does not."""

import copy
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from ofb_hf import OFBTrainer, ViTBiMaskConfig, count_macs

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import planted_task


@pytest.fixture(scope="module")
def planted():
    units = planted_task.plant(seed=4)
    return units, planted_task.train_dense(units, seed=4, steps=600)


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "removed"), [(0.0, 95), (0.1, 93)])
def test_ours_removes_the_useless_and_keeps_the_useful(planted, noise, removed):
    """Useless units have no gradient at all, or a little one: then some fill what is left of the
    budget."""
    units, model = planted[0], copy.deepcopy(planted[1])
    torch.manual_seed(0)
    planted_task.CutOff(model, units).disturb_(noise)
    result = planted_task.run("default", units, model, seed=4, steps=300)
    assert result["useless_removed"] >= removed
    assert result["useful_kept"] >= 95
    assert result["top1_after_cut"] >= result["dense_top1"] - 1.5
    assert result["macs_share"] <= result["target"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_blocks_that_add_nothing_are_left_out_and_no_others(seed):
    useless = planted_task.plant_blocks()
    model = planted_task.train_dense(useless, seed, steps=250, layers=planted_task.BLOCKS)
    result = planted_task.run("default", useless, model, seed, steps=150, search_depth=True)
    assert (
        set(result["left_out"])
        == set(useless.kept)
        == {*("layers.3.attention", "layers.3.mlp", "layers.5.attention", "layers.5.mlp")}
    )
    assert result["top1_after_cut"] >= result["dense_top1"] - 1.5
    assert result["macs_share"] <= result["target"]


@pytest.mark.slow
def test_paper_preset_meets_the_budget_but_is_not_led_by_the_data(planted):
    units, model = planted
    result = planted_task.run("paper", units, model, seed=4, steps=120)
    assert 0.98 * result["target"] <= result["macs_share"] <= result["target"]
    assert result["useless_removed"] < 70


def subnets(model, rows, target, seeds, steps=100):
    """What a short search keeps that looks at much data first: one flat set of (submodule, unit)
    per seed."""
    found = []
    for seed in seeds:
        phases = {
            "importance_hold": 0.5,
            "one_hot_begin": 0.6,
            "one_hot_end": 0.7,
            "retire_begin": 0.65,
            "settle_at": 0.8,
        }
        config = ViTBiMaskConfig(
            preset="bi_mask", target_macs=target, search_embedding=False, pmim=False, **phases
        )
        with tempfile.TemporaryDirectory() as folder:
            args = planted_task.arguments(folder, steps, seed, learning_rate=5e-4)
            trainer = OFBTrainer(
                model, args, config, train_dataset=rows, data_collator=planted_task.augment
            )
            trainer.train()
        kept = trainer.read_subnet()
        found.append(
            {(name, unit) for name in kept.kept for unit in planted_task.useful_units(kept, name)}
        )
    return found


def overlaps(some, others):
    """Mean share of units that two searches have in common, over all pairs of different
    searches."""
    pairs = [(a, b) for a in some for b in others if a is not b]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


@pytest.mark.slow
def test_the_subnet_depends_on_the_labels_more_than_on_the_seed(planted):
    """Under a budget that not even all useful units fit into."""
    units, model = planted
    rows = planted_task.digits(train=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [
        row | {"labels": rows[other]["labels"]} for row, other in zip(rows, order, strict=True)
    ]
    target = 0.6 * count_macs(model, units) / count_macs(model)
    true, false = (subnets(model, data, target, seeds=(0, 1, 2)) for data in (rows, shuffled))
    assert overlaps(true, true) > overlaps(true, false) + 0.02


@pytest.mark.slow
def test_another_budget_is_another_subnet_and_not_the_same_one_scaled(planted):
    """Where there is room for it, width comes back unevenly."""
    _, model = planted
    rows = planted_task.digits(train=True)
    (small,), (large,) = (subnets(model, rows, target, seeds=(0,)) for target in (0.4, 0.7))
    assert len(large) > len(small)
    gains = []
    for name in {name for name, _ in small}:
        before, after = (sum(1 for other, _ in units if other == name) for units in (small, large))
        gains.append(after / before)
    assert max(gains) > 1.3 * min(gains)
