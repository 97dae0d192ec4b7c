"""Bi-masks side by side are what each of them is alone: values, amounts, losses and gradients."""

import copy

import pytest
import torch
from factories import FAMILIES, retire_some_, tiny_supernet
from invariants import assert_close

from ofb_hf.cost.counting import evaluate_terms
from ofb_hf.families.description import heads_of, presence_of, quantities
from ofb_hf.masks.one_hot import one_hot_loss
from ofb_hf.masks.stack import IMPORTANCE_PENALTY

both_families = pytest.mark.parametrize("family", FAMILIES)


def mixed_supernet(family, seed, shrinks, depth=False):
    """Masks in float64, random in all they have, some of them with candidates retired; of many
    shapes if it shrinks."""
    supernet = tiny_supernet(seed, torch.float64, family, search_depth=depth)
    retire_some_(supernet, seed)
    if shrinks:
        supernet.shrink_()
    return supernet


def expected_by_hand(mask):
    """Units, heads and presence of one mask."""
    amounts = {mask.name: mask.expected_size()}
    if mask.is_grid:
        amounts[heads_of(mask.name)] = mask.expected_heads()
    return amounts | {presence_of(mask.name): mask.expected_presence()}


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_losses_are_those_of_each_mask(seed, shrinks, depth, family):
    supernet = mixed_supernet(family, seed, shrinks, depth)
    gates = supernet._stacks.gates(supernet.lam)
    for mask in supernet.bi_masks:
        assert_close(gates[mask.name], mask.prunability(supernet.lam).flatten())
        if mask.may_vanish:
            values = gates[mask.name]
            assert gates[presence_of(mask.name)].item() == (
                values.max().item() if values.numel() else 0
            )
    assert gates.keys() - {mask.name for mask in supernet.bi_masks} == {
        presence_of(mask.name) for mask in supernet.bi_masks if mask.may_vanish
    }
    one_hot = sum(one_hot_loss(mask.alpha, mask.active_candidates) for mask in supernet.bi_masks)
    assert_close(supernet.one_hot_loss(), one_hot)
    penalty = sum(
        IMPORTANCE_PENALTY[mask.kind] * mask.importance().sum() for mask in supernet.bi_masks
    )
    assert_close(supernet.importance_penalty(), penalty)


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sizes_are_those_of_each_mask(seed, depth, family):
    supernet = mixed_supernet(family, seed, seed % 2 == 0, depth)
    names, sizes = list(quantities(supernet.dense_sizes)), supernet.sizes("sparsity")
    by_hand = {
        name: value for mask in supernet.bi_masks for name, value in expected_by_hand(mask).items()
    }
    for name, size in zip(names, sizes.tolist(), strict=True):
        assert size == pytest.approx(by_hand[name].item(), rel=1e-5)
    gates = supernet._stacks.gates(supernet.lam)
    for name, size in zip(names, supernet._stacks.sizes(gates).tolist(), strict=True):
        if name in gates:
            assert size == pytest.approx(gates[name].sum().item(), rel=1e-5)


@both_families
@pytest.mark.parametrize("searched", ["embedding", "attention", "mlp"])
def test_what_is_not_searched_keeps_its_dense_size(searched, family):
    flags = {f"search_{kind}": kind == searched for kind in ("embedding", "attention", "mlp")}
    supernet = tiny_supernet(family=family, target_macs=0.9, **flags)
    for mask in supernet.bi_masks:
        mask.settle_(*mask.largest_size())
    dense = quantities(supernet.dense_sizes)
    assert supernet.sizes("sparsity").tolist() == list(dense.values())
    assert evaluate_terms(supernet.terms, dense) == supernet.dense_cost


@both_families
@pytest.mark.parametrize("shrinks", [False, True])
def test_gradients_are_those_of_each_mask(shrinks, family):
    supernet = mixed_supernet(family, 3, shrinks)
    twin = copy.deepcopy(supernet)

    def loss_of(values):
        return sum(
            (value * torch.linspace(-1, 2, value.numel(), dtype=value.dtype)).sum()
            for value in values
        )

    (loss_of(supernet._stacks.gates(supernet.lam).values()) + supernet.one_hot_loss()).backward()
    values = {mask.name: mask.prunability(twin.lam).flatten() for mask in twin.bi_masks}
    one_hot = sum(one_hot_loss(mask.alpha, mask.active_candidates) for mask in twin.bi_masks)
    (
        loss_of(values[mask.name] for stack in twin._stacks.stacks for mask in stack.masks)
        + one_hot
    ).backward()
    for (name, ours), theirs in zip(
        supernet.bi_masks.named_parameters(), twin.bi_masks.parameters(), strict=True
    ):
        assert_close(ours.grad, theirs.grad, msg=name)


@both_families
def test_a_stack_is_nothing_to_save_or_to_train(family):
    supernet = tiny_supernet(family=family)
    assert not list(supernet._stacks.parameters())
    assert not supernet._stacks.state_dict()
    assert [mask.name for stack in supernet._stacks.stacks for mask in stack.masks] != []
