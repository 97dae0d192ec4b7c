"""A stack computes what each mask is by definition: values, amounts, losses and gradients."""

import copy

import pytest
import reference
import torch
from factories import FAMILIES, masks, retire_some_, tiny_supernet
from hypothesis import assume, given
from hypothesis import strategies as st
from invariants import assert_close

from ofb_hf.cost.counting import evaluate_terms
from ofb_hf.families.description import heads_of, presence_of, quantities
from ofb_hf.masks.bi_mask import BiMask
from ofb_hf.masks.stack import IMPORTANCE_PENALTY, MaskStack
from ofb_hf.pruning.surgery import slice_tensors_
from ofb_hf.search.shrinking import shrink_

both_families = pytest.mark.parametrize("family", FAMILIES)


def mixed_supernet(family, seed, shrinks, depth=False):
    """Masks in float64, random in all they have, some of them with candidates retired; of many
    shapes if it shrinks."""
    supernet = tiny_supernet(seed, torch.float64, family, search_depth=depth)
    retire_some_(supernet, seed)
    if shrinks:
        shrink_(supernet)
    return supernet


@st.composite
def stacks(draw: st.DrawFn) -> list[BiMask]:
    """Masks that can be stacked: of one kind, and alike in what a stack has for all of them."""
    first, *others = draw(st.lists(masks(), min_size=1, max_size=5))
    alike = [
        mask
        for mask in others
        if (mask.kind, mask.may_vanish, mask.normalize_importance)
        == (first.kind, first.may_vanish, first.normalize_importance)
    ]
    assume(not any(reference.heads_tie(mask) for mask in (first, *alike)))
    return [first, *alike]


@given(stacks(), st.booleans(), st.floats(0, 1))
def test_a_stack_of_any_shapes_follows_the_definitions(masks, shrinks, lam):
    if shrinks:
        for mask in masks:
            slice_tensors_(mask, mask.shrink_plan())
    stack = MaskStack(masks)
    values, importance = stack.values(torch.tensor(lam, dtype=torch.float64)), stack.importance()
    for mask, value, own in zip(masks, stack.apart(values), stack.apart(importance), strict=True):
        assert_close(value, reference.prunability(mask, lam).flatten())
        assert_close(own, reference.importance(mask).flatten())
    assert_close(stack.together(list(stack.apart(values))), values)
    expected = zip(*map(reference.expected_amounts, masks), strict=True)
    for amounts, by_definition in zip(stack.expected_amounts(), expected, strict=True):
        assert_close(amounts, torch.stack(by_definition))
    one_hot = torch.stack([reference.one_hot_loss(mask) for mask in masks])
    assert_close(stack.one_hot_losses(), one_hot)
    for p, mask in zip(stack.probabilities(), masks, strict=True):
        assert p.sum().item() == pytest.approx(1)
        assert (p > 0).sum() == mask.active_candidates.sum()


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_values_and_losses_are_those_of_each_mask(seed, shrinks, depth, family):
    supernet = mixed_supernet(family, seed, shrinks, depth)
    lam = supernet.lam.item()
    gates = supernet._stacks.gates(supernet.lam)
    for mask in supernet.bi_masks:
        assert_close(gates[mask.name], reference.prunability(mask, lam).flatten())
        assert_close(gates[mask.name], mask.prunability(supernet.lam).flatten())
        if mask.may_vanish:
            values = gates[mask.name]
            assert gates[presence_of(mask.name)].item() == (
                values.max().item() if values.numel() else 0
            )
    assert gates.keys() - {mask.name for mask in supernet.bi_masks} == {
        presence_of(mask.name) for mask in supernet.bi_masks if mask.may_vanish
    }
    assert_close(supernet.one_hot_loss(), sum(map(reference.one_hot_loss, supernet.bi_masks)))
    penalty = sum(
        IMPORTANCE_PENALTY[mask.kind] * reference.importance(mask).sum()
        for mask in supernet.bi_masks
    )
    assert_close(supernet.importance_penalty(), penalty)


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sizes_are_those_of_each_mask(seed, depth, family):
    supernet = mixed_supernet(family, seed, seed % 2 == 0, depth)
    names, sizes = list(quantities(supernet.dense_sizes)), supernet.sizes("sparsity")
    by_definition = {}
    for mask in supernet.bi_masks:
        units, heads, presence = reference.expected_amounts(mask)
        by_definition |= {mask.name: units, presence_of(mask.name): presence}
        by_definition |= {heads_of(mask.name): heads} if mask.is_grid else {}
    for name, size in zip(names, sizes.tolist(), strict=True):
        assert size == pytest.approx(by_definition[name].item(), rel=1e-5)
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
    assert evaluate_terms(supernet.decisions.terms, dense) == supernet.dense_cost


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
    lam = twin.lam.item()
    values = {mask.name: reference.prunability(mask, lam).flatten() for mask in twin.bi_masks}
    one_hot = sum(map(reference.one_hot_loss, twin.bi_masks))
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
