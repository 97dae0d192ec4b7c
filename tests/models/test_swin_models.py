"""What is Swin's own: lists per stage and block, windows and shifts, patch merging between stages
of any widths."""

import pytest
import torch
from factories import non_uniform_swin, randomize_weights_, swin_config, tiny_images, tiny_swin
from invariants import images_for, ours
from torch import Tensor
from transformers import SwinModel
from transformers.models.swin.modeling_swin import SwinAttention

from ofb_hf import OFBSwinConfig, OFBSwinForImageClassification, OFBSwinModel

# Stages of 20, 44 and 70 channels; per block (heads, channels per head, MLP channels): as in
# `non_uniform_swin`.
WIDTHS = [20, 44, 70]
BLOCKS = [
    [(2, 7, 19), (1, 3, 64), (0, 0, 27)],
    [(3, 11, 23), (0, 0, 0)],
    [(8, 5, 31), (0, 0, 90), (5, 9, 0), (1, 4, 12)],
]
SCALES = [0.37, 0.21, 0.53]
LISTS = {
    "hidden_size_per_stage": WIDTHS,
    "num_heads_per_block": [[heads for heads, _, _ in stage] for stage in BLOCKS],
    "head_dim_per_block": [[head_dim for _, head_dim, _ in stage] for stage in BLOCKS],
    "intermediate_size_per_block": [[mlp for _, _, mlp in stage] for stage in BLOCKS],
    "attention_scale_per_stage": SCALES,
}


def config_with(**fields) -> OFBSwinConfig:
    """Two stages of 20 and 40 channels, 2 and 1 blocks, 2 and 4 heads."""
    return OFBSwinConfig(
        **{"embed_dim": 20, "depths": [2, 1], "num_heads": [2, 4], "mlp_ratio": 1.8} | fields
    )


# ------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size_per_stage": [20]},
            r"hidden_size_per_stage has 1 entries, but depths is \[2, 1\]; .*stage, 2",
        ),
        ({"hidden_size_per_stage": []}, r"hidden_size_per_stage has 0 entries"),
        ({"hidden_size_per_stage": [20, 0]}, r"hidden_size_per_stage\[1\] is 0"),
        (
            {"hidden_size_per_stage": [16, 40]},
            r"hidden_size_per_stage\[0\] is 16, but embed_dim is 20",
        ),
        (
            {"hidden_size_per_stage": [20, 3]},
            r"hidden_size_per_stage\[1\] is 3, .*num_heads\[1\] is 4; .*head_dim_per_block",
        ),
        (
            {"num_heads_per_block": [[2, 1]]},
            r"num_heads_per_block has 1 entries, but depths is \[2, 1\]; .*stage, 2",
        ),
        (
            {"num_heads_per_block": [[2], [4]]},
            r"num_heads_per_block\[0\] has 1 entries, .*\[2, 1\]; .*block, 2",
        ),
        (
            {"num_heads_per_block": [[2, 1], [4, 4]]},
            r"num_heads_per_block\[1\] has 2 entries, .* block, 1",
        ),
        (
            {"num_heads_per_block": [[2, -1], [4]]},
            r"num_heads_per_block\[0\]\[1\] is -1; .* at least 0",
        ),
        (
            {"num_heads_per_block": [[2, 3], [4]]},
            r"num_heads_per_block\[0\]\[1\] is 3, but num_heads\[0\] is 2",
        ),
        (
            {"num_heads_per_block": [[2, 2], [5]]},
            r"num_heads_per_block\[1\]\[0\] is 5, but num_heads\[1\] is 4",
        ),
        ({"head_dim_per_block": [[3, 3], [3], [3]]}, r"head_dim_per_block has 3 entries"),
        ({"head_dim_per_block": [[3, 3], []]}, r"head_dim_per_block\[1\] has 0 entries"),
        ({"head_dim_per_block": [[3, 3], [-2]]}, r"head_dim_per_block\[1\]\[0\] is -2"),
        (
            {"intermediate_size_per_block": [[7, 7, 7], [7]]},
            r"intermediate_size_per_block\[0\] has 3 entries",
        ),
        (
            {"intermediate_size_per_block": [[-1, 7], [7]]},
            r"intermediate_size_per_block\[0\]\[0\] is -1",
        ),
        ({"attention_scale_per_stage": [0.5]}, r"attention_scale_per_stage has 1 entries"),
        ({"attention_scale_per_stage": [0.5, 0.0]}, r"attention_scale_per_stage\[1\] is 0\.0"),
        ({"attention_scale_per_stage": [-0.5, 0.5]}, r"attention_scale_per_stage\[0\] is -0\.5"),
        (
            {"attention_scale_per_stage": [0.5, float("nan")]},
            r"attention_scale_per_stage\[1\] is nan",
        ),
    ],
)
def test_impossible_widths_are_refused_by_field_place_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        config_with(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size_per_stage": [20, 39.5]},
        {"num_heads_per_block": [2, 4]},
        {"head_dim_per_block": [[3, 2.5], [3]]},
        {"intermediate_size_per_block": [["7", 7], [7]]},
        {"attention_scale_per_stage": ["0.5", 0.5]},
    ],
    ids=str,
)
def test_lists_of_other_types_are_refused(fields):
    (field,) = fields
    with pytest.raises(Exception, match=field):
        config_with(**fields)


