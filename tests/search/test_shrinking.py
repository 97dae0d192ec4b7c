"""Shrinking in the middle of a search: function, gradients, optimizer, average and saved state
follow."""

import copy
import random

import pytest
import torch
from factories import (
    FAMILIES,
    OURS,
    optimizer_that_mirrors,
    retire_some_,
    search_config,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
from invariants import (
    DTYPES,
    LABELS,
    assert_close,
    copy_of_state,
    gradients_of,
    masked_patches,
    names_of,
    seeded,
)

from ofb_hf import compress, count_macs, install_bi_masks, read_subnet
from ofb_hf.families.mask_token import mask_token_of
from ofb_hf.pruning.surgery import Plan, slice_optimizer_, slice_tensor
from ofb_hf.search.shrinking import shrink_, shrink_to_
from ofb_hf.search.supernet import Supernet
from ofb_hf.training.averaging import WeightAverage

both_families = pytest.mark.parametrize("family", FAMILIES)


def shrink_with_(supernet: Supernet, optimizer: torch.optim.Optimizer) -> Plan:
    """Shrinks a supernet and its optimizer; returns the plan."""
    replaced, plan = shrink_(supernet)
    names = {parameter: name for name, parameter in supernet.named_parameters()}
    stayed = {old: names[new] for old, new in replaced.items() if new is not None}
    slice_optimizer_(optimizer, replaced, {old: plan[name] for old, name in stayed.items()})
    return plan


def leave_out_(supernet: Supernet, seed: int) -> None:
    """Leaves out one attention and one MLP at random, and may leave out more."""
    rng = random.Random(seed)
    for kind in ("attention", "mlp"):
        names = names_of(supernet.config, kind)
        for name in {rng.choice(names), *(name for name in names if rng.random() < 0.2)}:
            mask = supernet.named_masks[name]
            mask.settle_(*(0 for _ in mask.alive.shape))


def retire_some_except_best_(supernet: Supernet, seed: int) -> None:
    """Retires at random, but leaves the best choice within the budget."""
    best = supernet.decisions.best_choice().candidates
    generator = torch.Generator().manual_seed(seed)
    for mask in supernet.bi_masks:
        wanted = torch.rand(mask.candidate_sizes.max() + 1, generator=generator) < 0.5
        weak = wanted[mask.candidate_sizes] & mask.active_candidates
        weak[mask.index_of(best[mask.name].size)] = False
        mask.retire_(weak)


# -------------------------------------------------------------------------------- the same function


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_shrinking_changes_neither_logits_nor_pictures(seed, dtype, share, depth, family):
    supernet = tiny_supernet(seed, dtype, family, search_depth=depth)
    if depth:
        leave_out_(supernet, seed)
    retire_some_(supernet, seed, share)
    images, masked = tiny_images(dtype=dtype), masked_patches(supernet)
    before, painted = supernet(images).logits.detach(), supernet(images, bool_masked_pos=masked)
    something_to_remove = not all(mask.alive.all() for mask in supernet.bi_masks)
    shrink_(supernet)
    assert (count_macs(supernet.config) < supernet.dense_macs) == something_to_remove
    assert something_to_remove or share < 0.8
    assert_close(supernet(images).logits, before)
    output = supernet(images, bool_masked_pos=masked)
    assert_close(output.logits, painted.logits)
    assert_close(output.reconstruction, painted.reconstruction)


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_shrinking_changes_no_gradient(seed, depth, family):
    supernet = tiny_supernet(seed, torch.float64, family, search_depth=depth).train()
    if depth:
        leave_out_(supernet, seed)
        # its random numbers would be others once there are fewer blocks
        for module in supernet.modules():
            module.drop_prob = 0.0
    retire_some_(supernet, seed, 0.6)
    images = tiny_images(dtype=torch.float64)
    before = gradients_of(supernet, images)
    _, plan = shrink_(supernet)
    after = gradients_of(supernet, images)
    assert (after.keys() < before.keys()) if depth else (after.keys() == before.keys())
    assert all(before[name].abs().max() < 1e-12 for name in before.keys() - after.keys())
    assert len(plan) > 10
    for name, gradient in after.items():
        # sizes() are float32 by design, so the two cost terms agree to that precision only
        expected = slice_tensor(before[name], plan.get(name, ()))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6, msg=name)


