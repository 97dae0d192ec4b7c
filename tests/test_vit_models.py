"""What is ViT's own: its lists of widths, what they refuse, and where each of them ends up in the network."""

import pytest
import torch
from factories import non_uniform_vit, tiny_images

from ofb_hf import OFBViTConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size_per_layer": [7]}, "intermediate_size_per_layer has 1 entries, but num_hidden_layers is 2"),
        ({"head_dim_per_layer": [3, 3, 3]}, "head_dim_per_layer has 3 entries, but num_hidden_layers is 2"),
        ({"num_attention_heads_per_layer": []}, "num_attention_heads_per_layer has 0 entries"),
        ({"intermediate_size_per_layer": [7, -1]}, r"intermediate_size_per_layer\[1\] is -1"),
        ({"head_dim_per_layer": [-2, 4]}, r"head_dim_per_layer\[0\] is -2"),
        ({"num_attention_heads_per_layer": [-1, 2]}, r"num_attention_heads_per_layer\[0\] is -1"),
        ({"hidden_size": 3}, r"hidden_size is 3, but num_attention_heads is 5; .*head_dim_per_layer"),
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
        OFBViTConfig(**{"num_hidden_layers": 2, "num_attention_heads": 5, "hidden_size": 40} | fields)


def test_a_width_that_is_no_integer_is_refused():
    with pytest.raises(Exception, match="intermediate_size_per_layer"):
        OFBViTConfig(num_hidden_layers=2, intermediate_size_per_layer=[7.5, 8])


def test_layer_sizes_come_from_the_lists_where_there_are_lists():
    config = OFBViTConfig(
        hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=72, head_dim_per_layer=[3, 9]
    )
    assert config.layer_sizes(0) == {"num_attention_heads": 5, "head_dim": 3, "intermediate_size": 72}
    assert config.layer_sizes(1) == {"num_attention_heads": 5, "head_dim": 9, "intermediate_size": 72}
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
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 17, 17) for heads, _, _ in shapes]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_the_scale_in_the_config_is_the_scale_on_the_logits():
    """Attention weights recomputed from the projections of one layer, with 0.37 instead of 7 ** -0.5."""
    model = non_uniform_vit(dtype=torch.float64)
    output = model(tiny_images(dtype=torch.float64), output_hidden_states=True, output_attentions=True)
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
