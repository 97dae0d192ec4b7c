"""A plan counts as `count_macs` does, within the limits of the space, and no file remains."""

import pytest
import torch
from factories import search_config, tiny_model
from runs import QUICK, arguments

from ofb_hf import cli, compress, count_macs, count_params, install_bi_masks
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.frozen import compression
from ofb_hf.search.first_choice import images_to_choose_by
from ofb_hf.search.rewriting import as_bi_masks
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.inputs import load_for_counting
from ofb_hf.workflow.plan import describe_space
from ofb_hf.workflow.trial import TrialSearch

PLAN = [*QUICK[:3], "--per_device_train_batch_size", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make an empty working directory, also for temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def refusal(capsys, *words):
    """Return the last line that `ofb-hf plan` prints when it refuses."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *words, *PLAN])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_counts_are_those_of_the_networks(family, checkpoint, swin_checkpoint, here, capsys):
    folder, dense = {"vit": checkpoint, "swin": swin_checkpoint}[family], tiny_model(family)
    plan = cli.plan(
        [
            str(folder),
            "--target_macs",
            "0.8,0.6",
            "--num_images",
            "100",
            "--num_train_epochs",
            "7",
            *PLAN,
        ]
    )
    assert list(here.iterdir()) == []
    printed = capsys.readouterr().out
    assert plan["dense"] == {"macs": count_macs(dense), "params": count_params(dense)}
    assert list(plan["budgets"]) == ["target_macs-0.8", "target_macs-0.6"]
    for share, budget in zip((0.8, 0.6), plan["budgets"].values(), strict=True):
        small = compress(
            install_bi_masks(
                dense, as_bi_masks(default_config(dense.config, target_macs=share), dense.config)
            )
        )
        assert (budget["macs"], budget["params"]) == (count_macs(small), count_params(small))
        assert budget["macs"] <= budget["target"] == int(share * count_macs(dense))
        # epochs x batches of two images; every step is one after the choice
        assert budget["seconds"] == pytest.approx(7 * 50 * budget["after"])
        assert min(budget["before"], budget["after"]) > 0
        assert {f"{budget[what]:,}" for what in ("target", "macs", "params")} <= set(
            printed.split()
        )
    assert plan["trial"]["peak_bytes"] > 2**20


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("what", ["target_macs", "target_params"])
def test_the_smallest_budget_is_the_smallest_that_is_accepted(family, what):
    dense = tiny_model(family)
    space = describe_space(dense, search_config(family, **{what: 0.9}))
    supernet = install_bi_masks(dense, search_config(family, **{what: space["share"]}))
    smallest = compress(supernet)
    assert (space["macs"], space["params"]) == (count_macs(smallest), count_params(smallest))
    with pytest.raises(UnreachableBudgetError):
        install_bi_masks(dense, search_config(family, **{what: space["share"] - 2e-4}))


def test_the_space_is_counted_by_choices():
    tied = describe_space(tiny_model("vit"), search_config("vit", uniform_across_layers=True))
    free = describe_space(tiny_model("vit"), search_config("vit"))
    # 4 widths, 3 x 3 attentions and 4 MLPs in two layers.
    assert (free["choices"], free["candidates"], free["subnets"]) == (
        5,
        4 + 2 * 9 + 2 * 4,
        4 * 9**2 * 4**2,
    )
    assert (tied["choices"], tied["candidates"], tied["subnets"]) == (3, 4 + 9 + 4, 4 * 9 * 4)


def test_an_impossible_plan_is_refused_with_an_explanation(checkpoint, here, capsys):
    assert "smallest subnet of the search space" in refusal(
        capsys, str(checkpoint), "--target_macs", "0.9,0.001"
    )
    assert "smallest subnet of the search space" in refusal(
        capsys, str(checkpoint), "--target_params", "0.001"
    )
    assert "--model_name_or_path is missing" in refusal(capsys)
    assert "--num_images is 0" in refusal(capsys, str(checkpoint), "--num_images", "0")
    assert "cannot load an image classifier" in refusal(capsys, str(here / "nothing"))
    assert list(here.iterdir()) == []


def test_a_named_shape_needs_no_file_at_all(here, capsys):
    plan = cli.plan(
        ["digits_vit", "--num_labels", "10", "--max_steps", "30", "--num_images", "120", *PLAN]
    )
    assert plan["dense"]["macs"] == 2_389_120
    assert plan["trial"]["epochs"] == 0.5
    assert "digits_vit: 2,389,120 MACs" in capsys.readouterr().out
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_trial_step_is_a_step_of_the_search(family, here):
    dense = tiny_model(family)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    trial = TrialSearch(dense, arguments(here / "run"), search_config(family, target_macs=0.6))
    supernet = trial.trainer.supernet
    weights, alpha = supernet.model.classifier.weight.clone(), supernet.bi_masks[0].alpha.clone()
    loss = trial.step(trial.batch(3))
    assert torch.isfinite(loss)
    parts = trial.trainer._parts
    # all that a step can cost is on
    assert all(parts[name] != 0 for name in ("task", "pmim", "flops", "one_hot"))
    assert not torch.equal(weights, supernet.model.classifier.weight)
    assert not torch.equal(alpha, supernet.bi_masks[0].alpha)
    assert supernet.decisions.num_active_candidates == supernet.space.num_candidates
    trial.settle()
    assert count_macs(supernet.config) <= supernet.target
    assert torch.isfinite(trial.step(trial.batch(3)))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not (here / "run").exists()


def test_the_peak_of_memory_is_also_that_of_the_fit(checkpoint, here, monkeypatch):
    fits = []
    original = compression.fit_

    def noted(small, dense, subnet, batches, **options):
        fits.append(sum(map(len, batches)))
        return original(small, dense, subnet, batches, **options)

    monkeypatch.setattr(compression, "fit_", noted)
    cli.plan([str(checkpoint), "--target_macs", "0.6,0.4", "--num_images", "100", *PLAN])
    # of the first budget, as a search has them
    assert fits == [images_to_choose_by(load_for_counting(str(checkpoint), None))]
