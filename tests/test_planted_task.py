"""A search led by data finds the units that were made useless before dense training; the published recipe does not."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import planted_task


@pytest.fixture(scope="module")
def planted():
    units = planted_task.plant(seed=4)
    return units, planted_task.train_dense(units, seed=4, steps=1000)


@pytest.mark.slow
def test_ours_removes_the_useless_and_keeps_the_useful(planted):
    units, model = planted
    result = planted_task.run("ours", units, model, seed=4, steps=500)
    assert result["useless_removed"] >= 95
    assert result["useful_kept"] >= 95
    assert result["top1_after_cut"] >= result["dense_top1"] - 1.5
    assert result["macs_share"] <= result["target"]


@pytest.mark.slow
def test_paper_preset_meets_the_budget_but_is_not_led_by_the_data(planted):
    units, model = planted
    result = planted_task.run("paper", units, model, seed=4, steps=500)
    assert 0.98 * result["target"] <= result["macs_share"] <= result["target"]
    assert result["useless_removed"] < 70
