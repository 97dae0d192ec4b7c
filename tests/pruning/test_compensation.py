"""After the cut, layers that write into the residual stream are fitted to what the uncut network
writes."""

import copy

import pytest
import torch
from factories import search_config, tiny_model
from invariants import assert_equal_states
from runs import STEPS, searcher
from transformers import TrainerCallback

from ofb_hf import ViTBiMaskConfig, count_macs
from ofb_hf.choice import baselines
from ofb_hf.data import BatchAugmentation
from ofb_hf.families.registry import family_of
from ofb_hf.pruning import compensation, fit
from ofb_hf.pruning.compensation import (
    IMAGES_FILE,
    Compensation,
    compensate_,
    images_to_remember,
    writers,
)
from ofb_hf.pruning.surgery import slice_model

both_families = pytest.mark.parametrize("family", ["vit", "swin"])
CHOICE = round(0.75 * STEPS)  # `settle_at` of search_config


def pair(family, seed=0, share=0.5, dtype=torch.float32, **space):
    """A classifier of ours with random weights, a random cut of it, and which units that has
    left."""
    stock = tiny_model(family, seed, dtype)
    dense = family_of(stock.config).from_dense(stock).eval()
    subnet = baselines.random_subnet(stock, search_config(family, target_macs=share, **space), seed)
    return dense, slice_model(copy.deepcopy(dense), subnet).eval(), subnet


def pixels(count=64, seed=0, dtype=torch.float32):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_writers_are_the_output_layers_of_both_halves_of_every_block():
    vit, swin = (list(writers(tiny_model(family))) for family in ("vit", "swin"))
    layers = range(tiny_model("vit").config.num_hidden_layers)
    assert vit == [
        f"vit.layers.{i}.{name}" for i in layers for name in ("attention.o_proj", "mlp.fc2")
    ]
    depths = tiny_model("swin").config.depths
    assert sum(path.endswith(("o_proj", "fc2")) for path in swin) == 2 * sum(depths)
    assert sum(path.endswith("downsample.reduction") for path in swin) == len(depths) - 1
    assert len(swin) == 2 * sum(depths) + len(depths) - 1


@both_families
def test_a_network_that_lost_nothing_stays_as_it_is(family):
    dense, _, _ = pair(family)
    whole = baselines.uniform_subnet(
        dense, search_config(family, target_macs=1.0), baselines.magnitude_scores(dense)
    )
    before = copy.deepcopy(dense.state_dict())
    assert compensate_(dense, copy.deepcopy(dense), whole, pixels())
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


def _outputs(model, kept):
    """What layers write for `pixels()`, (rows, channels) each; only the kept channels."""
    found, hooks = {}, []
    for path, channels in kept.items():

        def remember(module, args, output, path=path, channels=channels):
            rows = output.flatten(0, -2)
            found[path] = rows if channels is None else rows[:, list(channels)]

        hooks.append(model.get_submodule(path).register_forward_hook(remember))
    with torch.no_grad():
        model(pixel_values=pixels())
    for hook in hooks:
        hook.remove()
    return found


def test_a_unit_whose_double_stays_is_made_up_for_entirely(monkeypatch):
    monkeypatch.setattr(fit, "RIDGE", 1e-12)
    dense, _, _ = pair("vit", dtype=torch.float64)
    fc1 = dense.get_submodule("vit.layers.1.mlp.fc1")
    half = fc1.out_features // 2
    with torch.no_grad():
        fc1.weight[half : 2 * half], fc1.bias[half : 2 * half] = fc1.weight[:half], fc1.bias[:half]
    subnet = baselines.uniform_subnet(
        dense, search_config(target_macs=1.0), baselines.magnitude_scores(dense)
    )
    left = [*range(half), *range(2 * half, fc1.out_features)]
    subnet = type(subnet)(subnet.kept | {"layers.1.mlp": tuple(left)})
    small = slice_model(copy.deepcopy(dense), subnet).eval()
    images = pixels(dtype=torch.float64)
    assert (small(images).logits - dense(images).logits).abs().max() > 1e-4
    compensate_(small, dense, subnet, images)
    other = pixels(8, seed=1, dtype=torch.float64)
    torch.testing.assert_close(small(other).logits, dense(other).logits, rtol=0, atol=1e-5)


@both_families
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_cut_network_writes_more_like_the_uncut_one(family, depth, seed):
    dense, small, subnet = pair(family, seed, search_depth=depth)
    kept = {path: subnet.kept[of] for path, of in writers(small).items()}
    wanted = _outputs(dense, kept)

    def errors():
        written = _outputs(small, dict.fromkeys(kept))
        return torch.stack([(written[path] - wanted[path]).square().mean() for path in kept])

    before = errors()
    fitted = compensate_(small, dense, subnet, pixels())
    assert errors().sum() < 0.95 * before.sum()
    assert set(fitted) <= set(dict(small.named_parameters()))
    assert count_macs(small) == count_macs(dense, subnet)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_it_holds_as_many_images_as_fit(monkeypatch):
    dense, _, _ = pair("vit")
    assert images_to_remember(dense) == compensation.MOST_IMAGES
    monkeypatch.setattr(compensation, "MEMORY", 10**5)
    held = Compensation(dense)
    assert 1 < held.count < 100
    for _ in range(30):
        held.remember(pixels(8))
    assert sum(map(len, held._images)) == held.count


