"""Importance from first-order information: what is observed, how it ranks units, and that data decides."""

import copy

import pytest
import torch
from factories import AWKWARD, FAMILIES, search_config, tiny_images, tiny_model, tiny_supernet
from hypothesis import given
from hypothesis import strategies as st
from runs import arguments, rows, searcher
from torch.nn import functional as F
from transformers import TrainerCallback, default_data_collator

from ofb_hf import (
    DistillationTrainer,
    OFBTrainer,
    SubmoduleSpace,
    ViTBiMaskConfig,
    baselines,
    count_macs,
    install_bi_masks,
    read_subnet,
)
from ofb_hf.bi_mask import IMPORTANCE_LIMIT, BiMask
from ofb_hf.candidates import first_order_options

both_families = pytest.mark.parametrize("family", FAMILIES)


@both_families
def test_what_is_observed_is_the_taylor_score_of_every_unit(family):
    """Found in another way: from weights and their gradients, without any mask."""
    model = tiny_model(family, dtype=torch.float64).eval()
    supernet = install_bi_masks(model, search_config(family, importance_start=1.0)).eval()
    images, labels = tiny_images(count=4, size=model.config.image_size, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    supernet.lam.fill_(1.0)
    F.cross_entropy(supernet(images).logits, labels).backward()
    expected = baselines.taylor_scores(model, [{"pixel_values": images, "labels": labels}])
    for name, mask in supernet.named_masks.items():
        squares = mask.squared_gradient()
        found, wanted = squares.double() / squares.max(), expected[name] / expected[name].max()
        torch.testing.assert_close(found, wanted.double(), rtol=1e-3, atol=1e-6, msg=name)


def test_overflows_do_not_count_and_the_scale_of_the_loss_is_divided_out():
    mask = BiMask(SubmoduleSpace("a", "mlp", num_units=3, candidate_sizes=(1, 3)))
    assert mask.squared_gradient().tolist() == [0, 0, 0]
    mask.importance_logits.grad = torch.tensor([-8.0, float("inf"), float("nan")])
    assert mask.squared_gradient(scale=4.0).tolist() == [4.0, 0.0, 0.0]


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30), st.data())
def test_as_many_units_are_important_as_are_to_be_kept(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    mask = BiMask(SubmoduleSpace("a", "mlp", num_units=len(scores), candidate_sizes=(1, len(scores))))
    mask.first_order.copy_(torch.tensor(scores))
    mask.estimate_importance_(count)
    logits = mask.importance_logits.detach()
    assert bool(logits.isfinite().all())
    assert logits.abs().max() <= IMPORTANCE_LIMIT
    order = mask.first_order.argsort(descending=True, stable=True)
    kept, rest = logits[order[:count]], logits[order[count:]]
    assert bool((kept >= 0).all())
    assert bool((rest <= 0).all())
    assert bool((logits[order].diff() <= 0).all())


@both_families
def test_without_observations_importance_stays(family):
    supernet = tiny_supernet(family=family)
    before = [mask.importance_logits.detach().clone() for mask in supernet.bi_masks]
    supernet.estimate_importance_()
    assert first_order_options(supernet.groups) == {}
    assert all(torch.equal(a, mask.importance_logits) for a, mask in zip(before, supernet.bi_masks, strict=True))


@both_families
def test_what_is_observed_decides_which_units_stay(family):
    """The best units of every submodule are made known, all others look useless: exactly these are kept."""
    supernet = install_bi_masks(tiny_model(family), search_config(family, target_macs=0.5))
    generator = torch.Generator().manual_seed(0)
    for mask in supernet.bi_masks:
        mask.first_order.copy_(torch.rand(mask.first_order.shape, generator=generator).double() ** 6)
    wanted = baselines.pruned_subnet(
        tiny_model(family),
        supernet.bi_mask_config,
        {mask.name: mask.first_order for mask in supernet.bi_masks},
    )
    supernet.estimate_importance_()
    supernet.fit_alpha_()
    found = read_subnet(supernet)
    assert count_macs(tiny_model(family), found) <= supernet.target
    shared = total = 0
    for name, mask in supernet.named_masks.items():
        sets = [_flat(subnet.kept[name], mask.dense_head_dim) for subnet in (wanted, found)]
        shared, total = shared + len(sets[0] & sets[1]), total + len(sets[0] | sets[1])
    assert shared / total > 0.9


def _flat(kept, head_dim):
    """Kept units of one submodule as a set of flat indices."""
    return {h * head_dim + c for h, channels in kept.items() for c in channels} if isinstance(kept, dict) else set(kept)


def test_the_first_phase_observes_and_changes_nothing_else(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = {k: v.detach().clone() for k, v in trainer.supernet.state_dict().items()}

    config = search_config(importance_hold=0.25, target_macs=0.6)
    trainer = searcher(tmp_path, config, callbacks=[Look()], max_steps=12)
    start = {name: tensor.clone() for name, tensor in trainer.supernet.state_dict().items()}
    trainer.train()
    still = [name for name in start if name.startswith("model.") and "mask_token" not in name]
    still += [name for name in start if name.endswith((".importance_logits", ".alpha"))]
    for name in still:
        assert torch.equal(seen[3][name], start[name]), name
    observed = [name for name in start if name.endswith(".first_order")]
    assert all(bool((seen[3][name] > seen[1][name]).any()) for name in observed)
    assert all(torch.equal(seen[4][name], seen[3][name]) for name in observed)
    logits = [name for name in start if name.endswith(".importance_logits")]
    assert all(not torch.equal(seen[4][name], start[name]) for name in logits)
    assert not seen[3]["importance_known"]
    assert seen[4]["importance_known"]


@both_families
def test_while_gradients_are_observed_only_importance_has_any_and_afterwards_all_that_learns(tmp_path, family):
    config, learning, choices = search_config(family, importance_hold=0.5, settle_at=1.0, target_macs=0.6), {}, {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = {name for name, p in trainer.supernet.named_parameters() if p.grad is not None}
            learning[state.global_step] = found
            choices[state.global_step] = [part.item() for part in trainer._choice()]

    trainer = searcher(tmp_path, config, callbacks=[Look()], family=family, max_steps=6)
    every = {name for name, p in trainer.supernet.named_parameters() if p.requires_grad}
    trainer.train()
    assert learning[0] == learning[2] == {name for name in every if name.endswith(".importance_logits")}
    assert learning[3] == every
    # What the choice costs is computed once while it rests, and from then on anew.
    assert choices[0] == choices[2]
    assert len({tuple(choices[step]) for step in (2, 3, 4, 5)}) == 4


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 12])
def test_however_short_the_search_it_looks_at_the_data_first(tmp_path, steps):
    """With the phases of the preset, which fall together in few steps."""
    config, model, found = ViTBiMaskConfig(target_macs=0.6, **AWKWARD["vit"]), tiny_model("vit").train(), []
    for seed in (0, 1):
        data = rows(seed=seed, classes=2 + seed)
        trainer = OFBTrainer(model, arguments(tmp_path, max_steps=steps), config, train_dataset=data)
        trainer.train()
        assert trainer.supernet.importance_known
        assert trainer.supernet.is_settled
        found.append(trainer.read_subnet())
    assert found[0] != found[1]


def test_moments_of_the_time_of_rest_are_forgotten(tmp_path):
    trainer = searcher(tmp_path, search_config(importance_hold=0.5), max_steps=8)
    steps = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps[state.global_step] = {float(entry["step"]) for entry in trainer.optimizer.state.values()}

    trainer.add_callback(Look())
    trainer.train()
    assert steps[4] == set()
    assert steps[5] == {1.0}


def test_a_loss_scale_that_overflows_is_lowered_and_nothing_is_lost(tmp_path):
    """What fp16 does in its first steps; on the CPU the scale has to be absurd."""
    plain = searcher(tmp_path, max_steps=3)
    scaled = searcher(tmp_path, max_steps=3)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    for trainer in (plain, scaled):
        trainer.supernet.model.classifier.weight.data *= 64  # gradients above 1
        trainer._schedule = {"importance_phase": True, "keep_ratio": 1.0, "target": 1.0, "one_hot_weight": 0.0}
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.supernet, default_data_collator(rows()[:8]))
    assert scaled.accelerator.scaler.get_scale() < 2.0**126
    for one, other in zip(plain.supernet.bi_masks, scaled.supernet.bi_masks, strict=True):
        torch.testing.assert_close(other.first_order, one.first_order, rtol=1e-3, atol=0)


