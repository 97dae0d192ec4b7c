"""Importance from first-order information: what is observed, how it ranks units, and that data
decides."""

import copy

import pytest
import torch
from accelerate import Accelerator
from factories import (
    AWKWARD,
    FAMILIES,
    SEARCHES,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
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
    count_macs,
    install_bi_masks,
    read_subnet,
)
from ofb_hf.choice import baselines
from ofb_hf.choice.scores import first_order_candidates
from ofb_hf.masks.bi_mask import IMPORTANCE_LIMIT, BiMask
from ofb_hf.search.observation import OBSERVED_TOGETHER, Observation

both_families = pytest.mark.parametrize("family", FAMILIES)


def observed(supernet, images, labels):
    """`first_order` of every bi-mask by name, of these images as one micro-batch."""

    def backward(inputs):
        loss = F.cross_entropy(supernet(inputs["pixel_values"]).logits, inputs["labels"])
        loss.backward()
        return loss.detach()

    Observation(supernet, Accelerator()).observe(
        {"pixel_values": images, "labels": labels}, backward
    )
    return {name: mask.first_order.clone() for name, mask in supernet.named_masks.items()}


@both_families
def test_what_is_observed_is_the_taylor_score_of_every_unit(family):
    """Found in another way: from weights and their gradients, without any mask."""
    model = tiny_model(family, dtype=torch.float64).eval()
    supernet = install_bi_masks(model, search_config(family, importance_start=1.0)).eval()
    images, labels = (
        tiny_images(count=4, size=model.config.image_size, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0]),
    )
    supernet.lam.fill_(1.0)
    expected = baselines.taylor_scores(model, [{"pixel_values": images, "labels": labels}])
    for name, squares in observed(supernet, images, labels).items():
        torch.testing.assert_close(
            squares.double(), expected[name].double(), rtol=1e-4, atol=1e-12, msg=name
        )


@both_families
@pytest.mark.parametrize(
    "changes", [{}, {"search_depth": True}, {"search_embedding": False}], ids=str
)
def test_every_image_has_the_gradients_that_it_would_have_alone(family, changes):
    """Those of the importance logits, but for their slope, which is the same everywhere while
    importance rests."""
    model = tiny_model(family, dtype=torch.float64).eval()
    supernet = install_bi_masks(model, search_config(family, **changes))
    images, labels = (
        tiny_images(count=5, size=model.config.image_size, dtype=torch.float64),
        torch.arange(5) % 3,
    )
    with supernet.separate_images():
        logits = supernet(images).logits
        F.cross_entropy(logits, labels, reduction="sum").backward()
        units, _ = supernet.changes_of_images()
    assert all(parameter.grad is None for parameter in supernet.parameters())
    mask = supernet.bi_masks[0]
    slope = (supernet.lam * mask.importance() * (1 - mask.importance_logits.sigmoid())).max()
    for image, label, together, changed in zip(images, labels, logits, units, strict=True):
        supernet.zero_grad()
        alone = supernet(image[None]).logits
        torch.testing.assert_close(together, alone[0])
        F.cross_entropy(alone, label[None]).backward()
        expected = torch.cat([mask.importance_logits.grad.flatten() for mask in supernet.bi_masks])
        torch.testing.assert_close(changed * slope, expected, rtol=1e-4, atol=1e-8)


@both_families
def test_units_that_are_gone_but_still_there_say_nothing(family):
    """Neither of themselves, nor of the others: those have the gradients that they have without
    gates per image."""
    supernet = tiny_supernet(family=family, dtype=torch.float64)
    supernet.lam.fill_(1.0)
    for mask in supernet.bi_masks:
        mask.importance_logits.data.fill_(0.5)
    settle_randomly_(supernet, seed=1)
    images = tiny_images(3, dtype=torch.float64)
    with supernet.separate_images():
        supernet(images).logits.square().sum().backward()
        units, _ = supernet.changes_of_images()
    supernet(images).logits.square().sum().backward()
    expected = torch.cat([mask.importance_logits.grad.flatten() for mask in supernet.bi_masks])
    alive = torch.cat([mask.alive.flatten() for mask in supernet.bi_masks])
    assert 0 < alive.sum() < len(alive)
    assert (units[:, ~alive] == 0).all()
    largest = expected.abs().argmax()
    found = units.sum(0)
    torch.testing.assert_close(
        found / found[largest], expected / expected[largest], rtol=1e-4, atol=1e-8
    )


