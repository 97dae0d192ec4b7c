"""Costs are exact: the closed form equals what torch counts, and what lies in the file."""

import random
from typing import Any

import pytest
import torch
from factories import (
    FAMILIES,
    OURS,
    SHAPES,
    random_candidate,
    scheduled_vit,
    search_config,
    swin_config,
    tiny_images,
    tiny_model,
    tiny_supernet,
    tiny_swin,
    tiny_vit,
    vit_config,
)
from hypothesis import given
from hypothesis import strategies as st
from invariants import NON_UNIFORM, images_for, names_of
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from ofb_hf import SubnetSpec, compress, count_macs, count_params, install_bi_masks
from ofb_hf.families.description import UnsupportedArchitectureError, quantities
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search.shrinking import shrink_

STOCK = {ViTConfig: ViTForImageClassification, SwinConfig: SwinForImageClassification}


def deit(width: int, heads: int) -> ViTConfig:
    """DeiT at 224 pixels with 1000 classes."""
    return ViTConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000
    )


def swin(width: int, depth: int) -> SwinConfig:
    """Swin at 224 pixels with 1000 classes and heads of 32 channels."""
    heads = [width // 32 * 2**stage for stage in range(4)]
    return SwinConfig(embed_dim=width, depths=[2, 2, depth, 2], num_heads=heads, num_labels=1000)


# Config, exact MACs and parameters, and what the papers report: GFLOPs (which are GMACs) and
# millions of parameters. Swin: arXiv:2103.14030, table 1, with the parameters of the released
# checkpoints.
PUBLISHED = {
    "DeiT-T": (deit(192, 3), 1_253_683_200, 5_717_416, 1.25, 5.7),
    "DeiT-S": (deit(384, 6), 4_598_882_304, 22_050_664, 4.60, 22.1),
    "DeiT-B": (deit(768, 12), 17_563_828_224, 86_567_656, 17.56, 86.6),
    "Swin-T": (swin(96, 6), 4_490_566_656, 28_288_354, 4.5, 28.3),
    "Swin-S": (swin(96, 18), 8_740_875_264, 49_606_258, 8.7, 49.6),
    "Swin-B": (swin(128, 18), 15_430_946_816, 87_768_224, 15.4, 87.8),
}


def counted_macs(model: torch.nn.Module, images: torch.Tensor, **arguments: Any) -> float:
    """What torch counts in one forward pass, with the attention map computed as two matrix
    products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, **arguments)
    return counter.get_total_flops() / 2


def elements(model: torch.nn.Module) -> int:
    """Parameters of a model, counted."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------- exact MACs and params


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "macs", "params", "giga", "mega"), PUBLISHED.values(), ids=PUBLISHED
)
def test_published_networks_cost_what_the_literature_says(config, macs, params, giga, mega):
    assert count_macs(config) == macs
    assert count_params(config) == params
    assert macs / 1e9 == pytest.approx(giga, rel=0.005)
    assert params / 1e6 == pytest.approx(mega, rel=0.005)
    with torch.device("meta"):
        model, images = STOCK[type(config)](config), torch.empty(1, 3, 224, 224)
    assert count_macs(model) == counted_macs(model, images) == macs
    assert count_params(model) == elements(model) == params