def test_an_overflow_is_repeated_with_the_micro_batches_before_it(tmp_path):
    trainer = searcher(tmp_path, gradient_accumulation_steps=2)
    accelerator, masks = trainer.accelerator, trainer.supernet.bi_masks
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    accelerator.scaler.scale(torch.tensor(0.0))  # before it has scaled anything it cannot be changed

    def backward(part):
        for mask in masks:
            gradient = torch.full_like(mask.importance_logits, accelerator.scaler.get_scale()) * 2.0 ** part["labels"]
            before = mask.importance_logits.grad
            mask.importance_logits.grad = gradient if before is None else before + gradient
        return torch.tensor(0.0)

    trainer.supernet.zero_grad()
    images, slopes = torch.zeros(1, 3, 16, 16), (26, 28)  # 2^(100 + 28) is infinite, in single precision
    for last, slope in enumerate(slopes):
        accelerator.gradient_state._set_sync_gradients(bool(last))
        trainer.observation.observe({"pixel_values": images, "labels": torch.tensor([slope])}, backward)
    assert accelerator.scaler.get_scale() == 2.0**99
    mean = (2.0**26 + 2.0**28) / 2
    for mask in masks:
        torch.testing.assert_close(mask.first_order, torch.full_like(mask.first_order, mean**2))