@both_families
def test_small_groups_are_squared_although_they_are_observed_together(family):
    model = tiny_model(family).eval()
    images, labels = tiny_images(count=19, size=model.config.image_size), torch.arange(19) % 3
    together = observed(install_bi_masks(model, search_config(family)), images, labels)
    apart, supernet = {}, install_bi_masks(model, search_config(family))
    for part in torch.arange(19).split([10, 9]):
        apart = observed(supernet, images[part], labels[part])
    assert 19 // OBSERVED_TOGETHER == 2
    for name, squares in together.items():
        torch.testing.assert_close(squares, apart[name], rtol=1e-3, atol=1e-9, msg=name)


@both_families
def test_less_is_kept_for_the_backward_pass_than_while_learning(family):
    """A batch that can be learned from can be observed."""
    sizes = {"vit": {"num_hidden_layers": 4, "intermediate_size": 160}, "swin": {"mlp_ratio": 4.0}}[
        family
    ]
    model = tiny_model(family, attn_implementation="sdpa", **sizes).train()
    supernet = install_bi_masks(
        model, SEARCHES[family](preset="bi_mask", target_macs=0.9, multiple_of=1)
    )
    images, own = (
        tiny_images(8, model.config.image_size),
        {p.untyped_storage().data_ptr() for p in model.parameters()},
    )
    own |= {parameter.untyped_storage().data_ptr() for parameter in supernet.parameters()}

    def kept():
        tensors = {}

        def pack(tensor):
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = supernet(images)  # whose graph keeps all of it until here
        assert output.logits.requires_grad
        return sum(size for place, size in tensors.items() if place not in own)

    learning = kept()
    with supernet.separate_images():
        assert kept() < 0.9 * learning


