"""Compression with frozen weights: the budget, the errors it promises, and what it must not
depend on."""

import copy
import doctest
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from factories import (
    randomize_weights_,
    swin_shapes,
    tiny_images,
    tiny_model,
    tiny_swin,
    tiny_vit,
    vit_shapes,
)
from hypothesis import HealthCheck, given, settings
from runs import finish, start
from torch.nn import functional as F

from ofb_hf import count_macs, count_params
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.families.registry import describe
from ofb_hf.families.subnet import SubnetSpec, all_units
from ofb_hf.frozen.compression import (
    TOKENS_PER_INPUT,
    FrozenCompressor,
    compress_frozen,
    divergence,
    frozen_config,
    images_to_fit,
)
from ofb_hf.pruning.surgery import slice_model

both_families = pytest.mark.parametrize("family", ["vit", "swin"])


def batches_of(count=32, **options):
    return tiny_images(count, **options).split(8)


@both_families
@pytest.mark.parametrize("budget", [{"target_macs": 0.5}, {"target_params": 0.6}])
def test_the_result_costs_what_was_asked_and_is_cut_from_the_parent(family, budget):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    result = compress_frozen(model, tiny_images(24), **budget)
    (name, fraction), count = (
        *budget.items(),
        {"target_macs": count_macs, "target_params": count_params},
    )
    cost, dense = count[name](result.model), count[name](model)
    assert 0.9 * fraction * dense <= cost <= fraction * dense
    cut = slice_model(result.dense, result.subnet)
    assert {k: v.shape for k, v in cut.state_dict().items()} == {
        k: v.shape for k, v in result.model.state_dict().items()
    }
    assert cut.config.to_dict() == result.model.config.to_dict()
    # The parent computes what the model does, and the model was left alone.
    images = tiny_images(4, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(
            result.dense(images).logits, model(images).logits, atol=1e-4, rtol=1e-4
        )
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    assert not result.model.training


@both_families
def test_curves_rise_from_nothing(family):
    result = compress_frozen(tiny_model(family), tiny_images(24), target_macs=0.5)
    searched = {s.name for s in describe(result.dense.config).submodules if s.kind != "embedding"}
    assert searched <= set(result.curves)
    for name, curve in result.curves.items():
        full = max(curve.errors, key=math.prod)
        assert curve.errors[full] == pytest.approx(0.0, abs=1e-9), name
        assert all(error >= 0 for error in curve.errors.values())
        if len(full) == 1:
            errors = [curve.errors[size] for size in sorted(curve.errors, reverse=True)]
            # Fitted everywhere but measured where the loss minds it: nearly monotonous.
            assert errors[-1] == max(errors)


def test_units_that_do_nothing_go_first_and_cost_nothing():
    model = tiny_vit()
    mlp = model.get_submodule("vit.layers.1.mlp")
    with torch.no_grad():
        mlp.fc2.weight[:, 8:] = 0.0
    config = frozen_config(model.config, target_macs=0.9)
    compressor = FrozenCompressor(model, batches_of(), space=config)
    curve = compressor.curves["layers.1.mlp"]
    smallest_free = min(size for (size,) in curve.errors if size >= 8)
    full = max(size for (size,) in curve.errors)
    assert curve.errors[(smallest_free,)] < 1e-3 * curve.errors[(0,)]
    assert smallest_free < full
    assert set(range(8)) <= set(curve.remaining(smallest_free))


@both_families
@pytest.mark.parametrize("basis", ["given", "heads", "equivalent"])
def test_fitting_helps(family, basis):
    model = tiny_model(family)
    config = frozen_config(model.config, target_macs=0.6)
    result = FrozenCompressor(model, batches_of(96), space=config, basis=basis).compress(config)
    cut = slice_model(result.dense, result.subnet).eval()
    others = batches_of(64, seed=7)
    fitted = divergence(result.model, result.dense, others)
    assert fitted < divergence(cut, result.dense, others)


def test_the_given_basis_cuts_whole_heads_and_no_stream():
    model = tiny_vit()
    result = compress_frozen(model, tiny_images(24), target_macs=0.6, basis="given")
    sizes = describe(model.config).sizes
    for name, size in result.subnet.shapes.items():
        if len(size) == 2:
            assert size == (0, 0) or size[1] == sizes[name][1]
    assert result.subnet.size("embeddings") == sizes["embeddings"][0]


def test_one_measuring_serves_every_budget():
    model, batches = tiny_vit(), batches_of()
    space = frozen_config(model.config, search_tokens=False)
    compressor = FrozenCompressor(model, batches, space=space)
    costs = []
    for fraction in (0.7, 0.4):
        config = frozen_config(model.config, target_macs=fraction, search_tokens=False)
        several = compressor.compress(config)
        alone = FrozenCompressor(model, batches, space=config).compress(config)
        assert several.subnet == alone.subnet
        for name, value in several.model.state_dict().items():
            torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=0, atol=0)
        costs.append(count_macs(several.model))
    assert costs == sorted(costs, reverse=True)


