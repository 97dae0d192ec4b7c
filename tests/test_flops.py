"""Costs are exact: the closed form equals what torch counts, and what lies in the file."""

import random

import pytest
import torch
from factories import (
    non_uniform_vit,
    random_candidate,
    search_config,
    tiny_images,
    tiny_supernet,
    tiny_vit,
    vit_config,
    vit_shapes,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ViTConfig, ViTForImageClassification, ViTModel

from ofb_hf import OFBViTForImageClassification, SubnetSpec, compress, count_macs, count_params, install_bi_masks
from ofb_hf.architectures import UnsupportedArchitectureError
from ofb_hf.surgery import slice_model

DEIT = {"t": (192, 3), "s": (384, 6), "b": (768, 12)}


def deit_config(size: str) -> ViTConfig:
    """DeiT at 224 pixels with 1000 classes."""
    width, heads = DEIT[size]
    return ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)


def counted_macs(model: torch.nn.Module, images: torch.Tensor) -> float:
    """What torch counts in one forward pass, with the attention map computed as two matrix products."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return counter.get_total_flops() / 2


def elements(model: torch.nn.Module) -> int:
    """Parameters of a model, counted."""
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- exact MACs and params


@pytest.mark.parametrize(("size", "giga"), [("t", 1.25), ("s", 4.60), ("b", 17.56)])
def test_deit_costs_what_the_literature_says(size, giga):
    config = deit_config(size)
    assert count_macs(config) / 1e9 == pytest.approx(giga, abs=0.01)
    with torch.device("meta"):
        model, images = ViTForImageClassification(config), torch.empty(1, 3, 224, 224)
    assert count_macs(model) == count_macs(config) == counted_macs(model, images)
    assert count_params(model) == count_params(config) == elements(model)


@pytest.mark.parametrize(("size", "params"), [("t", 5_717_416), ("s", 22_050_664), ("b", 86_567_656)])
def test_deit_has_the_published_number_of_parameters(size, params):
    assert count_params(deit_config(size)) == params


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"qkv_bias": False},
        {"image_size": [16, 24]},
        {"image_size": 18},
        {"num_channels": 1},
        {"num_hidden_layers": 1},
        {"num_labels": 11},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_dense_models(overrides):
    model = tiny_vit(**overrides)
    size = model.config.image_size
    height, width = size if isinstance(size, list) else (size, size)
    images = torch.randn(1, model.config.num_channels, height, width)
    assert count_macs(model) == counted_macs(model, images)
    assert count_params(model) == elements(model)


def test_a_model_with_different_widths_in_every_layer():
    model = non_uniform_vit()
    assert count_macs(model) == count_macs(model.config) == counted_macs(model, tiny_images(1))
    assert count_params(model) == count_params(model.config) == elements(model)


@pytest.mark.parametrize("seed", range(4))
def test_compressed_models(seed, tmp_path):
    model = compress(tiny_supernet(seed, target_macs=0.3 + 0.15 * seed))
    assert count_macs(model) == counted_macs(model, tiny_images(1))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert count_params(model) == sum(tensor.numel() for tensor in saved.values()) == elements(model)


@given(vit_shapes(), st.integers(0, 2**31))
def test_random_subnets_of_random_shapes(shape, seed):
    overrides, candidates = shape
    supernet = install_bi_masks(tiny_vit(**overrides), search_config(**candidates, target_macs=1.0))
    rng = random.Random(seed)
    for mask in supernet.bi_masks:
        mask.settle_(*random_candidate(mask, rng))
    subnet = SubnetSpec({mask.name: mask.kept() for mask in supernet.bi_masks})
    dense = tiny_vit(**overrides)
    small = supernet.fold()
    assert count_macs(dense, subnet) == count_macs(small) == counted_macs(small, tiny_images(1))
    assert count_params(dense, subnet) == count_params(small) == elements(small)


def test_a_partial_subnet_leaves_the_rest_as_it_is():
    ours = OFBViTForImageClassification.from_dense(tiny_vit())
    subnet = SubnetSpec({"layers.1.mlp": (3, 4, 70)})
    assert count_params(ours, subnet) == elements(slice_model(ours, subnet))


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"])
def test_costs_grow_with_every_size(name):
    small = {
        "hidden_size": 40,
        "num_attention_heads": 4,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    large = small | {name: small[name] + 4}
    for count in (count_macs, count_params):
        assert count(vit_config(**large)) > count(vit_config(**small))


@pytest.mark.parametrize("count", [count_macs, count_params])
def test_other_models_are_refused_by_name(count):
    with pytest.raises(UnsupportedArchitectureError, match="ViTModel"):
        count(ViTModel(vit_config()))
    with pytest.raises(UnsupportedArchitectureError, match="resnet"):
        count(ResNetConfig())


# ------------------------------------------------------------------------------------------------------ expected cost


def one_hot_(supernet, seed: int) -> SubnetSpec:
    """Puts all probability on one random candidate per submodule; returns the subnet that it stands for."""
    rng, kept = random.Random(seed), {}
    for mask in supernet.bi_masks:
        size = random_candidate(mask, rng)
        with torch.no_grad():
            mask.alpha.fill_(0.0)
            mask.alpha[mask.index_of(size)] = 1e4
        kept[mask.name] = range(size[0]) if len(size) == 1 else {h: tuple(range(size[1])) for h in range(size[0])}
    return SubnetSpec({name: k if isinstance(k, dict) else tuple(k) for name, k in kept.items()})


@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
@pytest.mark.parametrize("seed", range(5))
def test_expected_cost_of_one_hot_alpha_is_the_cost_of_that_subnet(seed, budget):
    supernet = tiny_supernet(seed, **{budget: 0.5})
    subnet = one_hot_(supernet, seed)
    dense = tiny_vit()
    macs, params = count_macs(dense, subnet), count_params(dense, subnet)
    sizes = supernet.sizes("sparsity")
    assert supernet.expected_macs(sizes).item() == pytest.approx(macs, rel=1e-6)
    cost = params if budget == "target_params" else macs
    assert supernet.expected_cost(sizes).item() == pytest.approx(cost, rel=1e-6)
    supernet.lam.fill_(0.0)
    supernet.refresh_gates()
    assert supernet.expected_cost(supernet.sizes("bi_mask")).item() == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("unsearched", ["embedding", "attention", "mlp"])
def test_expected_cost_counts_what_is_not_searched_in_full(unsearched):
    supernet = tiny_supernet(**{f"search_{unsearched}": False, "target_macs": 0.8})
    subnet = one_hot_(supernet, 0)
    cost = supernet.expected_macs(supernet.sizes("sparsity")).item()
    assert cost == pytest.approx(count_macs(tiny_vit(), subnet), rel=1e-6)


def test_expected_cost_is_differentiable_in_proportion_to_what_a_unit_costs():
    """Gradient of the cost with respect to a submodule's size = MACs of one of its units, the others as they are."""
    supernet = tiny_supernet()
    names = list(supernet.dense_sizes)
    sizes = torch.tensor([30.0, 24.0, 50.0, 40.0, 17.0, 3.0, 5.0], requires_grad=True)  # heads cost no MACs
    supernet.expected_macs(sizes).backward()
    tokens, patches, pixels, labels = 17, 16, 48, 3
    e, attention, mlp = 30.0, 24.0 + 40.0, 50.0 + 17.0
    expected = {
        "embeddings": patches * pixels + labels + 4 * tokens * attention + 2 * tokens * mlp,
        "layers.0.attention": 4 * tokens * e + 2 * tokens**2,
        "layers.0.mlp": 2 * tokens * e,
    }
    for name, value in expected.items():
        assert sizes.grad[names.index(name)].item() == pytest.approx(value, rel=1e-6)


def test_expected_cost_follows_a_network_that_shrank():
    supernet = tiny_supernet(dtype=torch.float64)
    for mask in supernet.bi_masks:
        mask.retire_(torch.ones_like(mask.active_candidates).index_fill_(0, torch.tensor([0, 1]), False))
    before = supernet.expected_macs(supernet.sizes("sparsity")).item()
    supernet.shrink_()
    assert supernet.expected_macs(supernet.sizes("sparsity")).item() == pytest.approx(before, rel=1e-6)
    assert before < count_macs(supernet.config)
