"""What only Swin brings: widths per stage, grids that windows and merging have to pad, bias tables
that count heads."""

import random

import pytest
import torch
from factories import randomize_masks_, search_config, settle_randomly_, tiny_supernet, tiny_swin
from invariants import (
    assert_close,
    close_masks_,
    images_for,
    living_subnet,
    names_of,
    open_masks_,
    ours,
    seeded,
    units_to_keep,
)

from ofb_hf import (
    OFBSwinForImageClassification,
    SubnetSpec,
    compress,
    count_macs,
    count_params,
    install_bi_masks,
)
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search.shrinking import shrink_
from ofb_hf.search.supernet import Supernet

THREE_STAGES = {
    "image_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 24,
    "depths": [2, 2, 2],
    "num_heads": [2, 3, 6],
}
WIDTHS = {"stages.0.width": 20, "stages.1.width": 44, "stages.2.width": 70}
CANDIDATES = {
    "embedding_candidates": [20, 24, 44, 48, 70, 96],
    "head_candidates": [1, 2, 3, 4, 6],
    "head_dim_candidates": [5, 7, 12, 16],
    "mlp_candidates": [19, 43, 61, 86, 101, 172],
}
# Images of 18 and 22 pixels give grids of 9 and 11, which neither windows nor merging divide;
# patches do not tile 17.
NETWORKS = {
    "three stages": THREE_STAGES | CANDIDATES,
    "depths 1, 3": {"depths": [1, 3]},
    "one stage": {"depths": [3], "num_heads": [4]},
    "positions": {"use_absolute_embeddings": True},
    "no biases": {"qkv_bias": False},
    "18 pixels": {"image_size": 18},
    "22 pixels": {"image_size": 22, "depths": [2, 2, 2], "num_heads": [2, 4, 8], "window_size": 2},
    "17 pixels": {"image_size": 17},
    "18 x 14 pixels": {"image_size": [18, 14]},
}
every_network = pytest.mark.parametrize("fields", NETWORKS.values(), ids=NETWORKS)


def dense_fields(fields: dict) -> dict:
    """The fields of the network without those of its search, and with much drop path."""
    return {"drop_path_rate": 0.6} | {
        name: value for name, value in fields.items() if name not in CANDIDATES
    }


def swin_and_search(fields: dict, **search) -> tuple[OFBSwinForImageClassification, Supernet]:
    """A dense model in float64 and a supernet of it with random masks, both in training mode."""
    dense = ours("swin", dtype=torch.float64, **dense_fields(fields)).train()
    candidates = {name: fields.get(name) for name in CANDIDATES}
    if None in candidates.values():
        candidates["multiple_of"] = 1
    supernet = install_bi_masks(dense, search_config("swin", **candidates, **search)).double()
    randomize_masks_(supernet)
    return dense, supernet


# ----------------------------------------------------------------- masked, folded, sliced, shrunken


@every_network
def test_an_open_supernet_is_the_stock_model(fields):
    stock, (_, supernet) = (
        tiny_swin(dtype=torch.float64, **dense_fields(fields)),
        swin_and_search(fields),
    )
    open_masks_(supernet)
    images = images_for(stock)
    for training in (False, True):
        expected = seeded(stock.train(training), images).logits
        assert torch.equal(seeded(supernet.train(training), images).logits, expected)


@every_network
@pytest.mark.parametrize("what", ["embedding", "attention", "mlp", "all"])
def test_masked_equals_sliced_also_while_training(what, fields):
    """The same random numbers drop the same paths."""
    dense, supernet = swin_and_search(fields)
    images = images_for(dense)
    if what == "all":
        settle_randomly_(supernet, 0)
        supernet.lam.fill_(0.0)
    else:
        # A half that is gone would draw no random number for its path.
        close_masks_(supernet, units_to_keep(dense.config, what, random.Random(1), smallest=1))
    small = slice_model(dense, living_subnet(supernet))
    folded, logits = supernet.fold(), seeded(supernet, images).logits
    assert (logits - seeded(dense, images).logits).abs().max() > 1e-3
    assert (logits - supernet.eval()(images).logits).abs().max() > 1e-3
    shrink_(supernet.train())
    for model in (small, folded, supernet):
        assert_close(seeded(model, images).logits, logits)


