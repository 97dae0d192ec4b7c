"""Masked, folded and sliced networks compute the same function, whichever units are missing."""

import copy
import itertools
import random

import pytest
import torch
from factories import (
    FAMILIES,
    OURS,
    SHAPES,
    randomize_masks_,
    retire_some_,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
from hypothesis import given
from hypothesis import strategies as st
from invariants import (
    DTYPES,
    assert_close,
    assert_state,
    attention_scales,
    close_masks_,
    copy_of_state,
    living_subnet,
    names_of,
    open_masks_,
    ours,
    seeded,
    sizes_of,
    units_to_keep,
)

from ofb_hf import SubnetSpec, compress, count_macs, count_params, install_bi_masks, read_subnet
from ofb_hf.families.registry import describe
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search.shrinking import shrink_

both_families = pytest.mark.parametrize("family", FAMILIES)

# ----------------------------------------------------------------------------- I2: masked == sliced


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "what"),
    [
        *itertools.product(FAMILIES, ["embedding", "heads", "channels", "mlp"]),
        ("swin", "one width"),
    ],
)
@given(st.data(), st.integers(0, 2**31))
def test_masked_units_act_as_if_they_were_not_there(what, family, data, seed):
    """In float64: shapes this small can have channels so alike that a norm magnifies what float32
    rounds."""
    overrides, _ = data.draw(SHAPES[family]())
    dense = ours(family, seed % 97, torch.float64, **overrides)
    config = search_config(
        family, **dict.fromkeys(("embedding_candidates", "head_candidates"), None)
    )
    config.head_dim_candidates = config.mlp_candidates = None
    config.target_macs, config.search_depth = 1.0, True
    supernet = install_bi_masks(dense, config)
    subnet = units_to_keep(dense.config, what, random.Random(seed))
    close_masks_(supernet, subnet)
    small = slice_model(dense, subnet)
    images = tiny_images(dtype=torch.float64)
    assert count_macs(small) == count_macs(dense, subnet)
    assert (
        count_params(small)
        == count_params(dense, subnet)
        == sum(p.numel() for p in small.parameters())
    )
    assert_close(supernet(images).logits, small(images).logits)
    assert_close(supernet.fold()(images).logits, small(images).logits)
    shrink_(supernet)
    assert_close(supernet(images).logits, small(images).logits)


@pytest.mark.slow
@both_families
@given(st.data(), st.integers(0, 2**31))
def test_random_masks_over_random_candidates_fold_shrink_and_compress_alike(family, data, seed):
    overrides, candidates = data.draw(SHAPES[family]())
    dense = tiny_model(family, seed % 97, torch.float64, **overrides)
    supernet = install_bi_masks(
        dense, search_config(family, **candidates, target_macs=1.0)
    ).double()
    randomize_masks_(supernet, seed % 89)
    retire_some_(supernet, seed, share=0.7)
    images = tiny_images(dtype=torch.float64)
    logits = supernet(images).logits
    assert_close(supernet.fold()(images).logits, logits)
    shrink_(supernet)
    assert_close(supernet(images).logits, logits)
    subnet, small = read_subnet(supernet), compress(supernet)
    supernet.decisions.settle_()
    assert living_subnet(supernet) == subnet
    assert_close(small(images).logits, supernet(images).logits)
    assert count_macs(small) == count_macs(dense, subnet) <= supernet.target


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in FAMILIES for name in describe(tiny_model(family).config).sizes],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_submodule_acts_as_if_it_were_sliced(dtype, family, name):
    dense, images = ours(family, dtype=dtype), tiny_images(dtype=dtype)
    supernet, logits = (
        install_bi_masks(dense, search_config(family, search_depth=True)),
        dense(images).logits,
    )
    subnets = [units_to_keep(dense.config, name, random.Random(seed)) for seed in range(6)]
    smaller = [subnet for subnet in subnets if sizes_of(subnet) != supernet.dense_sizes]
    assert len(smaller) > 2
    for subnet in smaller:
        assert {
            other for other, size in sizes_of(subnet).items() if size != supernet.dense_sizes[other]
        } == {name}
        masked = copy.deepcopy(supernet)
        close_masks_(masked, subnet)
        assert_close(masked(images).logits, slice_model(dense, subnet)(images).logits)
        assert (masked(images).logits - logits).abs().max() > 1e-4


@both_families
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(2))
def test_all_outputs_of_the_masked_model_hold_those_of_the_small_one(seed, lam, dtype, family):
    """Hidden states and attentions of the living units are equal, and there is nothing in the
    residual stream besides."""
    dense = ours(family, seed, dtype)
    supernet = install_bi_masks(dense, search_config(family)).to(dtype)
    randomize_masks_(supernet, seed, lam=lam)
    settle_randomly_(supernet, seed)
    subnet, images = living_subnet(supernet), tiny_images(dtype=dtype)
    flags = {"output_hidden_states": True, "output_attentions": True}
    small = slice_model(dense, subnet) if lam == 0 else supernet.fold()
    masked, output = supernet(images, **flags), small(images, **flags)
    assert_close(masked.logits, output.logits)
    assert (masked.logits - dense(images).logits).abs().max() > 1e-2
    assert masked.keys() == output.keys() >= {"hidden_states", "attentions"}
    assert_streams_agree(masked, output, subnet, names_of(dense.config, "embedding"))
    for index, name in enumerate(attentions_with_maps(dense.config)):
        assert_close(masked.attentions[index][:, list(subnet.kept[name])], output.attentions[index])
    assert len(masked.attentions) == len(output.attentions) == index + 1


