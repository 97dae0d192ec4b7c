"""Baselines end under the same budget as a search, and each does what its name says."""

import math

import pytest
import torch
from factories import AWKWARD, FAMILIES, OURS, search_config, tiny_images, tiny_model
from invariants import assert_equal_states
from torch.nn import functional as F

from ofb_hf import count_macs, count_params
from ofb_hf.choice import baselines
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.families.registry import describe
from ofb_hf.pruning.surgery import slice_model

both_families = pytest.mark.parametrize("family", FAMILIES)
CHOICES = {
    "l1": lambda model, config: baselines.pruned_subnet(
        model, config, baselines.magnitude_scores(model)
    ),
    "uniform": lambda model, config: baselines.uniform_subnet(
        model, config, baselines.magnitude_scores(model)
    ),
    "random": lambda model, config: baselines.random_subnet(model, config, seed=3),
}


@both_families
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "budget",
    [
        {"target_macs": 0.6},
        {"target_macs": 0.35},
        {"target_params": 0.5},
        {"target_macs": 0.25, "search_depth": True},
    ],
)
def test_the_budget_holds_and_the_subnet_can_be_cut(family, choice, budget):
    model, config = tiny_model(family), search_config(family, **budget)
    subnet = CHOICES[choice](model, config)
    count = count_params if "target_params" in budget else count_macs
    target = config.target(count(model))
    small = slice_model(model, subnet)
    assert_equal_states(
        small.state_dict(), slice_model(OURS[family].from_dense(model), subnet).state_dict()
    )
    assert count(small) == count(model, subnet) <= target
    assert count(small) >= 0.9 * target


@both_families
def test_taylor_scores_are_squared_gradients_of_a_gate_on_every_unit(family):
    """Each unit is scaled by 1 + epsilon, by hand, and the loss differentiated numerically."""
    model = tiny_model(family, dtype=torch.float64).eval()
    images, labels = (
        tiny_images(count=3, size=model.config.image_size, dtype=torch.float64),
        torch.tensor([0, 1, 2]),
    )
    scores = baselines.taylor_scores(model, [{"pixel_values": images, "labels": labels}] * 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = dict(model.named_parameters())

    @torch.no_grad()
    def loss(submodule, unit, factor):
        for slot in submodule.slots:
            if slot.gated and slot.parameter in names:
                names[slot.parameter].select(slot.axis, unit).mul_(factor)
        value = F.cross_entropy(model(images).logits, labels).item()
        model.load_state_dict(state)
        return value

    for submodule in describe(model.config).submodules[:4]:
        for unit in (0, math.prod(submodule.shape) - 1):
            slope = (loss(submodule, unit, 1 + 1e-3) - loss(submodule, unit, 1 - 1e-3)) / 2e-3
            found = scores[submodule.name].flatten()[unit].item()
            assert found == pytest.approx(2 * slope**2, rel=2e-2, abs=1e-9), (submodule.name, unit)
    assert all(parameter.grad is None for parameter in model.parameters())


@both_families
def test_pruning_keeps_the_best_units(family):
    model, config = tiny_model(family), search_config(family, target_macs=0.5)
    scores = {s.name: torch.rand(s.shape) for s in describe(model.config).submodules}
    subnet = baselines.pruned_subnet(model, config, scores)
    for name, kept in subnet.kept.items():
        if not isinstance(kept, dict):
            rest = [unit for unit in range(len(scores[name])) if unit not in kept]
            assert not rest or scores[name][list(kept)].min() >= scores[name][rest].max()
            continue
        for head, channels in kept.items():
            rest = [channel for channel in range(scores[name].shape[1]) if channel not in channels]
            assert (
                not rest
                or scores[name][head][list(channels)].min() >= scores[name][head][rest].max()
            )


def test_what_matters_more_keeps_more():
    model = tiny_model("vit")
    config = search_config("vit", target_macs=0.5, search_embedding=False)
    scores = {s.name: torch.rand(s.shape) for s in describe(model.config).submodules}
    favoured = {
        name: score * (100 if name == "layers.1.mlp" else 1) for name, score in scores.items()
    }
    sizes = [
        baselines.pruned_subnet(model, config, s).size("layers.1.mlp") for s in (scores, favoured)
    ]
    assert sizes[0] < sizes[1] == max(AWKWARD["vit"]["mlp_candidates"])


def test_uniform_widths_are_as_equal_as_candidates_allow():
    model = tiny_model("vit", intermediate_size=64, hidden_size=64, num_attention_heads=4)
    fine = {"embedding_candidates": list(range(1, 65)), "mlp_candidates": list(range(1, 65))}
    heads = {"head_candidates": [1, 2, 3, 4], "head_dim_candidates": list(range(1, 17))}
    config = search_config("vit", target_macs=0.4, **(fine | heads))
    subnet = baselines.uniform_subnet(model, config, baselines.magnitude_scores(model))
    shares = [_units(size) / 64 for size in subnet.sizes.values()]
    assert max(shares) - min(shares) < 0.05


def _units(size):
    return math.prod(size) if isinstance(size, tuple) else size


def test_draws_differ_by_seed_in_sizes_and_in_units():
    model, config = tiny_model("vit"), search_config("vit", target_macs=0.5)
    draws = [baselines.random_subnet(model, config, seed) for seed in range(12)]
    assert baselines.random_subnet(model, config, 0) == draws[0]
    assert len({str(draw.sizes) for draw in draws}) > 6
    assert len({str(draw.kept) for draw in draws}) == len(draws)


def test_what_cannot_be_chosen_is_refused():
    model = tiny_model("vit")
    with pytest.raises(UnreachableBudgetError, match="below the smallest subnet"):
        baselines.random_subnet(model, search_config("vit", target_macs=0.01), 0)
    with pytest.raises(ValueError, match="uniform_across_layers is True"):
        baselines.random_subnet(model, search_config("vit", uniform_across_layers=True), 0)
