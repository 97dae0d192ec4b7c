"""A model whose classes came by remote code is treated as the same model of this package."""

import copy

import pytest
import torch
from factories import (
    by_remote_code,
    non_uniform_swin,
    non_uniform_vit,
    scheduled_vit,
    tiny_images,
)
from runs import arguments

from ofb_hf import (
    DistillationTrainer,
    SubnetSpec,
    count_macs,
    count_params,
    equivalent_basis,
    install_bi_masks,
    publish,
)
from ofb_hf.families.evaluation import logits_of
from ofb_hf.families.registry import describe, is_ours
from ofb_hf.pictures.token_maps import trace_tokens
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.release.stock import has_stock_twin, pad_to_stock
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.finetune import is_stock

MODELS = {"vit": non_uniform_vit, "swin": non_uniform_swin, "tokens": scheduled_vit}


@pytest.fixture(params=MODELS)
def pair(request):
    """A model of this package, and the same one by remote code."""
    model = MODELS[request.param]().eval()
    return model, by_remote_code(model)


def images_of(model):
    return tiny_images(size=model.config.image_size)


def logits(model):
    with torch.no_grad():
        return model.eval()(images_of(model)).logits


def test_its_cost_is_its_own(pair):
    model, remote = pair
    assert not isinstance(remote, type(model))
    assert count_macs(remote) == count_macs(model) == count_macs(remote.config)
    assert count_params(remote) == sum(each.numel() for each in remote.parameters())
    assert describe(remote.config) == describe(model.config)


def test_it_is_ours(pair):
    _, remote = pair
    assert is_ours(remote)
    assert not is_stock(remote)


def searchable(model):
    """A supernet of a model; its masks begin at the same random numbers every time."""
    torch.manual_seed(0)
    return install_bi_masks(model, default_config(model.config, preset="bi_mask", target_macs=1.0))


def test_it_is_searched_cut_and_rewritten_as_it_is(pair):
    model, remote = pair
    changes = [lambda each: slice_model(each, SubnetSpec({}))]
    changes.append(lambda each: equivalent_basis(each, [images_of(each)]))
    if not getattr(model.config, "token_schedule", None):
        changes.append(searchable)
    for change in changes:
        ours, theirs = change(model), change(remote)
        torch.testing.assert_close(logits(theirs), logits(ours))


def test_it_has_a_stock_twin(pair):
    model, remote = pair
    assert has_stock_twin(remote) == has_stock_twin(model)
    if has_stock_twin(model):
        torch.testing.assert_close(logits(pad_to_stock(remote)), logits(pad_to_stock(model)))


def test_its_tokens_are_traced():
    model = scheduled_vit()
    ours, theirs = (trace_tokens(each, tiny_images()) for each in (model, by_remote_code(model)))
    assert all(map(torch.equal, ours, theirs))


def test_it_is_published(pair, tmp_path):
    model, remote = pair
    publish(remote, output_dir=tmp_path / "remote")
    publish(model, output_dir=tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {path.name for path in (tmp_path / "remote").iterdir()} == names
    for name in ("config.json", "model.safetensors"):
        files = [tmp_path / folder / name for folder in ("remote", "ours")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_it_teaches_and_learns(pair, tmp_path):
    model, remote = pair
    losses = []
    for student, teacher in ((model, model), (remote, remote)):
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            arguments(tmp_path / "out", max_steps=2, distillation_weight=0.5),
            teacher=teacher,
            train_dataset=[
                {"pixel_values": image, "labels": 0}
                for image in images_of(model).repeat(8, 1, 1, 1)
            ],
        )
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_its_logits_leave_out_what_they_do_not_follow_from(pair):
    model, remote = pair
    images = images_of(model)
    given = []
    for each in (model, remote):
        each.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(sorted(kwargs)), with_kwargs=True
        )
    with torch.no_grad():
        torch.testing.assert_close(logits_of(remote, images), logits_of(model, images))
    assert given[0] == given[1]