def assert_streams_agree(masked, sliced, subnet: SubnetSpec, widths: list[str]) -> None:
    """Living channels of all hidden states are equal and the others 0; state i belongs to width i
    or the last one."""
    for field, axis in (("hidden_states", -1), ("reshaped_hidden_states", 1)):
        for index, theirs in enumerate(sliced.get(field, ())):
            channels = list(subnet.kept[widths[min(index, len(widths) - 1)]])
            state = masked[field][index].movedim(axis, -1)
            assert_close(state[..., channels], theirs.movedim(axis, -1))
            dead = [channel for channel in range(state.shape[-1]) if channel not in channels]
            assert (state[..., dead] == 0).all()


def attentions_with_maps(config) -> list[str]:
    """The attentions whose maps a model returns: all of them, or the last one of every stage."""
    names = names_of(config, "attention")
    last = {name.partition(".blocks.")[0]: name for name in names}
    return list(last.values())


@both_families
def test_slicing_gives_a_new_model_of_the_same_make(family):
    dense = ours(family, dtype=torch.float64, id2label={0: "a", 1: "b", 2: "c"})
    config, state = dense.config.to_dict(), copy_of_state(dense)
    attention, width = (
        names_of(dense.config, "attention")[-1],
        names_of(dense.config, "embedding")[-1],
    )
    subnet = SubnetSpec({width: (1, 5, 39), attention: {0: (2, 7), 3: (0, 1)}})
    for training in (True, False):
        small = slice_model(dense.train(training), subnet)
        assert small.training == training
        assert small.dtype == torch.float64
        assert small.config._attn_implementation == dense.config._attn_implementation == "eager"
        assert small.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert_state(dense, state)
    assert dense.config.to_dict() == config


@both_families
def test_every_unit_matters(family):
    """The yardstick for the tests above: with a single unit missing, whichever it is, the logits
    differ."""
    dense = ours(family, dtype=torch.float64)
    images = tiny_images(dtype=torch.float64)
    logits = dense(images).logits
    for name, shape in describe(dense.config).sizes.items():
        for unit in (0, shape[0] - 1):
            rest = tuple(index for index in range(shape[0]) if index != unit)
            kept = {head: tuple(range(shape[1])) for head in rest} if len(shape) == 2 else rest
            assert (
                slice_model(dense, SubnetSpec({name: kept}))(images).logits - logits
            ).abs().max() > 1e-5, name


# -------------------------------------------------------------------------------------- I3: folding


@both_families
@pytest.mark.parametrize("retire", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_folding_keeps_the_function(seed, dtype, training, retire, family):
    supernet = tiny_supernet(seed, dtype, family).train(training)
    if retire:
        retire_some_(supernet, seed, share=0.8)
    before = copy_of_state(supernet)
    folded, images = supernet.fold(), tiny_images(dtype=dtype)
    assert_close(seeded(folded, images).logits, seeded(supernet, images).logits)
    assert folded.training == training
    assert folded.dtype == dtype
    assert type(folded) is OURS[family]
    assert_state(supernet, before)
    assert any(not mask.alive.all() for mask in supernet.bi_masks) == retire


@both_families
def test_a_folded_model_carries_nothing_of_the_search(family):
    folded = compress(tiny_supernet(family=family))
    fresh = OURS[family](folded.config)
    assert {n: t.shape for n, t in folded.state_dict().items()} == {
        n: t.shape for n, t in fresh.state_dict().items()
    }
    for module in folded.modules():
        assert not type(module).__name__.startswith("Gated")
        assert not hasattr(module, "_gate_store")
    for mark in ("mask", "alpha", "importance", "pmim", "decoder"):
        assert not any(mark in name for name in folded.state_dict()), mark


@both_families
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_compress_is_settle_fold_and_slice(seed, dtype, family):
    supernet, images = (
        tiny_supernet(seed, dtype, family, target_macs=0.45),
        tiny_images(dtype=dtype),
    )
    before, scales = copy_of_state(supernet), attention_scales(supernet)
    subnet = read_subnet(supernet)
    small = compress(supernet)
    assert_state(supernet, before)
    settled = copy.deepcopy(supernet)
    assert settled.decisions.settle_() == subnet
    assert_close(small(images).logits, settled(images).logits)
    assert describe(small.config).sizes == sizes_of(subnet)
    assert attention_scales(small) == attention_scales(OURS[family](small.config)) == scales


@both_families
def test_compressing_again_changes_nothing(family):
    supernet = tiny_supernet(dtype=torch.float64, family=family, target_macs=0.45)
    supernet.decisions.settle_()
    first = compress(supernet)
    shrink_(supernet)
    assert shrink_(supernet) == ({}, {})
    assert supernet.decisions.is_settled
    second, images = compress(supernet), tiny_images(dtype=torch.float64)
    assert_close(second(images).logits, first(images).logits)
    assert second.config.to_dict() == first.config.to_dict()


@both_families
def test_compressed_models_can_be_searched_again(family):
    small = compress(tiny_supernet(dtype=torch.float64, family=family, target_macs=0.6))
    config = search_config(family, target_macs=0.7)
    config.embedding_candidates = config.head_candidates = config.head_dim_candidates = (
        config.mlp_candidates
    ) = None
    config.multiple_of = 1
    supernet = install_bi_masks(small, config)
    open_masks_(supernet)
    images = tiny_images(dtype=torch.float64)
    assert torch.equal(supernet(images).logits, small(images).logits)
    again = compress(install_bi_masks(small, config))
    assert count_macs(again) <= 0.7 * count_macs(small)
    assert attention_scales(again) == attention_scales(small)
