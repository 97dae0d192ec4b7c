"""What is ViT's own: its lists of widths, what they refuse, and where each of them ends up in the
network."""

import pytest
import torch
from factories import non_uniform_vit, tiny_images, tiny_vit

from ofb_hf import OFBViTConfig, OFBViTForImageClassification


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"intermediate_size_per_layer": [7]},
            "intermediate_size_per_layer has 1 entries, but num_hidden_layers is 2",
        ),
        (
            {"head_dim_per_layer": [3, 3, 3]},
            "head_dim_per_layer has 3 entries, but num_hidden_layers is 2",
        ),
        ({"num_attention_heads_per_layer": []}, "num_attention_heads_per_layer has 0 entries"),
        ({"intermediate_size_per_layer": [7, -1]}, r"intermediate_size_per_layer\[1\] is -1"),
        ({"head_dim_per_layer": [-2, 4]}, r"head_dim_per_layer\[0\] is -2"),
        ({"num_attention_heads_per_layer": [-1, 2]}, r"num_attention_heads_per_layer\[0\] is -1"),
        (
            {"hidden_size": 3},
            r"hidden_size is 3, but num_attention_heads is 5; .*head_dim_per_layer",
        ),
        (
            {"num_attention_heads_per_layer": [5, 6]},
            r"num_attention_heads_per_layer\[1\] is 6.*num_attention_heads is 5",
        ),
        ({"attention_scale": 0.0}, r"attention_scale is 0\.0"),
        ({"attention_scale": -0.5}, r"attention_scale is -0\.5"),
    ],
)
def test_impossible_widths_are_refused_by_field_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        OFBViTConfig(
            **{"num_hidden_layers": 2, "num_attention_heads": 5, "hidden_size": 40} | fields
        )


def test_a_width_that_is_no_integer_is_refused():
    with pytest.raises(Exception, match="intermediate_size_per_layer"):
        OFBViTConfig(num_hidden_layers=2, intermediate_size_per_layer=[7.5, 8])


def test_layer_sizes_come_from_the_lists_where_there_are_lists():
    config = OFBViTConfig(
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=72,
        head_dim_per_layer=[3, 9],
    )
    assert config.layer_sizes(0) == {
        "num_attention_heads": 5,
        "head_dim": 3,
        "intermediate_size": 72,
    }
    assert config.layer_sizes(1) == {
        "num_attention_heads": 5,
        "head_dim": 9,
        "intermediate_size": 72,
    }
    assert OFBViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_every_layer_has_its_own_widths():
    model = non_uniform_vit()
    state = model.state_dict()
    shapes = [(2, 7, 19), (5, 3, 64), (1, 11, 23), (0, 0, 31), (3, 4, 0), (0, 0, 0)]
    for layer, (heads, head_dim, mlp) in enumerate(shapes):
        path = f"vit.layers.{layer}"
        if heads:
            for name in "qkv":
                assert state[f"{path}.attention.{name}_proj.weight"].shape == (heads * head_dim, 30)
            assert state[f"{path}.attention.o_proj.weight"].shape == (30, heads * head_dim)
        if mlp:
            assert state[f"{path}.mlp.fc1.weight"].shape == (mlp, 30)
        tensors = [name for name in state if name.startswith(f"{path}.")]
        assert len(tensors) == (8 + 2 if heads else 0) + (4 + 2 if mlp else 0)
    output = model(tiny_images(), output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (2, 3)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 17, 30)] * 7
    assert torch.equal(output.hidden_states[6], output.hidden_states[5])
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (2, heads, 17, 17) for heads, _, _ in shapes
    ]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_the_scale_in_the_config_is_the_scale_on_the_logits():
    """Attention weights recomputed from the projections of one layer, with 0.37 instead of 7 **
    -0.5."""
    model = non_uniform_vit(dtype=torch.float64)
    output = model(
        tiny_images(dtype=torch.float64), output_hidden_states=True, output_attentions=True
    )
    layer = model.vit.layers[0]
    states = layer.layernorm_before(output.hidden_states[0])
    q = layer.attention.q_proj(states).unflatten(-1, (2, 7)).transpose(1, 2)
    k = layer.attention.k_proj(states).unflatten(-1, (2, 7)).transpose(1, 2)
    torch.testing.assert_close((0.37 * q @ k.mT).softmax(-1), output.attentions[0])