COMMON: list[dict[str, Any]] = [
    {},
    {"qkv_bias": False},
    {"image_size": [16, 24]},
    {"image_size": 18},
    {"num_channels": 1},
    {"num_labels": 11},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "vit": [{"num_hidden_layers": 1}, {"head_dim": 16}],
    "swin": [
        {"image_size": 17},  # patch embedding pads
        {"image_size": 14},  # 7 x 7 tokens: windows of 3 and patch merging pad
        {"image_size": [22, 30]},
        {"window_size": 4},  # fits; the last stage is one window
        {"use_absolute_embeddings": True},
        {"use_absolute_embeddings": True, "image_size": [20, 16]},
        {"depths": [1], "num_heads": [4]},
        {"depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 5], "window_size": 1},
        {"mlp_ratio": 2.33, "num_heads": [4, 2]},
    ],
}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [(family, overrides) for family in FAMILIES for overrides in [*COMMON, *OWN[family]]],
    ids=str,
)
def test_dense_models(family, overrides):
    model = tiny_model(family, **overrides)
    assert count_macs(model) == counted_macs(model, images_for(model, 1))
    assert count_params(model) == elements(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_different_widths_everywhere(family):
    model = NON_UNIFORM[family]()
    assert (
        count_macs(model) == count_macs(model.config) == counted_macs(model, images_for(model, 1))
    )
    assert count_params(model) == count_params(model.config) == elements(model)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_models(family, seed, tmp_path):
    model = compress(tiny_supernet(seed, family=family, target_macs=0.3 + 0.15 * seed))
    assert count_macs(model) == counted_macs(model, tiny_images(1))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert (
        count_params(model) == sum(tensor.numel() for tensor in saved.values()) == elements(model)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_random_subnets_of_random_shapes(family, data):
    overrides, candidates = data.draw(SHAPES[family]())
    # Absolute embeddings want whole patches (of 2 and 4 pixels); all else is padded.
    sides = [16, 24] if family == "vit" or overrides["use_absolute_embeddings"] else [16, 19, 26]
    overrides["image_size"] = [data.draw(st.sampled_from(sides)) for _ in range(2)]
    dense = tiny_model(family, **overrides)
    supernet = install_bi_masks(dense, search_config(family, **candidates, target_macs=1.0))
    rng = random.Random(data.draw(st.integers(0, 2**31)))
    for mask in supernet.bi_masks:
        mask.settle_(*random_candidate(mask, rng))
    subnet = SubnetSpec({mask.name: mask.kept() for mask in supernet.bi_masks})
    small = supernet.fold()
    assert (
        count_macs(dense, subnet) == count_macs(small) == counted_macs(small, images_for(small, 1))
    )
    assert count_params(dense, subnet) == count_params(small) == elements(small)


@pytest.mark.parametrize(
    ("family", "name"), [("vit", "layers.1.mlp"), ("swin", "stages.0.blocks.1.mlp")]
)
def test_a_partial_subnet_leaves_the_rest_as_it_is(family, name):
    model = OURS[family].from_dense(tiny_model(family))
    subnet = SubnetSpec({name: (3, 4, 30)})
    sliced = slice_model(model, subnet)
    assert count_params(model, subnet) == elements(sliced) < elements(model)
    assert count_macs(model, subnet) == counted_macs(sliced, tiny_images(1))


GROWTH = {
    "vit": ["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"],
    "swin": ["embed_dim", "mlp_ratio", "depths", "window_size"],
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in GROWTH[family]]
)
def test_costs_grow_with_every_size(family, name):
    def config(factor: int) -> PreTrainedConfig:
        if family == "vit":
            sizes = {
                "hidden_size": 40,
                "num_attention_heads": 4,
                "intermediate_size": 72,
                "num_hidden_layers": 2,
            }
            return vit_config(head_dim=8, **sizes | {name: factor * sizes[name]})
        sizes = {"embed_dim": 20, "mlp_ratio": 2, "depths": [1, 2], "window_size": 2}
        value = (
            [factor * depth for depth in sizes[name]] if name == "depths" else factor * sizes[name]
        )
        return swin_config(**sizes | {name: value})

    for count in (count_macs, count_params):
        assert count(config(2)) > count(config(1))


OTHER_SIZES = [16, 24, (24, 16), (18, 30), (48, 64), 8, (4, 8)]
MODELS = {
    "vit": tiny_vit,
    "vit, widths": NON_UNIFORM["vit"],
    # layers that keep all tokens do so at any size, and the others keep their counts
    "vit, tokens": scheduled_vit,
    "vit, tokens later": lambda: scheduled_vit([[17, 17], [9, 9], [9, 4]]),
    "swin": tiny_swin,
}


@pytest.mark.parametrize("size", OTHER_SIZES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_images_of_another_size(name, size):
    sides = [size, size] if isinstance(size, int) else size
    if name == "swin" and sides not in ([16, 16], [24, 24], (48, 64)):
        pytest.skip("a grid that is smaller than the windows, or padded otherwise than before")
    model = MODELS[name]().eval()
    before = model.config.to_dict()
    images = torch.zeros(1, 3, *sides)
    expected = counted_macs(model, images, interpolate_pos_encoding=True)
    assert count_macs(model, image_size=size) == count_macs(model.config, None, size) == expected
    assert model.config.to_dict() == before


@pytest.mark.parametrize("size", [3, (16, 3), (16, 16, 3), (16.0, 16)], ids=str)
def test_images_without_a_whole_patch_are_refused(size):
    with pytest.raises(ValueError, match=r"image_size is .*at least 4, the size of a patch"):
        count_macs(tiny_vit(), image_size=size)


class Adapted(nn.Module):
    """As PEFT wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model


WRAPPERS = {
    "peft": Adapted,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "all": lambda model: nn.DataParallel(torch.compile(Adapted(model))),
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("count", [count_macs, count_params])
def test_the_model_in_a_wrapper_is_counted(count, name):
    model = NON_UNIFORM["vit"]()
    assert count(WRAPPERS[name](model)) == count(model)
    with pytest.raises(UnsupportedArchitectureError, match="got a Linear"):
        count(WRAPPERS[name](nn.Linear(1, 1)))


@pytest.mark.parametrize("count", [count_macs, count_params])
def test_other_models_are_refused_by_name(count):
    with pytest.raises(UnsupportedArchitectureError, match="ViTModel"):
        count(ViTModel(vit_config()))
    with pytest.raises(UnsupportedArchitectureError, match="SwinModel"):
        count(SwinModel(swin_config()))
    with pytest.raises(UnsupportedArchitectureError, match="resnet"):
        count(ResNetConfig())


@pytest.mark.parametrize(
    "config", [vit_config(patch_size=[2, 4]), swin_config(patch_size=[2, 4])], ids=["vit", "swin"]
)
def test_patches_that_are_not_square_are_refused(config):
    with pytest.raises(UnsupportedArchitectureError, match=r"patch_size is \(2, 4\)"):
        count_macs(config)


# ------------------------------------------------------------------------------------ expected cost


def one_hot_(supernet, seed: int) -> SubnetSpec:
    """Puts all probability on one random candidate per submodule; returns the subnet that it stands
    for."""
    rng, kept = random.Random(seed), {}
    for mask in supernet.bi_masks:
        size = random_candidate(mask, rng)
        with torch.no_grad():
            mask.alpha.fill_(0.0)
            mask.alpha[mask.index_of(size)] = 1e4
        kept[mask.name] = (
            range(size[0]) if len(size) == 1 else {h: tuple(range(size[1])) for h in range(size[0])}
        )
    return SubnetSpec({name: k if isinstance(k, dict) else tuple(k) for name, k in kept.items()})


@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_cost_of_one_hot_alpha_is_the_cost_of_that_subnet(family, seed, budget):
    supernet = tiny_supernet(seed, family=family, **{budget: 0.5})
    subnet = one_hot_(supernet, seed)
    dense = tiny_model(family)
    macs, params = count_macs(dense, subnet), count_params(dense, subnet)
    sizes = supernet.sizes("sparsity")
    assert supernet.decisions.expected_macs(sizes).item() == pytest.approx(macs, rel=1e-6)
    cost = params if budget == "target_params" else macs
    assert supernet.decisions.expected_cost(sizes).item() == pytest.approx(cost, rel=1e-6)
    supernet.lam.fill_(0.0)
    supernet.refresh_gates()
    assert supernet.decisions.expected_cost(supernet.sizes("bi_mask")).item() == pytest.approx(
        cost, rel=1e-6
    )


@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
@pytest.mark.parametrize("unsearched", ["embedding", "attention", "mlp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_cost_counts_what_is_not_searched_in_full(family, unsearched, budget):
    supernet = tiny_supernet(family=family, **{f"search_{unsearched}": False, budget: 0.9})
    subnet = one_hot_(supernet, 0)
    assert not set(names_of(supernet.config, unsearched)) & set(subnet.kept)
    cost = supernet.decisions.expected_cost(supernet.sizes("sparsity")).item()
    count = count_params if budget == "target_params" else count_macs
    assert cost == pytest.approx(count(tiny_model(family), subnet), rel=1e-6)


def test_expected_cost_is_differentiable_in_proportion_to_what_a_unit_costs():
    """Gradient of the cost with respect to a submodule's size = MACs of one of its units, the
    others as they are."""
    supernet = tiny_supernet()
    names = list(quantities(supernet.dense_sizes))
    amounts = dict(zip(supernet.dense_sizes, [30.0, 24.0, 50.0, 40.0, 17.0], strict=True))
    # the others cost no MACs
    sizes = torch.tensor([amounts.get(name, 3.0) for name in names], requires_grad=True)
    supernet.decisions.expected_macs(sizes).backward()
    tokens, patches, pixels, labels = 17, 16, 48, 3
    e, attention, mlp = 30.0, 24.0 + 40.0, 50.0 + 17.0
    expected = {
        "embeddings": patches * pixels + labels + 4 * tokens * attention + 2 * tokens * mlp,
        "layers.0.attention": 4 * tokens * e + 2 * tokens**2,
        "layers.0.mlp": 2 * tokens * e,
    }
    for name, value in expected.items():
        assert sizes.grad[names.index(name)].item() == pytest.approx(value, rel=1e-6)


def test_expected_params_of_a_swin_are_differentiable_in_widths_and_heads():
    """A channel of the second stage costs patch merging and classifier; a head of its own costs its
    position bias."""
    supernet = tiny_supernet(family="swin", target_params=0.5)
    amounts = {
        "stages.0.width": 13.0,
        "stages.1.width": 31.0,
        "stages.1.blocks.0.attention": 21.0,
        "stages.1.blocks.0.attention.heads": 3.0,
        "stages.1.blocks.0.mlp": 50.0,
        "stages.1.blocks.0.attention.presence": 0.5,
        "stages.1.blocks.0.mlp.presence": 0.25,
    }
    names = list(quantities(supernet.dense_sizes))
    sizes = torch.tensor([amounts.get(name, 6.0) for name in names], requires_grad=True)
    supernet.decisions.expected_cost(sizes).backward()
    # weights; biases of o_proj and fc2, LayerNorms
    block = 4 * 21 + 2 * 50 + 0.5 * (1 + 2) + 0.25 * (1 + 2)
    expected = {
        "stages.1.width": 4 * 13 + block + 2 + 3,  # merging, block, final LayerNorm, classifier
        "stages.1.blocks.0.attention": 4 * 31 + 3,
        "stages.1.blocks.0.attention.heads": (2 * 3 - 1) ** 2,
        "stages.1.blocks.0.mlp": 2 * 31 + 1,
        "stages.1.blocks.0.attention.presence": 31 + 2 * 31,
    }
    for name, value in expected.items():
        assert sizes.grad[names.index(name)].item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_cost_follows_a_network_that_shrank(family):
    supernet = tiny_supernet(dtype=torch.float64, family=family)
    for mask in supernet.bi_masks:
        mask.retire_(
            torch.ones_like(mask.active_candidates).index_fill_(0, torch.tensor([0, 1]), False)
        )
    before = supernet.decisions.expected_macs(supernet.sizes("sparsity")).item()
    shrink_(supernet)
    assert supernet.decisions.expected_macs(supernet.sizes("sparsity")).item() == pytest.approx(
        before, rel=1e-6
    )
    assert before < count_macs(supernet.config)
