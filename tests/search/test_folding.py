"""Once everything is decided the bi-masks become part of the weights, and the network runs as if
there were none."""

import copy

import pytest
import torch
from factories import FAMILIES, search_config, tiny_images, tiny_supernet
from invariants import assert_close, copy_of_state
from runs import STEPS, searcher
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from ofb_hf import compress
from ofb_hf.search.shrinking import shrink_, shrink_to_

both_families = pytest.mark.parametrize("family", FAMILIES)


def decided(family="vit", **overrides):
    """A settled supernet in float64 whose dead units are gone."""
    supernet = tiny_supernet(dtype=torch.float64, family=family, target_macs=0.5, **overrides)
    supernet.decisions.settle_()
    shrink_(supernet)
    return supernet


class Calls(TorchDispatchMode):
    """Counts what reaches the kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(model, images):
    with Calls() as calls:
        model(images).logits.sum().backward()
    return calls.count


@both_families
@pytest.mark.parametrize("depth", [False, True])
def test_folding_for_good_keeps_the_function_and_costs_nothing(depth, family):
    supernet, images = decided(family, search_depth=depth), tiny_images(dtype=torch.float64)
    before, small = supernet(images).logits.detach(), compress(supernet).train(supernet.training)
    resting = supernet.fold_()
    assert_close(supernet(images).logits, before)
    assert_close(compress(supernet)(images).logits, before)
    assert calls_of(supernet, images) == calls_of(small, images)
    names = {name for name, parameter in supernet.named_parameters() if not parameter.requires_grad}
    assert all(
        name.startswith(("bi_masks.", "pmim_decoder.")) or name.endswith("mask_token")
        for name in names
    )
    assert {parameter for parameter in supernet.parameters() if not parameter.requires_grad} >= set(
        resting
    )
    assert not supernet.repaints
    assert supernet.fold_() == {}


@both_families
def test_folding_twice_changes_nothing(family):
    supernet = decided(family)
    supernet.fold_()
    state = copy_of_state(supernet)
    supernet.fold_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in supernet.state_dict().items())


def test_pictures_are_repainted_until_the_end_where_that_is_wanted():
    supernet = decided(pmim_until_settled=False)
    supernet.fold_()
    assert supernet.repaints
    assert all(parameter.requires_grad for parameter in supernet.pmim_decoder.parameters())


@both_families
def test_nothing_is_folded_for_good_before_it_is_decided(family):
    supernet = tiny_supernet(family=family, target_macs=0.5)
    with pytest.raises(RuntimeError, match=r"once the choice is final .*settle_, then shrink_"):
        supernet.fold_()
    supernet.decisions.settle_()
    with pytest.raises(RuntimeError, match="then shrink_"):
        supernet.fold_()


@both_families
def test_a_folded_supernet_comes_back_folded(family):
    fresh = tiny_supernet(dtype=torch.float64, family=family, target_macs=0.5)
    supernet, images = copy.deepcopy(fresh), tiny_images(dtype=torch.float64)
    supernet.decisions.settle_()
    shrink_(supernet)
    supernet.fold_()
    shrink_to_(fresh, supernet.state_dict())
    fresh.load_state_dict(supernet.state_dict())
    assert fresh.is_folded
    assert torch.equal(fresh(images).logits, supernet(images).logits)
    trained = [
        {n for n, p in model.named_parameters() if p.requires_grad} for model in (fresh, supernet)
    ]
    assert trained[0] == trained[1]


class Watch(TrainerCallback):
    """What is trained, and whether the supernet is folded, in every step."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        groups = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
        self.seen.append((model.is_folded, groups))


@pytest.mark.slow
@pytest.mark.parametrize("prune", [True, False])
def test_a_search_folds_when_it_settles(prune, tmp_path):
    watch = Watch()
    config = search_config(target_macs=0.6, prune_during_search=prune)
    trainer = searcher(tmp_path, config, callbacks=[watch], ema_decay=0.5)
    trainer.train()
    settles = round(0.75 * STEPS)
    assert [folded for folded, _ in watch.seen] == [
        prune and step > settles for step in range(1, STEPS + 1)
    ]
    last = watch.seen[-1][1]
    assert list(last) == [
        "weights",
        "weights_no_decay",
        "importance",
        "architecture",
        "pmim_decoder",
    ]
    resting = [last[name] == 0 for name in ("importance", "architecture", "pmim_decoder")]
    assert resting == [prune] * 3
    assert trainer.average.average.keys() == dict(trainer.supernet.named_parameters()).keys()
    images = tiny_images()
    with torch.no_grad():
        assert_close(
            trainer.compress().eval()(images).logits, trainer.supernet.eval()(images).logits
        )


@pytest.mark.slow
@both_families
def test_the_average_is_folded_with_masks_of_its_own(tmp_path, family):
    config = search_config(family, target_macs=0.6, compensate=False)
    trainer = searcher(tmp_path, config, family=family, ema_decay=0.9)
    images, fold, seen = tiny_images(), trainer._fold, []

    def averaged():
        with trainer.average.applied_to(trainer.supernet), torch.no_grad():
            logits = trainer.supernet.eval()(images).logits
        trainer.supernet.train()
        return logits

    def noted():
        before, resting = averaged(), fold()
        seen.append((before, averaged(), bool(resting)))
        return resting

    trainer._fold = noted
    trainer.train()
    # Once, at the choice: in the last step they are folded already.
    assert [folded for *_, folded in seen] == [True]
    for before, after, _ in seen:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