def test_without_images_nothing_is_fitted():
    dense, small, subnet = pair("vit")
    before = copy.deepcopy(small.state_dict())
    assert Compensation(dense).fit_(small, subnet) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


class AtTheChoice(TrainerCallback):
    """Notes the weights, their average and the optimizer's moments right after the choice."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == CHOICE:
            model = self.trainer.supernet.model
            self.weights = {
                name: model.get_parameter(f"{name}.weight").clone() for name in writers(model)
            }
            average = self.trainer.average.part_of("model.")
            self.average = {name: average[f"{name}.weight"].clone() for name in self.weights}
            parameters = [model.get_parameter(f"{name}.weight") for name in self.weights]
            self.moments = [parameter in self.trainer.optimizer.state for parameter in parameters]


@pytest.mark.slow
@both_families
def test_a_search_fits_once_right_after_its_choice(tmp_path, family):
    noted = {}
    for compensate in (True, False):
        noted[compensate] = AtTheChoice()
        config = search_config(family, target_macs=0.6, compensate=compensate)
        trainer = searcher(
            tmp_path, config, callbacks=[noted[compensate]], family=family, ema_decay=0.5
        )
        noted[compensate].trainer = trainer
        trainer.train()
        noted[compensate].subnet = trainer.read_subnet()
        assert trainer.compensation is None
    fitted, plain = noted[True], noted[False]
    assert fitted.subnet == plain.subnet
    for name, weight in fitted.weights.items():
        assert not torch.equal(weight, plain.weights[name])
        torch.testing.assert_close(fitted.average[name], weight)
    assert not any(fitted.moments)
    assert all(plain.moments)


@pytest.mark.slow
def test_a_search_resumed_before_its_choice_fits_to_the_same_images(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    straight = searcher(tmp_path / "straight", **saving)
    straight.train()
    saved = {path.parent.name for path in (tmp_path / "straight").rglob(IMAGES_FILE)}
    assert saved == {f"checkpoint-{step}" for step in range(3, CHOICE, 3)}
    again = searcher(tmp_path / "again", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{CHOICE - 3}"))
    expected = straight.supernet.state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in again.supernet.state_dict().items()
    )


def test_it_looks_at_images_as_the_network_does(tmp_path):
    """Augmentation of whole batches comes with normalisation: before it, images are bytes."""
    trainer = searcher(tmp_path, max_steps=2)
    trainer.batch_augmentation = BatchAugmentation((127.5,) * 3, (127.5,) * 3, 3)
    trainer.train_dataset = [
        row | {"pixel_values": (50 * row["pixel_values"] + 100).clamp(0, 255).byte()}
        for row in trainer.train_dataset
    ]
    seen = []
    trainer.compensation.remember = lambda images: seen.append(images)
    trainer.train()
    assert seen
    assert all(images.is_floating_point() and images.abs().max() < 10 for images in seen)


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_it_fits_in_the_last_step_where_the_choice_falls_there(tmp_path, ema_decay):
    """And fits what is kept: the average of the weights, where there is one."""
    fitted, before = [], []
    trainer = searcher(tmp_path, search_config(target_macs=0.6, settle_at=1.0), ema_decay=ema_decay)
    fit = trainer.compensation.fit_

    def noted(small, subnet):
        names = [f"{path}.weight" for path in writers(small)]
        current = (
            trainer.average.part_of("model.") if trainer.average else dict(small.named_parameters())
        )
        before.append([torch.equal(small.get_parameter(name), current[name]) for name in names])
        fitted.append(fit(small, subnet))
        return fitted[0]

    trainer.compensation.fit_ = noted
    trainer.train()
    assert len(fitted) == 1
    assert fitted[0]
    assert all(before[0])
    compressed = trainer.compress()
    for name, values in fitted[0].items():
        torch.testing.assert_close(compressed.get_parameter(name), values)


@pytest.mark.slow
def test_what_trained_on_with_its_choice_is_not_fitted_when_it_is_cut(tmp_path):
    """The fit knows the dense network's layers, not what was learned since the choice."""
    compressed = {}
    for compensate in (True, False):
        config = search_config(target_macs=0.6, prune_during_search=False, compensate=compensate)
        trainer = searcher(tmp_path, config, ema_decay=0.9)
        trainer.train()
        compressed[compensate] = trainer.compress().state_dict()
    assert_equal_states(compressed[True], compressed[False])


@pytest.mark.slow
def test_no_image_is_kept_after_the_choice(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    searcher(tmp_path / "straight", **saving).train()
    resumed = searcher(tmp_path / "again", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{CHOICE + 3}"))
    resumed.save_model(str(tmp_path / "final"))
    assert resumed.compensation is None
    assert not list((tmp_path / "again").rglob(IMAGES_FILE))
    assert not list((tmp_path / "final").rglob(IMAGES_FILE))


def test_the_papers_preset_does_not_fit():
    assert ViTBiMaskConfig().compensate
    assert not ViTBiMaskConfig(preset="paper").compensate
