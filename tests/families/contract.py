"""What every model family promises, checked on one tiny stock classifier."""

import copy
import random
from pathlib import Path

import torch
from factories import randomize_weights_, tiny_images
from invariants import assert_close, close_masks_, units_to_keep
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ofb_hf import OFBTrainer, OFBTrainingArguments, count_macs, count_params, install_bi_masks
from ofb_hf.families.loading import load_complete_classifier
from ofb_hf.families.registry import describe, family_of
from ofb_hf.pruning.equivalent_basis import equivalent_basis
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import BiMaskConfig, default_config

KINDS = ("embedding", "heads", "channels", "mlp")


def search_for(stock: PreTrainedModel, **fields) -> BiMaskConfig:
    """A search over every kind of unit, halves of blocks included."""
    return default_config(
        stock.config, preset="bi_mask", multiple_of=1, search_depth=True, **fields
    )


def assert_copy(stock: PreTrainedModel) -> None:
    """The copy into our class has the logits of the stock model, bit for bit."""
    images = tiny_images(dtype=stock.dtype)
    family = family_of(stock.config)
    ours = family.from_dense(stock)
    assert type(ours) is family.model_class
    assert torch.equal(ours(images).logits, stock(images).logits)


def assert_costs(model: PreTrainedModel) -> None:
    """Parameters and multiply-accumulates are those that torch counts."""
    model = copy.deepcopy(model)
    # Other kernels are not counted; this one computes in float32 whatever the model's precision.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny_images(1, dtype=model.dtype))
    assert count_macs(model) == counter.get_total_flops() / 2
    assert count_params(model) == sum(parameter.numel() for parameter in model.parameters())


def assert_masks(stock: PreTrainedModel, what: str, seed: int) -> None:
    """Masked units act as if they were not there; costs of the cut network are exact."""
    stock = stock.double()
    images = tiny_images(dtype=torch.float64)
    dense = family_of(stock.config).from_dense(stock)
    subnet = units_to_keep(dense.config, what, random.Random(seed))
    small = slice_model(dense, subnet)
    assert count_macs(small) == count_macs(stock, subnet)
    assert count_params(small) == count_params(stock, subnet)
    assert_costs(small)
    supernet = install_bi_masks(stock, search_for(stock, target_macs=1.0))
    close_masks_(supernet, subnet)
    assert_close(supernet(images).logits, small(images).logits)
    assert_close(supernet.fold()(images).logits, small(images).logits)


def assert_basis(stock: PreTrainedModel) -> None:
    """The equivalent basis computes the same logits."""
    stock = stock.double()
    stock.set_attn_implementation("sdpa")  # the eager softmax rounds to float32
    images = tiny_images(4, dtype=torch.float64)
    rotated = equivalent_basis(stock, [images])
    assert_close(rotated(images).logits, stock(images).logits)


def assert_search(stock: PreTrainedModel, folder: Path) -> None:
    """A search ends under its budget, and its result is the same after a reload."""
    images = torch.randn(16, stock.config.num_channels, 16, 16)
    rows = [{"pixel_values": image, "labels": row % 3} for row, image in enumerate(images)]
    args = OFBTrainingArguments(
        str(folder / "run"),
        max_steps=12,
        per_device_train_batch_size=8,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    config = search_for(stock, target_macs=0.5, importance_hold=0.2, settle_at=0.7)
    trainer = OFBTrainer(stock.train(), args, config, train_dataset=rows)
    trainer.train()
    small = trainer.compress().eval()
    assert count_macs(small) <= 0.5 * count_macs(stock)
    assert_costs(small)
    small.save_pretrained(folder / "small")
    again = load_complete_classifier(folder / "small")
    assert type(again) is type(small)
    again.set_attn_implementation(small.config._attn_implementation)  # not in the file
    assert describe(again.config).sizes == describe(small.config).sizes
    assert torch.equal(again(tiny_images()).logits, small(tiny_images()).logits)


def randomized(stock: PreTrainedModel) -> PreTrainedModel:
    """A classifier with weights that are large enough to matter, in evaluation mode."""
    randomize_weights_(stock)
    return stock.eval()