def test_positions_are_interpolated_in_narrow_networks():
    model, large = non_uniform_vit(), torch.randn(2, 3, 24, 32)
    assert model(large, interpolate_pos_encoding=True).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="24"):
        model(large)


def chosen_vit(attention="sdpa", **fields):
    """A model in float64 whose layers differ, and a batch of two images."""
    fields |= {
        "hidden_size": 20,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
    }
    config = OFBViTConfig(**fields, image_size=16, patch_size=4, attn_implementation=attention)
    return OFBViTForImageClassification(config).double(), tiny_images(dtype=torch.float64)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "last",
    [
        {},
        {"num_attention_heads_per_layer": [4, 2, 0], "head_dim_per_layer": [5, 5, 0]},
        {"intermediate_size_per_layer": [24, 10, 0]},
        {
            "num_attention_heads_per_layer": [4, 2, 0],
            "head_dim_per_layer": [5, 5, 0],
            "intermediate_size_per_layer": [24, 10, 0],
        },
    ],
    ids=["whole", "no attention", "no MLP", "neither"],
)
def test_a_last_layer_of_chosen_tokens_gives_what_they_would_be_among_all(last, attention):
    """Logits, tokens, and every gradient."""
    model, images = chosen_vit(attention, **last)
    chosen = torch.tensor([[3, 0, 15], [7, 9, 1]])
    every = model.vit(images).last_hidden_state
    expected = (
        model.classifier(every[:, 0]),
        torch.stack([t[1 + c] for t, c in zip(every, chosen, strict=True)]),
    )
    found = model.forward_chosen(images, None, chosen)
    parameters = [p for name, p in model.named_parameters() if "mask_token" not in name]
    for ours, full in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, full)
    gradients = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), parameters)
        for outs in (found, expected)
    ]
    for mine, full in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, full)


@pytest.mark.parametrize(
    "schedule", [None, [[12, 9], [7, 6], [6, 6]], [[12, 9], [7, 6], [4, 2]]], ids=str
)
def test_a_last_layer_of_the_class_token_alone_gives_its_logits(schedule):
    """With fewer tokens from somewhere on; a last layer that reduces them itself computes what it
    has to."""
    model, images = chosen_vit(token_schedule=schedule)
    seen = []
    model.vit.layers[-1].mlp.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape[1])
    )
    logits, tokens = model.forward_chosen(images, None, torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(logits, model(images).logits)
    reduces = schedule is not None and schedule[-1] != schedule[-2][-1:] * 2
    assert seen == [2 if reduces else 1, 17 if schedule is None else schedule[-1][1]]
    assert tokens.shape[1] == seen[0] - 1


@pytest.mark.slow
@torch.no_grad()
def test_chosen_tokens_are_had_with_flex_attention_too():
    """Its masks have a row for every query, so the last attention is asked about all."""
    model, images = chosen_vit()
    model.float().set_attn_implementation("flex_attention")
    chosen, every = torch.tensor([[3, 0, 15], [7, 9, 1]]), model.vit(images).last_hidden_state
    logits, tokens = model.forward_chosen(images, None, chosen)
    torch.testing.assert_close(logits, model(images).logits)
    torch.testing.assert_close(
        tokens, torch.stack([t[1 + c] for t, c in zip(every, chosen, strict=True)])
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 17])
def test_wanted_tokens_attend_through_a_mask(attention, rows):
    """Of padding, and with a row of its own for every token."""
    model, images = chosen_vit(attention)
    mask = torch.rand(2, 17) < 0.7 if rows == 1 else torch.rand(2, 1, 17, 17) < 0.7
    mask[..., 0] = True
    wanted, every = (
        torch.tensor([[0, 5], [3, 16]]),
        model.vit(images, attention_mask=mask).last_hidden_state,
    )
    found = model.vit(images, attention_mask=mask, wanted=wanted).last_hidden_state
    assert not torch.allclose(every, model.vit(images).last_hidden_state)
    torch.testing.assert_close(
        found, torch.stack([t[w] for t, w in zip(every, wanted, strict=True)])
    )


def test_a_model_without_layers_is_the_stock_one_too():
    stock = tiny_vit(num_hidden_layers=0)
    model = OFBViTForImageClassification.from_dense(stock)
    assert torch.equal(model(tiny_images()).logits, stock(tiny_images()).logits)