def test_sizes_without_lists_are_those_of_the_stock_model():
    config = config_with()
    assert [config.stage_width(stage) for stage in (0, 1)] == [20, 40]
    assert config.layer_sizes(0, 1) == {
        "num_attention_heads": 2,
        "head_dim": 10,
        "intermediate_size": 36,
    }
    assert config.layer_sizes(1, 0) == {
        "num_attention_heads": 4,
        "head_dim": 10,
        "intermediate_size": 72,
    }


def test_sizes_come_from_the_lists_where_there_are_lists():
    config = config_with(hidden_size_per_stage=[20, 30], head_dim_per_block=[[3, 9], [5]])
    assert config.layer_sizes(0, 0) == {
        "num_attention_heads": 2,
        "head_dim": 3,
        "intermediate_size": 36,
    }
    assert config.layer_sizes(0, 1) == {
        "num_attention_heads": 2,
        "head_dim": 9,
        "intermediate_size": 36,
    }
    assert config.layer_sizes(1, 0) == {
        "num_attention_heads": 4,
        "head_dim": 5,
        "intermediate_size": 54,
    }
    assert config_with(hidden_size_per_stage=[20, 30]).layer_sizes(1, 0)["head_dim"] == 7
    heads = config_with(num_heads_per_block=[[2, 1], [3]])
    assert [heads.layer_sizes(0, block)["num_attention_heads"] for block in (0, 1)] == [2, 1]
    assert heads.layer_sizes(1, 0) == {
        "num_attention_heads": 3,
        "head_dim": 10,
        "intermediate_size": 72,
    }


def test_the_hidden_size_is_the_width_of_the_last_stage(tmp_path):
    """Other libraries read it as the width of the output; the stock config would put 80 here."""
    config = non_uniform_swin().config
    assert config.hidden_size == 70
    config.save_pretrained(tmp_path)
    assert OFBSwinConfig.from_pretrained(tmp_path).hidden_size == 70
    assert config_with().hidden_size == swin_config().hidden_size == 40


def test_a_config_survives_json(tmp_path):
    config = non_uniform_swin().config
    config.save_pretrained(tmp_path)
    for again in (
        OFBSwinConfig.from_dict(config.to_dict()),
        OFBSwinConfig.from_pretrained(tmp_path),
    ):
        assert {name: getattr(again, name) for name in LISTS} == LISTS
        assert again.to_diff_dict() == OFBSwinConfig.from_dict(config.to_dict()).to_diff_dict()
        assert again.num_heads == [2, 4, 8]
        assert again.depths == [3, 2, 4]