@every_network
def test_compress_keeps_the_function_of_random_masks(fields):
    dense, supernet = swin_and_search(fields, target_macs=0.6)
    small, images = compress(supernet), images_for(dense)
    assert count_macs(small) <= 0.6 * count_macs(dense)
    supernet.decisions.settle_()
    assert_close(seeded(small, images).logits, seeded(supernet, images).logits)


def test_stages_take_widths_that_do_not_double():
    dense, supernet = swin_and_search(NETWORKS["three stages"])
    for name, width in WIDTHS.items():
        supernet.named_masks[name].settle_(width)
    supernet.eval()
    small, images = supernet.fold(), images_for(dense)
    assert small.config.hidden_size_per_stage == [20, 44, 70]
    assert (small.config.embed_dim, small.config.hidden_size, small.swin.num_features) == (
        20,
        70,
        70,
    )
    masked, output = (model(images, output_hidden_states=True) for model in (supernet, small))
    assert_close(output.logits, masked.logits)
    assert [state.shape[1:] for state in output.hidden_states] == [
        (256, 20),
        (64, 44),
        (16, 70),
        (16, 70),
    ]
    shapes = [state.shape[1:] for state in output.reshaped_hidden_states]
    assert shapes == [(20, 16, 16), (44, 8, 8), (70, 4, 4), (70, 4, 4)]


def test_merging_reads_the_four_neighbours_of_every_living_channel():
    """Channel i of a stage stands at i, i + C, i + 2C and i + 3C of what merging concatenates."""
    dense = ours("swin")
    kept, dense_merging = (1, 4, 19), dense.swin.encoder.layers[0].downsample
    merging = (
        slice_model(dense, SubnetSpec({"stages.0.width": kept})).swin.encoder.layers[0].downsample
    )
    columns = [1, 4, 19, 21, 24, 39, 41, 44, 59, 61, 64, 79]
    assert torch.equal(merging.reduction.weight, dense_merging.reduction.weight[:, columns])
    assert torch.equal(merging.norm.bias, dense_merging.norm.bias[columns])


def test_removed_heads_take_their_relative_positions_along():
    dense, name = ours("swin"), names_of(tiny_swin().config, "attention")[-1]
    small = slice_model(dense, SubnetSpec({name: {0: (1, 2), 3: (0, 9)}}))
    tables = [
        {
            key: table
            for key, table in model.named_parameters()
            if key.endswith("relative_position_bias_table")
        }
        for model in (dense, small)
    ]
    *others, last = tables[0]
    assert torch.equal(tables[1][last], tables[0][last][:, [0, 3]])
    assert all(torch.equal(tables[1][key], tables[0][key]) for key in others)


# --------------------------------------------------------------------------- a budget of parameters


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75, 9_000])
def test_compress_stays_within_a_budget_of_parameters(budget):
    supernet = tiny_supernet(family="swin", target_params=budget)
    small = compress(supernet)
    params, dense = (
        sum(parameter.numel() for parameter in model.parameters()) for model in (small, tiny_swin())
    )
    limit = budget * dense if budget < 1 else budget
    assert 0.9 * limit < params <= limit
    assert params == count_params(small)


def test_fewer_heads_of_more_channels_save_relative_positions_only():
    """Six units as 3 heads of 2 or as 2 heads of 3: the difference is one column of the 5 x 5
    table."""
    name = names_of(tiny_swin().config, "attention")[-1]
    subnets = [
        SubnetSpec({name: {head: tuple(range(channels)) for head in range(heads)}})
        for heads, channels in ((3, 2), (2, 3))
    ]
    three, two = (count_params(tiny_swin(), subnet) for subnet in subnets)
    assert three - two == 25