@both_families
@pytest.mark.parametrize("depth", [False, True])
def test_a_shrunken_network_looks_like_one_that_was_built_small(family, depth):
    """Sizes that modules keep next to their weights, frozen parameters, and costs before the next
    forward pass."""
    supernet = tiny_supernet(family=family, target_macs=0.5, search_depth=depth)
    if depth:
        leave_out_(supernet, 1)
    owner, _, _ = supernet.architecture.mask_token.rpartition(".")
    supernet.model.get_submodule(owner).requires_grad_(False)
    frozen = [
        name for name, parameter in supernet.model.named_parameters() if not parameter.requires_grad
    ]
    supernet(tiny_images())
    supernet.decisions.settle_()
    shrink_(supernet)
    small = OURS[family](supernet.config)
    theirs, seen = dict(small.named_modules()), set()
    for name, module in supernet.model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert isinstance(theirs[name], torch.nn.Linear | torch.nn.LayerNorm), name
        for attribute in (
            "in_features",
            "out_features",
            "in_channels",
            "out_channels",
            "normalized_shape",
            "num_attention_heads",
            "head_dim",
            "scaling",
            "num_features",
        ):
            assert getattr(module, attribute, None) == getattr(theirs[name], attribute, None), (
                name,
                attribute,
            )
            seen |= {attribute} if hasattr(module, attribute) else set()
    assert len(seen) == (9 if family == "swin" else 8)
    assert theirs.keys() == dict(supernet.model.named_modules()).keys()
    assert [
        name for name, parameter in supernet.model.named_parameters() if not parameter.requires_grad
    ] == frozen
    supernet.sizes("bi_mask").sum().backward()
    assert all(
        (mask.importance_logits.grad is not None) == bool(mask.alive.numel())
        for mask in supernet.bi_masks
    )


@both_families
def test_mask_token_and_decoder_lose_the_channels_that_the_network_loses(family):
    """The token enters where the first width does, the decoder reads the last one."""
    supernet = tiny_supernet(family=family)
    architecture, masks = supernet.architecture, supernet.named_masks
    token, decoder = (
        mask_token_of(supernet.model).detach(),
        supernet.pmim_decoder.projection.weight.detach(),
    )
    for name, size in {architecture.last_width: 31, architecture.first_width: 13}.items():
        masks[name].settle_(size)
    first, last = (
        list(masks[name].kept()) for name in (architecture.first_width, architecture.last_width)
    )
    shrink_(supernet)
    assert torch.equal(mask_token_of(supernet.model), token[..., first])
    assert torch.equal(supernet.pmim_decoder.projection.weight, decoder[:, last])
    assert supernet.pmim_decoder.projection.in_channels == len(last)
    assert len(first) == 13


# ---------------------------------------------------------------------------- optimizer and average


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_optimizer_and_average_follow_every_shrink(seed, depth, family):
    """Moments and average start as copies of the parameters; slice by slice they have to stay
    that."""
    supernet = tiny_supernet(seed, family=family, target_macs=0.5, search_depth=depth)
    optimizer, average = optimizer_that_mirrors(supernet), WeightAverage(supernet, 0.9)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    for event in range(3):
        if depth and event == 0:
            leave_out_(supernet, seed)
        retire_some_(supernet, seed + event, 0.5)
        plan = shrink_with_(supernet, optimizer)
        average.slice_(plan, [name for name, _ in supernet.named_parameters()])
        assert average.average.keys() == {name for name, _ in supernet.named_parameters()}
        names = {
            parameter: name
            for name, parameter in supernet.named_parameters()
            if parameter.requires_grad
        }
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in names
        }
        assert set(optimizer.state) == set(names)
        for parameter, name in names.items():
            state = optimizer.state[parameter]
            assert torch.equal(state["exp_avg"], parameter), name
            assert torch.equal(state["exp_avg_sq"], 2 * parameter.abs()), name
            assert state["step"].item() == 7
            assert torch.equal(average.average[name], parameter), name
    assert ([len(group["params"]) for group in optimizer.param_groups] == groups) != depth
    assert count_macs(supernet.config) < supernet.dense_macs
    supernet(tiny_images()).logits.sum().backward()
    optimizer.step()
    average.update(supernet)
    assert all(parameter.isfinite().all() for parameter in supernet.parameters())


@both_families
def test_a_parameter_without_a_plan_starts_with_fresh_moments(family):
    supernet = tiny_supernet(family=family)
    optimizer, (shrinking, *_, staying) = (
        optimizer_that_mirrors(supernet),
        names_of(supernet.config, "mlp"),
    )
    supernet.named_masks[shrinking].settle_(29)
    replaced, plan = shrink_(supernet)
    names = {parameter: name for name, parameter in supernet.named_parameters()}
    entries = {
        old: plan[names[new]] for old, new in replaced.items() if not names[new].endswith(".alpha")
    }
    slice_optimizer_(optimizer, replaced, entries)
    alpha = supernet.named_masks[shrinking].alpha
    assert any(new is alpha for new in replaced.values())
    assert alpha not in optimizer.state
    assert any(parameter is alpha for parameter in optimizer.param_groups[0]["params"])
    assert supernet.named_masks[staying].alpha in optimizer.state