def test_batches_only_group_the_images():
    """Up to the targets, which are drawn by batch: the basis does not see them."""
    model = tiny_vit()
    images = tiny_images(24)
    fitted = []
    for size in (6, 8):
        config = frozen_config(model.config, target_macs=0.6, search_tokens=False)
        compressor = FrozenCompressor(model, images.split(size), space=config)
        fitted.append(compressor.dense.state_dict())
    for name, value in fitted[0].items():
        torch.testing.assert_close(value, fitted[1][name], atol=1e-4, rtol=1e-3)


@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(vit_shapes())
def test_any_vit_meets_its_budget(shape):
    changes, _ = shape
    assert _cost_of_seventy_percent(tiny_vit(**changes)) <= 0.7


@settings(deadline=None, max_examples=4, suppress_health_check=list(HealthCheck))
@given(swin_shapes())
def test_any_swin_meets_its_budget(shape):
    changes, _ = shape
    assert _cost_of_seventy_percent(tiny_swin(**changes)) <= 0.7


def _cost_of_seventy_percent(model):
    """Compress to 0.7 of the MACs and return the fraction; 0 if no subnet is that small."""
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, model.config.num_channels, height, width, generator=generator)
    dense = count_macs(model)
    try:
        small = compress_frozen(model, images, target_macs=0.7).model
    except UnreachableBudgetError as error:
        return 0.0 if error.smallest > 0.7 * dense else 1.0
    with torch.no_grad():
        finite = bool(small(images).logits.isfinite().all())
    return count_macs(small) / dense if finite else math.inf


def test_tokens_are_reduced_while_fitting():
    model = tiny_vit(hidden_size=40, image_size=24, num_hidden_layers=4)
    images = tiny_images(32, size=24)
    result = compress_frozen(model, images, target_macs=0.35)
    assert result.subnet.token_schedule is not None
    assert result.model.config.token_schedule == result.subnet.token_schedule
    others = tiny_images(16, size=24, seed=3).split(8)
    cut = slice_model(result.dense, result.subnet).eval()
    assert divergence(result.model, result.dense, others) < divergence(cut, result.dense, others)


@both_families
def test_features_decide_without_a_head(family):
    model = tiny_model(family, num_labels=0)
    result = compress_frozen(model, tiny_images(32), target_macs=0.6)
    assert result.model.config.num_labels == 0
    images = tiny_images(8, seed=2)
    with torch.no_grad():
        features, wanted = result.model(images).logits, model(images).logits
    # They are of the same width, and near the given ones.
    assert F.cosine_similarity(features, wanted).mean() > 0.8


def test_half_precision_is_kept():
    model = tiny_vit().to(torch.bfloat16)
    result = compress_frozen(model, tiny_images(16), target_macs=0.6)
    assert result.model.dtype == torch.bfloat16
    assert result.dense.dtype == torch.float32
    wide = compress_frozen(tiny_vit().to(torch.bfloat16).float(), tiny_images(16), target_macs=0.6)
    assert wide.subnet == result.subnet