# ------------------------------------------------------------------------------- non-uniform widths


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of `non_uniform_swin`: patches of 2 pixels, windows of 4 tokens, 3 labels."""

    def layer(path: str, outputs: int, *inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{path}.weight": (outputs, *inputs), f"{path}.bias": (outputs,)}

    shapes = layer("swin.embeddings.patch_embeddings.projection", 20, 3, 2, 2) | layer(
        "swin.embeddings.norm", 20
    )
    for stage, (width, blocks) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
        for block, (heads, head_dim, mlp) in enumerate(blocks):
            path = f"swin.encoder.layers.{stage}.blocks.{block}"
            if heads:
                for letter in "qkv":
                    shapes |= layer(f"{path}.attention.{letter}_proj", heads * head_dim, width)
                shapes |= layer(f"{path}.attention.o_proj", width, heads * head_dim)
                shapes[f"{path}.attention.relative_position_bias.relative_position_bias_table"] = (
                    7 * 7,
                    heads,
                )
                shapes |= layer(f"{path}.layernorm_before", width)
            if mlp:
                shapes |= layer(f"{path}.mlp.fc1", mlp, width) | layer(
                    f"{path}.mlp.fc2", width, mlp
                )
                shapes |= layer(f"{path}.layernorm_after", width)
        if stage < 2:
            path = f"swin.encoder.layers.{stage}.downsample"
            shapes |= layer(f"{path}.norm", 4 * width)
            shapes[f"{path}.reduction.weight"] = (WIDTHS[stage + 1], 4 * width)
    return shapes | layer("swin.layernorm", 70) | layer("classifier", 3, 70)


def test_every_tensor_has_the_widths_of_its_stage_and_block():
    shapes = {name: tuple(tensor.shape) for name, tensor in non_uniform_swin().state_dict().items()}
    assert shapes == expected_shapes()


def test_states_and_attentions_have_the_widths_of_their_stages():
    """One state after the patch embedding and after every stage, merged for the next one already;
    one attention map per stage, of its last block, for every window; of no heads if that block has
    no attention."""
    model = non_uniform_swin()
    output = model(images_for(model), output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (2, 3)
    assert [tuple(s.shape) for s in output.hidden_states] == [
        (2, 256, 20),
        (2, 64, 44),
        (2, 16, 70),
        (2, 16, 70),
    ]
    shapes = [tuple(states.shape) for states in output.reshaped_hidden_states]
    assert shapes == [(2, 20, 16, 16), (2, 44, 8, 8), (2, 70, 4, 4), (2, 70, 4, 4)]
    for states, reshaped in zip(output.hidden_states, output.reshaped_hidden_states, strict=True):
        assert torch.equal(reshaped.flatten(2).mT, states)
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (32, 0, 16, 16),
        (8, 0, 16, 16),
        (2, 1, 16, 16),
    ]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def attention_weights(
    attention: SwinAttention, states: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Softmax over the window of scale x q k' + position bias + mask: (windows, heads, tokens,
    tokens)."""
    heads, (windows, tokens, _) = attention.num_attention_heads, states.shape
    q = attention.q_proj(states).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = attention.k_proj(states).unflatten(-1, (heads, -1)).transpose(1, 2)
    position = attention.relative_position_bias
    bias = position.relative_position_bias_table[position.relative_position_index].view(
        tokens, tokens, heads
    )
    logits = scale * q @ k.mT + bias.permute(2, 0, 1)
    if mask is not None:
        logits = logits + mask.repeat(windows // len(mask), 1, 1)[:, None]
    return logits.softmax(-1)


@pytest.mark.parametrize("scales", [SCALES, None], ids=["given", "derived"])
def test_the_scale_of_a_stage_is_the_scale_on_the_logits_of_its_blocks(scales):
    """Recomputed in every block; without a list it is that of the heads as they are, which is
    seldom what one wants."""
    config = OFBSwinConfig(
        **non_uniform_swin().config.to_dict() | {"attention_scale_per_stage": scales}
    )
    model = (
        OFBSwinForImageClassification._from_config(config, attn_implementation="eager")
        .double()
        .eval()
    )
    randomize_weights_(model)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, SwinAttention):
            module.register_forward_hook(
                lambda module, args, output: seen.append((module, *args, output[1]))
            )
    model(images_for(model))
    assert len(seen) == 6
    expected = [
        scales[stage] if scales else dim**-0.5
        for stage, row in enumerate(BLOCKS)
        for _, dim, _ in row
        if dim
    ]
    for (module, states, mask, weights), scale in zip(seen, expected, strict=True):
        torch.testing.assert_close(weights, attention_weights(module, states, mask, scale))
    # the second block of the first stage is shifted
    assert sum(mask is not None for _, _, mask, _ in seen) == 1