def test_overflows_do_not_count():
    supernet = tiny_supernet()
    mask = supernet.bi_masks[0]
    before = supernet.changes_of_images

    def overflown():
        units, tokens = before()
        units[0, 0], units[1, 1] = float("inf"), float("nan")
        return units, tokens

    expected = observed(supernet, tiny_images(4), torch.tensor([0, 1, 2, 0]))
    mask.first_order.zero_()
    supernet.changes_of_images = overflown
    found = observed(supernet, tiny_images(4), torch.tensor([0, 1, 2, 0]))[mask.name]
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[2:], expected[mask.name][2:])
    assert (found[:2] != expected[mask.name][:2]).all()


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30), st.data())
def test_as_many_units_are_important_as_are_to_be_kept(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    mask = BiMask(
        SubmoduleSpace("a", "mlp", num_units=len(scores), candidate_sizes=(1, len(scores)))
    )
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
    supernet.decisions.estimate_importance_()
    assert first_order_candidates(supernet.decisions.groups) == {}
    assert all(
        torch.equal(a, mask.importance_logits)
        for a, mask in zip(before, supernet.bi_masks, strict=True)
    )


@both_families
def test_what_is_observed_decides_which_units_stay(family):
    """The best units of every submodule are made known, all others look useless: exactly these are
    kept."""
    supernet = install_bi_masks(tiny_model(family), search_config(family, target_macs=0.5))
    generator = torch.Generator().manual_seed(0)
    for mask in supernet.bi_masks:
        mask.first_order.copy_(
            torch.rand(mask.first_order.shape, generator=generator).double() ** 6
        )
    wanted = baselines.pruned_subnet(
        tiny_model(family),
        supernet.bi_mask_config,
        {mask.name: mask.first_order for mask in supernet.bi_masks},
    )
    supernet.decisions.estimate_importance_()
    supernet.decisions.fit_alpha_()
    found = read_subnet(supernet)
    assert count_macs(tiny_model(family), found) <= supernet.target
    shared = total = 0
    for name, mask in supernet.named_masks.items():
        sets = [_flat(subnet.kept[name], mask.dense_head_dim) for subnet in (wanted, found)]
        shared, total = shared + len(sets[0] & sets[1]), total + len(sets[0] | sets[1])
    assert shared / total > 0.9


def _flat(kept, head_dim):
    """Kept units of one submodule as a set of flat indices."""
    return (
        {h * head_dim + c for h, channels in kept.items() for c in channels}
        if isinstance(kept, dict)
        else set(kept)
    )


def test_the_first_phase_observes_and_changes_nothing_else(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = {
                k: v.detach().clone() for k, v in trainer.supernet.state_dict().items()
            }

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


@pytest.mark.slow
@both_families
def test_while_gradients_are_observed_only_importance_has_any_and_afterwards_all_that_learns(
    tmp_path, family
):
    config, learning, choices = (
        search_config(family, importance_hold=0.5, settle_at=1.0, target_macs=0.6),
        {},
        {},
    )

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found = {name for name, p in trainer.supernet.named_parameters() if p.grad is not None}
            learning[state.global_step] = found
            choices[state.global_step] = [part.item() for part in trainer._choice_losses()]

    trainer = searcher(tmp_path, config, callbacks=[Look()], family=family, max_steps=6)
    every = {name for name, p in trainer.supernet.named_parameters() if p.requires_grad}
    trainer.train()
    assert (
        learning[0]
        == learning[2]
        == {name for name in every if name.endswith(".importance_logits")}
    )
    assert learning[3] == every
    # What the choice costs is computed once while it rests, and from then on anew.
    assert choices[0] == choices[2]
    assert len({tuple(choices[step]) for step in (2, 3, 4, 5)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 9, 12])
def test_however_short_the_search_it_looks_at_the_data_first(tmp_path, steps):
    """With the phases of the preset, which fall together in few steps."""
    config, model, found = (
        ViTBiMaskConfig(preset="bi_mask", target_macs=0.6, **AWKWARD["vit"]),
        tiny_model("vit").train(),
        [],
    )
    for seed in (0, 1):
        data = rows(seed=seed, classes=2 + seed)
        trainer = OFBTrainer(
            model, arguments(tmp_path, max_steps=steps), config, train_dataset=data
        )
        trainer.train()
        assert trainer.supernet.importance_known
        assert trainer.supernet.decisions.is_settled
        found.append(trainer.read_subnet())
    assert found[0] != found[1]


def test_moments_of_the_time_of_rest_are_forgotten(tmp_path):
    trainer = searcher(tmp_path, search_config(importance_hold=0.5), max_steps=8)
    steps = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps[state.global_step] = {
                float(entry["step"]) for entry in trainer.optimizer.state.values()
            }

    trainer.add_callback(Look())
    trainer.train()
    assert steps[4] == set()
    assert steps[5] == {1.0}


def test_a_search_that_finds_its_observation_over_hands_over_at_once(tmp_path):
    """As a run does that is resumed with fewer steps than it was started with."""
    trainer = searcher(tmp_path)
    trainer.create_optimizer()
    before = [mask.alpha.detach().clone() for mask in trainer.supernet.bi_masks]
    for mask in trainer.supernet.bi_masks:
        mask.first_order.uniform_()
    trainer.state.max_steps = 24
    trainer.state.global_step = trainer._phases_of(24).observed_steps
    trainer.begin_search()
    assert trainer.supernet.importance_known
    for mask, alpha in zip(trainer.supernet.bi_masks, before, strict=True):
        assert not torch.equal(mask.alpha, alpha)
    # Once is enough.
    after = [mask.alpha.detach().clone() for mask in trainer.supernet.bi_masks]
    trainer.supernet.bi_masks[0].first_order.zero_()
    trainer.begin_search()
    for mask, alpha in zip(trainer.supernet.bi_masks, after, strict=True):
        assert torch.equal(mask.alpha, alpha)


def begin_observing(trainer):
    """Put a trainer into the first step of its search, without running it."""
    trainer.state.max_steps = trainer.args.max_steps
    trainer.begin_search()
    trainer.begin_search_step()
    assert trainer.search_step.observes


def test_a_loss_scale_that_overflows_is_lowered_and_nothing_is_lost(tmp_path):
    """What fp16 does in its first steps; on the CPU the scale has to be absurd."""
    plain = searcher(tmp_path, max_steps=3)
    scaled = searcher(tmp_path, max_steps=3)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    for trainer in (plain, scaled):
        trainer.supernet.model.classifier.weight.data *= 64  # gradients above 1
        begin_observing(trainer)
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(trainer.supernet, default_data_collator(rows()[:8]))
    assert scaled.accelerator.scaler.get_scale() < 2.0**126
    for one, other in zip(plain.supernet.bi_masks, scaled.supernet.bi_masks, strict=True):
        torch.testing.assert_close(other.first_order, one.first_order, rtol=1e-3, atol=0)


def test_images_that_are_looked_at_again_are_remembered_once(tmp_path):
    model = tiny_model("vit", num_hidden_layers=3).train()
    trainer = searcher(tmp_path, search_config(search_tokens=True), model=model)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.supernet.model.classifier.weight.data *= 64
    begin_observing(trainer)
    trainer.current_gradient_accumulation_steps = 1
    batch = default_data_collator(rows()[:8])
    trainer.training_step(trainer.supernet, batch)
    assert trainer.accelerator.scaler.get_scale() < 2.0**127
    for remembered in (trainer.compensation._images, trainer.observation.images):
        assert torch.equal(torch.cat(remembered), batch["pixel_values"])


def test_an_overflow_in_a_later_micro_batch_leaves_the_earlier_ones_as_they_were(tmp_path):
    """Labels stand for how steep the loss is."""
    found = []
    for scale in (None, 2.0**100):
        supernet, accelerator = tiny_supernet(), Accelerator()
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            # before it has scaled anything it cannot be changed
            accelerator.scaler.scale(torch.tensor(0.0))
        observation, scales = Observation(supernet, accelerator), []

        def backward(part, supernet=supernet, accelerator=accelerator, scales=scales):
            scales.append(accelerator.scaler.get_scale() if accelerator.scaler else 1.0)
            steep = 2.0 ** part["labels"].float().mean() * scales[-1]
            (supernet(part["pixel_values"]).logits.square().mean() * steep).backward()
            return torch.tensor(0.0)

        for last, slope in enumerate((1, 40)):  # 2^(100 + 40) is infinite, in single precision
            accelerator.gradient_state._set_sync_gradients(bool(last))
            observation.observe(
                {"pixel_values": tiny_images(2, seed=last), "labels": torch.tensor([slope] * 2)},
                backward,
            )
        found.append(torch.cat([mask.first_order.flatten() for mask in supernet.bi_masks]))
    assert scales[:2] == [2.0**100] * 2
    assert len(scales) > 3
    assert scales[-1] == accelerator.scaler.get_scale() < 2.0**100
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_images_count_alike_however_many_micro_batches_a_step_has(tmp_path):
    """The last step of an epoch has fewer, and divides its losses by fewer."""
    seen = []
    for accumulation, steps in ((1, 5), (4, 2)):
        config = search_config(target_macs=0.6, importance_hold=1.0, settle_at=1.0)
        trainer = searcher(
            tmp_path, config, max_steps=steps, gradient_accumulation_steps=accumulation
        )
        trainer.train_dataset = rows(40)
        found, estimate = {}, trainer.supernet.decisions.estimate_importance_
        masks = trainer.supernet.named_masks

        def noted(*args, found=found, masks=masks, estimate=estimate):
            found |= {name: mask.first_order.clone() for name, mask in masks.items()}
            return estimate(*args)

        trainer.supernet.decisions.estimate_importance_ = noted
        trainer.train()
        seen.append(found)
    assert seen[0]
    for name, squares in seen[0].items():
        torch.testing.assert_close(seen[1][name], squares, rtol=1e-3, atol=1e-9)


def test_a_dense_model_as_its_own_teacher_leaves_something_to_observe(tmp_path):
    model = tiny_model("vit")
    named = OFBTrainer(model, arguments(tmp_path), search_config(), teacher=copy.deepcopy(model))
    assert named.distillation_weight == searcher(tmp_path, model=model).distillation_weight == 0.5
    with pytest.raises(ValueError, match=r"distillation_weight is 1 .*Leave labels a fraction"):
        searcher(tmp_path, model=model, distillation_weight=1.0)


@pytest.mark.slow
def test_a_model_that_was_a_teacher_can_still_be_trained_and_searched(tmp_path):
    dense = tiny_model("vit")
    for _ in range(2):
        trainer = searcher(tmp_path, model=dense, max_steps=4)
        trainer.train()
        resting = [
            name for name, p in trainer.supernet.model.named_parameters() if not p.requires_grad
        ]
        # nothing is repainted after the choice
        assert all(name.endswith("mask_token") for name in resting)
        small = trainer.compress().train()
        DistillationTrainer(
            small, arguments(tmp_path, max_steps=1), teacher=dense, train_dataset=rows()
        ).train()
    assert all(parameter.requires_grad for parameter in dense.parameters())