def test_images_count_alike_however_many_micro_batches_a_step_has(tmp_path):
    """The last step of an epoch has fewer, and divides its losses by fewer."""
    seen = []
    for accumulation, steps in ((1, 5), (4, 2)):
        config = search_config(target_macs=0.6, importance_hold=1.0, settle_at=1.0)
        trainer = searcher(tmp_path, config, max_steps=steps, gradient_accumulation_steps=accumulation)
        trainer.train_dataset = rows(40)
        found, estimate = {}, trainer.supernet.estimate_importance_
        masks = trainer.supernet.named_masks

        def noted(*args, found=found, masks=masks, estimate=estimate):
            found |= {name: mask.first_order.clone() for name, mask in masks.items()}
            return estimate(*args)

        trainer.supernet.estimate_importance_ = noted
        trainer.train()
        seen.append(found)
    assert seen[0]
    for name, squares in seen[0].items():
        torch.testing.assert_close(seen[1][name], squares, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("value", ["gradient", ""])
def test_another_source_of_importance_is_refused(value):
    with pytest.raises(ValueError, match=f"importance_from is '{value}'; allowed are"):
        search_config(importance_from=value)


def test_a_dense_model_as_its_own_teacher_leaves_something_to_observe(tmp_path):
    model = tiny_model("vit")
    named = OFBTrainer(model, arguments(tmp_path), search_config(), teacher=copy.deepcopy(model))
    assert named.distillation_weight == searcher(tmp_path, model=model).distillation_weight == 0.5
    with pytest.raises(ValueError, match=r"distillation_weight is 1 .*Leave labels a share"):
        searcher(tmp_path, model=model, distillation_weight=1.0)


def test_a_model_that_was_a_teacher_can_still_be_trained_and_searched(tmp_path):
    dense = tiny_model("vit")
    for _ in range(2):
        trainer = searcher(tmp_path, model=dense, max_steps=4)
        trainer.train()
        resting = [name for name, p in trainer.supernet.model.named_parameters() if not p.requires_grad]
        assert all(name.endswith("mask_token") for name in resting)  # nothing is repainted after the choice
        small = trainer.compress().train()
        DistillationTrainer(small, arguments(tmp_path, max_steps=1), teacher=dense, train_dataset=rows()).train()
    assert all(parameter.requires_grad for parameter in dense.parameters())