@both_families
def test_training_goes_on_after_a_shrink_as_if_units_had_been_masked(family):
    """One AdamW step on the shrunken network gives the parameters that a step on the masked one
    gives."""
    masked, images = (
        tiny_supernet(dtype=torch.float64, family=family).train(),
        tiny_images(dtype=torch.float64),
    )
    shrunk = copy.deepcopy(masked)
    for supernet in (masked, shrunk):
        retire_some_(supernet, 1, 0.6)
    optimizers = [
        torch.optim.AdamW(supernet.parameters(), lr=1e-2) for supernet in (masked, shrunk)
    ]
    for step in range(3):
        if step == 1:
            plan = shrink_with_(shrunk, optimizers[1])
        for supernet, optimizer in zip((masked, shrunk), optimizers, strict=True):
            optimizer.zero_grad()
            seeded(supernet, images, labels=LABELS).loss.backward()
            optimizer.step()
    expected = dict(masked.named_parameters())
    assert len(plan) > 10
    for name, parameter in shrunk.named_parameters():
        assert_close(parameter, slice_tensor(expected[name], plan.get(name, ())), msg=name)
    assert_close(seeded(shrunk, images).logits, seeded(masked, images).logits)


# --------------------------------------------------------------------------- subnet and saved state


@both_families
@pytest.mark.parametrize("depth", [False, True])
def test_read_subnet_names_units_of_the_dense_parent_after_shrinks(family, depth):
    """A shrunken search and the same search without shrinking agree on what they keep."""
    kept, shrunk = (
        tiny_supernet(family=family, target_macs=0.4, search_depth=depth) for _ in range(2)
    )
    for event in range(3):
        for supernet in (kept, shrunk):
            retire_some_except_best_(supernet, event)
        shrink_(shrunk)
        assert read_subnet(shrunk) == read_subnet(kept)
    assert count_macs(shrunk.config) < shrunk.dense_macs
    dense = tiny_model(family)
    assert (
        count_macs(compress(shrunk))
        == count_macs(dense, read_subnet(kept))
        <= 0.4 * count_macs(dense)
    )


@both_families
def test_retirement_spares_the_best_choice_within_the_budget(family):
    for seed in range(4):
        supernet = tiny_supernet(seed, family=family, target_macs=0.5)
        for mask in supernet.bi_masks:
            with torch.no_grad():
                mask.alpha.mul_(4)
        best = supernet.decisions.best_choice().candidates
        assert supernet.decisions.retire_candidates() > 0
        for mask in supernet.bi_masks:
            assert mask.active_candidates[mask.index_of(best[mask.name].size)]
        assert supernet.decisions.best_choice().cost <= supernet.target


@both_families
@pytest.mark.parametrize("depth", [False, True])
def test_a_fresh_supernet_takes_the_state_of_a_shrunken_one(family, depth):
    saved, images = (
        tiny_supernet(0, family=family, target_macs=0.4, search_depth=depth),
        tiny_images(),
    )
    if depth:
        gone = names_of(saved.config, "attention")[0], names_of(saved.config, "mlp")[-1]
        for name in gone:
            saved.named_masks[name].settle_(*(0 for _ in saved.named_masks[name].alive.shape))
    for event in range(2):
        retire_some_except_best_(saved, event)
        shrink_(saved)
    state = copy_of_state(saved)
    fresh = install_bi_masks(
        tiny_model(family, seed=5), search_config(family, target_macs=0.4, search_depth=depth)
    )
    fresh(images)
    shrink_to_(fresh, state)
    fresh.load_state_dict(state, strict=True)
    assert count_macs(fresh.config) < fresh.dense_macs
    assert torch.equal(fresh(images).logits, saved(images).logits)
    assert read_subnet(fresh) == read_subnet(saved)
    assert fresh.config.to_dict() == saved.config.to_dict()


@both_families
def test_the_state_of_another_search_is_refused(family):
    supernet = tiny_supernet(family=family)
    state = copy_of_state(supernet)
    last = f"bi_masks.{len(supernet.bi_masks) - 1}."
    with pytest.raises(ValueError, match=f"checkpoint.*{supernet.bi_masks[-1].name}"):
        shrink_to_(
            supernet, {name: tensor for name, tensor in state.items() if not name.startswith(last)}
        )
    state[f"{last}unit_ids"] = state[f"{last}unit_ids"] + 1
    with pytest.raises(ValueError, match=f"checkpoint.*{supernet.bi_masks[-1].name}"):
        shrink_to_(supernet, state)