@pytest.mark.slow
@both_families
def test_two_ranks_give_the_network_of_one(tmp_path, family):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        status, said = finish(start("compress_process.py", str(folder), family, ranks=ranks))
        assert status == 0, said[-3000:]
    single, *others = [
        (folder / f"rank_{rank}")
        for folder, rank in ((tmp_path / "1", 0), (tmp_path / "2", 0), (tmp_path / "2", 1))
    ]
    wanted = safetensors.torch.load_file(f"{single}.safetensors")
    for other in others:
        assert Path(f"{other}.json").read_text() == Path(f"{single}.json").read_text()
        found = safetensors.torch.load_file(f"{other}.safetensors")
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)


def test_bad_input_is_refused_by_name():
    model = tiny_vit()
    with pytest.raises(
        ValueError, match=r"basis is 'rotated'; allowed are 'given', 'heads', 'equivalent'"
    ):
        FrozenCompressor(model, batches_of(), basis="rotated")
    with pytest.raises(ValueError, match="there are no calibration images"):
        FrozenCompressor(model, [])
    with pytest.raises(UnreachableBudgetError, match="below the smallest subnet"):
        compress_frozen(model, tiny_images(8), target_macs=0.001)
    randomize_weights_(model)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="are not finite"):
        compress_frozen(model, tiny_images(8), target_macs=0.5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 16, 16), ValueError, "there are no calibration images"),
        ([torch.zeros(0, 3, 16, 16)], ValueError, "none in the first batch"),
        (torch.zeros(3, 16, 16), ValueError, r"shape \(3, 16, 16\); the model takes \(images, 3"),
        (torch.zeros(4, 1, 16, 16), ValueError, "the model takes"),
        (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), TypeError, "are torch.uint8; give tensors"),
        ([torch.zeros(4, 3, 16, 16).numpy()], TypeError, "are ndarray"),
        ((batch for batch in batches_of()), TypeError, "is a generator; give a tensor"),
    ],
)
def test_images_of_another_kind_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        compress_frozen(tiny_vit(), images, target_macs=0.5)


@pytest.mark.parametrize(
    "changes", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}]
)
def test_outputs_that_are_no_softmax_are_refused(changes):
    with pytest.raises(ValueError, match="probabilities of two or more classes"):
        compress_frozen(tiny_vit(**changes), tiny_images(8), target_macs=0.5)


def test_a_layer_that_reduces_tokens_may_lose_its_mlp():
    """The cut network decides about tokens behind the attention, which is fitted last then."""
    model = tiny_vit()
    compressor = FrozenCompressor(model, batches_of())
    kept = {name: all_units(shape) for name, shape in describe(model.config).sizes.items()}
    kept["layers.0.mlp"] = ()
    subnet = SubnetSpec(kept, [[17, 10], [10, 2]], "equivalent")
    small = compressor._fitted(subnet, batches_of())
    assert small.config.token_schedule == [[17, 10], [10, 2]]
    assert divergence(small, compressor.dense, batches_of(16, seed=3)) < 0.1


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_how_many_images_are_fitted_depends_on_processes_by_memory_only(family, monkeypatch):
    model = tiny_model(family)
    enough = images_to_fit(model)
    assert images_to_fit(model, 4) == enough
    monkeypatch.setattr("ofb_hf.frozen.compression.MEMORY", 2**15)
    assert images_to_fit(model) < images_to_fit(model, 4) <= enough


def test_the_last_layers_of_a_swin_see_enough_tokens():
    model = tiny_model("swin")
    architecture = describe(model.config)
    widest = max(math.prod(shape) for shape in architecture.sizes.values())
    tokens = images_to_fit(model) * math.prod(architecture.token_grid)
    assert tokens >= TOKENS_PER_INPUT * widest


def test_gradients_may_be_switched_off():
    model, images = tiny_vit(), tiny_images(24)
    wanted = compress_frozen(model, images, target_macs=0.6)
    with torch.no_grad():
        found = compress_frozen(model, images, target_macs=0.6)
    assert found.subnet == wanted.subnet


def test_the_example_of_the_documentation_runs():
    text = compress_frozen.__doc__.replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, "example", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0
