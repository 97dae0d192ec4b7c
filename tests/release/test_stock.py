"""Compressed ViTs as stock checkpoints: the same logits from transformers' own class."""

import itertools
import json

import pytest
import torch
from factories import (
    TOLERANCE,
    non_uniform_swin,
    non_uniform_vit,
    randomize_masks_,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_vit,
    vit_shapes,
)
from hypothesis import given
from transformers import AutoModelForImageClassification, ViTForImageClassification

from ofb_hf import OFBViTForImageClassification, SubnetSpec, count_params, install_bi_masks
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.release.stock import pad_to_stock


def compressed(overrides=None, candidates=None, dtype=torch.float32):
    """A small ViT after a random choice of sizes, masks folded in."""
    supernet = install_bi_masks(
        tiny_vit(dtype=dtype, **(overrides or {})),
        search_config(**(candidates or {}), target_macs=1.0),
    )
    randomize_masks_(supernet)
    settle_randomly_(supernet, seed=7)
    return supernet.eval().fold()


def assert_same(model, stock):
    """Logits and hidden states agree up to rounding."""
    assert type(stock) is ViTForImageClassification
    images = tiny_images(dtype=model.dtype)
    with torch.no_grad():
        expected, got = (m.eval()(images, output_hidden_states=True) for m in (model, stock))
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=TOLERANCE[model.dtype])
    sizes = [model.config.layer_sizes(layer) for layer in range(model.config.num_hidden_layers)]
    present = [True, *(any(size.values()) for size in sizes)]
    for ours, theirs in zip(
        itertools.compress(expected.hidden_states, present), got.hidden_states, strict=True
    ):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=10 * TOLERANCE[model.dtype])


@given(vit_shapes())
def test_padding_changes_nothing(shape):
    overrides, candidates = shape
    model = compressed(overrides, candidates, torch.float64)
    assert_same(model, pad_to_stock(model))


def test_a_padded_model_is_a_stock_checkpoint(tmp_path):
    model = compressed()
    assert len(set(model.config.head_dim_per_layer)) > 1, (
        "choose another seed: this is to be non-uniform"
    )
    pad_to_stock(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit"
    loaded, report = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    assert_same(model, loaded)
    assert loaded.config.id2label == model.config.id2label


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    assert pad_to_stock(compressed().to(dtype)).dtype == dtype


def test_dense_models_are_padded_by_nothing():
    model = OFBViTForImageClassification.from_dense(tiny_vit())
    stock = pad_to_stock(model)
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in model.parameters())
    assert_same(model, stock)


def test_layers_without_anything_are_left_out_and_the_rest_needs_no_padding():
    dense = OFBViTForImageClassification.from_dense(tiny_vit(num_hidden_layers=4))
    gone = {
        "layers.0.attention": {},
        "layers.0.mlp": (),
        "layers.2.attention": {},
        "layers.2.mlp": (),
    }
    model = slice_model(dense, SubnetSpec(gone))
    stock = pad_to_stock(model)
    assert stock.config.num_hidden_layers == 2
    assert count_params(stock) == sum(p.numel() for p in stock.parameters()) == count_params(model)
    assert type(stock) is ViTForImageClassification
    with torch.no_grad():
        torch.testing.assert_close(stock(tiny_images()).logits, model(tiny_images()).logits)


def test_what_has_no_stock_form_is_refused():
    with pytest.raises(TypeError, match="got a OFBSwinForImageClassification; only OFBViT"):
        pad_to_stock(non_uniform_swin())


def test_any_scale_of_the_attention_has_a_stock_form():
    model = non_uniform_vit()
    assert model.config.attention_scale == 0.37
    assert_same(model, pad_to_stock(model))