def test_drop_path_grows_with_depth():
    config = OFBSwinConfig(**non_uniform_swin().config.to_dict() | {"drop_path_rate": 0.5})
    model = OFBSwinForImageClassification(config)
    rates = [
        getattr(b.drop_path, "drop_prob", 0.0)
        for stage in model.swin.encoder.layers
        for b in stage.blocks
    ]
    assert rates == pytest.approx([0.5 * index / 8 for index in range(9)])


def test_a_pooled_encoder_and_the_classifier_agree():
    model = non_uniform_swin()
    images = images_for(model)
    encoder = OFBSwinModel(model.config).eval()
    encoder.load_state_dict(model.swin.state_dict())
    assert torch.equal(model.classifier(encoder(images).pooler_output), model(images).logits)
    assert OFBSwinModel(model.config, add_pooling_layer=False).eval()(images).pooler_output is None


def test_an_encoder_with_mask_token_is_the_stock_one():
    stock = SwinModel(
        swin_config(use_absolute_embeddings=True), add_pooling_layer=False, use_mask_token=True
    ).eval()
    randomize_weights_(stock)
    model = OFBSwinModel(
        OFBSwinConfig(**stock.config.to_diff_dict()), add_pooling_layer=False, use_mask_token=True
    )
    model.load_state_dict(stock.state_dict())
    masked = torch.rand(2, 64) < 0.4
    output, expected = (net(tiny_images(), bool_masked_pos=masked) for net in (model.eval(), stock))
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert not torch.equal(output.last_hidden_state, model(tiny_images()).last_hidden_state)
    assert output.pooler_output is None


# ------------------------------------------------------------------------------- images of any size


@pytest.mark.parametrize("size", [(16, 24), (17, 16), (19, 31), (12, 12), (32, 48)], ids=str)
def test_images_of_other_sizes_are_taken_as_in_the_stock_model(size):
    stock = tiny_swin(drop_path_rate=0.0)
    images = torch.randn(2, 3, *size)
    assert torch.equal(ours("swin", drop_path_rate=0.0)(images).logits, stock(images).logits)


def two_shifted_stages() -> OFBSwinForImageClassification:
    """Windows of 4: an image of 16 pixels is one window for the second stage, one of 32 pixels is
    four."""
    return ours("swin", depths=[2, 2], window_size=4)


def test_what_a_layer_computes_does_not_depend_on_images_seen_before():
    """A small image switches off the shift of a stage: for itself, not for all images to come."""
    model, small, large = two_shifted_stages(), tiny_images(size=16), tiny_images(size=32)
    expected = two_shifted_stages()(large).logits
    shifts = []
    model.swin.encoder.layers[1].blocks[1].register_forward_hook(
        lambda block, *_: shifts.append(block.shift_size)
    )
    first = model(small).logits
    assert torch.equal(model(large).logits, expected)
    assert torch.equal(model(small).logits, first)
    assert shifts == [0, 2, 0]


def test_checkpointed_blocks_see_the_size_of_the_image_that_they_are_recomputed_for():
    """Backward runs through the large image's blocks after the small image went through them."""
    gradients = []
    for checkpointed in (False, True):
        model = two_shifted_stages().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(tiny_images(size=32)).logits.square().sum()
        loss = loss + model(tiny_images(size=16)).logits.square().sum()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
