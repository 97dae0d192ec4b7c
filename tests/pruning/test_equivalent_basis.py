"""An equivalent basis changes no logit, whatever the shape; and its units fall off in order."""

import copy
import random

import pytest
import torch
from factories import (
    FAMILIES,
    non_uniform_vit,
    tiny_images,
    tiny_model,
    tiny_swin,
    tiny_vit,
)
from hypothesis import given
from hypothesis import strategies as st

from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.families.registry import family_of
from ofb_hf.pruning.equivalent_basis import FLOOR, balanced_maps, equivalent_basis

# The eager attention of transformers computes its softmax in float32.
SDPA = "sdpa"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@torch.no_grad()
def difference(model, other, images):
    """Largest difference of logits, as a fraction of the largest logit."""
    wanted = model.eval()(pixel_values=images).logits
    found = other.eval()(pixel_values=images).logits
    return float((wanted - found).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family, streams, heads, dtype):
    model = tiny_model(family, dtype=dtype, attn_implementation=SDPA)
    images = tiny_images(8, seed=1, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    result = equivalent_basis(model, [images[:4], images[4:]], heads=heads, streams=streams)
    assert difference(model, result, tiny_images(6, seed=2, dtype=dtype)) < TOLERANCE[dtype]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@given(st.integers(0, 10_000))
def test_the_function_stays_for_many_vit_shapes(seed):
    rng = random.Random(seed)
    heads, head_dim = rng.randint(1, 4), rng.randint(1, 12)
    model = tiny_vit(
        seed,
        torch.float64,
        SDPA,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_hidden_layers=rng.randint(1, 3),
        intermediate_size=rng.randint(1, 40),
        qkv_bias=rng.random() < 0.7,
    )
    images = tiny_images(rng.randint(1, 6), seed=seed, dtype=torch.float64)
    result = equivalent_basis(model, [images])
    assert difference(model, result, tiny_images(3, seed=seed + 1, dtype=torch.float64)) < 1e-10


@given(st.integers(0, 10_000))
def test_the_function_stays_for_many_swin_shapes(seed):
    rng = random.Random(seed)
    width = 2 * rng.randint(2, 9)
    model = tiny_swin(
        seed,
        torch.float64,
        SDPA,
        embed_dim=width,
        depths=[rng.randint(1, 2) for _ in range(rng.randint(1, 2))],
        num_heads=[1, 2],
        window_size=rng.choice([2, 3, 4]),
        qkv_bias=rng.random() < 0.7,
    )
    images = tiny_images(2, seed=seed, dtype=torch.float64)
    result = equivalent_basis(model, [images])
    assert difference(model, result, tiny_images(2, seed=seed + 1, dtype=torch.float64)) < 1e-10


def test_models_with_unequal_widths_and_missing_halves_keep_their_function():
    model = non_uniform_vit(dtype=torch.float64)
    model.set_attn_implementation(SDPA)
    result = equivalent_basis(model, [tiny_images(4, dtype=torch.float64)])
    assert difference(model, result, tiny_images(4, seed=3, dtype=torch.float64)) < 1e-10


def test_half_precision_is_widened():
    model = tiny_vit(dtype=torch.bfloat16)
    result = equivalent_basis(model, [tiny_images(4)])
    assert result.dtype == torch.float32
    assert difference(model.float(), result, tiny_images(4, seed=3)) < 1e-4


def test_channels_of_a_head_are_balanced_uncorrelated_and_sorted():
    model = tiny_vit(dtype=torch.float64)
    images = tiny_images(32, dtype=torch.float64)
    result = equivalent_basis(model, [images])
    head = family_of(result.config).bases(result.config).heads[0]
    outputs = {}
    for path in (head.queries, head.keys):
        result.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: outputs.update({path: output})
        )
    with torch.no_grad():
        result(pixel_values=images)
    moments = {}
    for path, output in outputs.items():
        rows = output.unflatten(-1, (head.num_heads, head.head_dim))  # (B, N, H, D)
        if path == head.keys:
            rows = rows - rows.mean(1, keepdim=True)
        rows = rows.flatten(0, 1).transpose(0, 1)  # (H, rows, D)
        moments[path] = rows.mT @ rows / rows.shape[1]
    of_queries, of_keys = moments[head.queries], moments[head.keys]
    scale = of_queries.abs().max()
    torch.testing.assert_close(of_queries, of_keys, atol=1e-4 * float(scale), rtol=1e-3)
    diagonal = of_queries.diagonal(dim1=1, dim2=2)
    assert (diagonal.diff(dim=1) <= 1e-6 * scale).all()
    off_diagonal = of_queries - torch.diag_embed(diagonal)
    assert off_diagonal.abs().max() < 1e-6 * scale


def test_a_stream_is_sorted_by_what_the_norms_give_out():
    model = tiny_vit(dtype=torch.float64)
    images = tiny_images(64, dtype=torch.float64)

    def energies(network):
        """Mean square of the normalized channels, all norms together."""
        total = []
        stream = family_of(network.config).bases(network.config).streams[0]
        hooks = [
            network.get_submodule(norm.norm).register_forward_hook(
                lambda module, args, output: total.append(output.flatten(0, 1))
            )
            for norm in stream.norms
        ]
        with torch.no_grad():
            network(pixel_values=images)
        for hook in hooks:
            hook.remove()
        return torch.cat(total).square().mean(0)

    given = energies(equivalent_basis(model, [images], streams=False))
    rotated = energies(equivalent_basis(model, [images]))
    # Half of the channels hold more than before, and the first ones more than the last.
    half = len(rotated) // 2
    assert rotated[:half].sum() / rotated.sum() > given.sort(descending=True).values[
        :half
    ].sum() / (given.sum())
    assert rotated[:8].mean() > 2 * rotated[-8:].mean()


def test_maps_of_two_sides_are_inverse_to_each_other():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 5, 7, 20, dtype=torch.float64, generator=generator)
    moments, counterpart = sides @ sides.mT
    first, second = balanced_maps(moments, counterpart)
    identity = torch.eye(7, dtype=torch.float64).expand(5, 7, 7)
    torch.testing.assert_close(first @ second.mT, identity, atol=1e-9, rtol=0)


def test_no_images_and_broken_weights_are_refused():
    model = tiny_vit()
    with pytest.raises(ValueError, match="batches holds no image"):
        equivalent_basis(model, [])
    with torch.no_grad():
        model.vit.layers[1].attention.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.q_proj gives out numbers"):
        equivalent_basis(model, [tiny_images(2)])
    with pytest.raises(UnsupportedArchitectureError):
        equivalent_basis(torch.nn.Linear(2, 2), [tiny_images(2)])


def test_moments_with_rounding_below_zero_have_finite_maps():
    """As sums of float32 products have where rows hardly differ."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(1, 4, 4, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([4.0, 1e-9, 0.0, -20 * FLOOR], dtype=torch.float64)
    moments = (vectors * values) @ vectors.mT
    first, second = balanced_maps(moments, torch.eye(4, dtype=torch.float64)[None])
    assert bool(first.isfinite().all())
    identity = torch.eye(4, dtype=torch.float64)[None]
    torch.testing.assert_close(first.mT @ second, identity, rtol=0, atol=1e-6)
