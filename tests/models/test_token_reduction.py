"""Models with a token schedule: what they compute, cost, refuse, and that they survive every way of
storing them."""

import json
import math
import os

import numpy as np
import onnxruntime
import pytest
import torch
from factories import SCHEDULE, non_uniform_swin, scheduled_vit, tiny_images, tiny_swin, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from runs import run_code
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForImageClassification

from ofb_hf import (
    OFBSwinConfig,
    OFBSwinForImageClassification,
    OFBViTConfig,
    OFBViTForImageClassification,
    SubnetSpec,
    count_macs,
    count_params,
    install_bi_masks,
    publish,
)
from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.models.modeling_ofb_vit import TokenReduction
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.release.export import export_onnx, export_torch
from ofb_hf.release.stock import pad_to_stock
from ofb_hf.token_search.learned_counts import install_learned_counts


@st.composite
def schedules(draw: st.DrawFn, layers: int = 3, tokens: int = 17) -> list[list[int]]:
    """Any counts, not monotone."""
    count = st.integers(2, tokens)
    return [[draw(count), draw(count)] for _ in range(layers)]


# ------------------------------------------------------------------------ a slow, obvious reference


def attended_by_class(attention, states, sizes):
    """Attention of the class token to every patch, mean over heads, and the output of the
    attention; one image."""
    tokens, heads = len(states), attention.num_attention_heads
    q, k, v = ((project(states)).view(tokens, heads, -1) for project in projections(attention))
    output, importance = torch.zeros_like(v), torch.zeros(tokens, dtype=states.dtype)
    for head in range(heads):
        for row in range(tokens):
            logits = [
                float(q[row, head] @ k[key, head]) * attention.scaling for key in range(tokens)
            ]
            weights = [
                size * math.exp(logit - max(logits))
                for size, logit in zip(sizes, logits, strict=True)
            ]
            total = sum(weights)
            for key in range(tokens):
                output[row, head] += weights[key] / total * v[key, head]
                if row == 0:
                    importance[key] += weights[key] / total / heads
    return attention.o_proj(output.flatten(1)), importance


def projections(attention):
    """The layers of an attention that make queries, keys and values."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def reduce_slowly(states, sizes, importance, kept, merged):
    """Drops and merges one by one, in lists."""
    patches = sorted(range(1, len(states)), key=lambda index: -float(importance[index]))
    order = [0, *patches][:kept]
    tokens, sizes = [states[index] for index in order], [sizes[index] for index in order]
    groups = {target: [tokens[target]] for target in range(min(merged, len(tokens)))}
    gained = [0.0] * len(tokens)
    for index in range(merged, len(tokens)):
        similar = [
            float(torch.cosine_similarity(tokens[index], tokens[target], dim=0))
            for target in range(1, merged)
        ]
        best = max(range(len(similar)), key=similar.__getitem__)
        groups[best + 1].append(tokens[index])
        gained[best + 1] += sizes[index] * max(similar[best], 0.0)
    states = torch.stack([sum(group) / len(group) for group in groups.values()])
    return states, [sizes[target] + gained[target] for target in groups]


@torch.no_grad()
def logits_of_one(model, image):
    """The whole classifier for one image (C, H, W), token by token."""
    vit, config = model.vit, model.config
    states = vit.embeddings(image[None])[0]
    sizes = [1.0] * len(states)
    for layer, (kept, merged) in zip(vit.layers, config.token_schedule, strict=True):
        attended, importance = attended_by_class(
            layer.attention, layer.layernorm_before(states), sizes
        )
        states = states + attended
        if merged < len(states):
            states, sizes = reduce_slowly(states, sizes, importance, kept, merged)
        states = states + layer.mlp(layer.layernorm_after(states))
    return model.classifier(vit.layernorm(states)[0])


@pytest.mark.slow
@given(schedules(), st.sampled_from(["eager", "sdpa"]), st.integers(0, 1000))
def test_the_model_computes_what_a_loop_over_tokens_computes(schedule, implementation, seed):
    model = scheduled_vit(
        schedule, seed=seed, dtype=torch.float64, attn_implementation=implementation
    )
    images = tiny_images(2, seed=seed, dtype=torch.float64)
    expected = torch.stack([logits_of_one(model, image) for image in images])
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_schedule_that_keeps_everything_changes_no_bit(implementation):
    stock = tiny_vit(num_hidden_layers=3, attn_implementation=implementation)
    same = OFBViTForImageClassification.from_dense(stock, token_schedule=[[17, 17]] * 3)
    assert torch.equal(stock(tiny_images()).logits, same(tiny_images()).logits)
    assert count_macs(same) == count_macs(stock)


def test_dropping_takes_the_patches_that_the_class_token_attends_to_least():
    reduction = TokenReduction(kept=3, merged=3)
    tokens, importance = torch.arange(5.0)[None, :, None] + 1, torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    left, sizes = reduction(tokens, None, importance)
    assert left[0, :, 0].tolist() == [1, 3, 5]
    assert sizes is None


def test_sizes_never_fall_below_one_even_where_everything_is_dissimilar():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 6, 4, generator=generator)
    tokens[:, 3:] = -tokens[:, 1:2]  # their only match is their opposite
    _, sizes = TokenReduction(kept=6, merged=2)(
        tokens, None, torch.tensor([[0.9, 0.8, 0.3, 0.2, 0.1]])
    )
    assert (sizes >= 1).all()
    assert torch.isfinite(sizes.log()).all()


def test_merging_identical_patches_keeps_their_feature_and_adds_their_sizes():
    tokens = torch.ones(1, 5, 4)
    left, sizes = TokenReduction(kept=5, merged=2)(
        tokens, None, torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    )
    torch.testing.assert_close(left, torch.ones(1, 2, 4))
    torch.testing.assert_close(sizes, torch.tensor([[1.0, 4.0]]))


def test_outputs_shrink_with_the_tokens():
    output = scheduled_vit()(tiny_images(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [
        (2, n, 40) for n in (17, 15, 7, 2)
    ]
    assert [tuple(weights.shape) for weights in output.attentions] == [
        (2, 5, n, n) for n in (17, 15, 7)
    ]


def test_larger_images_are_cut_to_the_same_counts():
    output = scheduled_vit([[17, 17], [9, 9], [9, 5]]).vit(
        torch.randn(2, 3, 24, 32), interpolate_pos_encoding=True
    )
    assert output.last_hidden_state.shape == (2, 5, 40)


# ----------------------------------------------------------------------------------------- the cost


@given(schedules(), st.booleans())
def test_macs_are_what_torch_counts(schedule, narrow):
    model = OFBViTForImageClassification.from_dense(
        tiny_vit(num_hidden_layers=3), token_schedule=schedule
    )
    if narrow:
        widths = {"num_attention_heads_per_layer": [2, 4, 1], "head_dim_per_layer": [7, 3, 11]}
        widths |= {"intermediate_size_per_layer": [19, 0, 23]}
        model = OFBViTForImageClassification(
            OFBViTConfig.from_dict(model.config.to_dict() | widths)
        ).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny_images(1))
    assert counter.get_total_flops() == 2 * count_macs(model) == 2 * count_macs(model.config)


# ------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[9, 9]], "token_schedule has 1 entries, but num_hidden_layers is 2"),
        ([[9, 9], [9, 1]], r"token_schedule\[1\] is \[9, 1\].*from 2 .*to the 17 tokens"),
        ([[18, 9], [9, 9]], r"token_schedule\[0\] is \[18, 9\]"),
        ([[9], [9, 9]], r"token_schedule\[0\] is \[9\]"),
        ([[9, 9, 9], [9, 9]], r"token_schedule\[0\] is \[9, 9, 9\]"),
        ([[9.5, 9], [9, 9]], r"token_schedule is \[\[9.5, 9\], .*give two whole numbers"),
        ([[True, 9], [9, 9]], r"token_schedule\[0\] is \[1, 9\]"),
        ("9", "token_schedule is '9'; give two whole numbers for each layer"),
        ([9, 9], r"token_schedule is \[9, 9\]; give two whole numbers"),
        ([None, [9, 9]], "give two whole numbers"),
    ],
)
def test_impossible_schedules_are_refused_by_layer_and_value(schedule, message):
    with pytest.raises(Exception, match=message):
        OFBViTConfig(image_size=16, patch_size=4, num_hidden_layers=2, token_schedule=schedule)


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor])
def test_schedules_of_other_types_become_lists_of_whole_numbers(make):
    config = OFBViTConfig(
        image_size=16, patch_size=4, num_hidden_layers=2, token_schedule=make([(17, 9), (9, 5)])
    )
    assert (
        json.loads(config.to_json_string())["token_schedule"]
        == config.token_schedule
        == [[17, 9], [9, 5]]
    )
    assert {type(count) for counts in config.token_schedule for count in counts} == {int}


def test_the_running_minimum_is_what_a_schedule_means():
    config = OFBViTConfig(
        image_size=16,
        patch_size=4,
        num_hidden_layers=3,
        token_schedule=[[17, 9], [12, 10], [8, 11]],
    )
    assert config.token_schedule == [[17, 9], [9, 9], [8, 8]]
    assert [config.token_counts(layer) for layer in range(3)] == [(17, 17, 9), (9, 9, 9), (9, 8, 8)]
    assert OFBViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert OFBViTConfig(num_hidden_layers=1).token_counts(0) == (197, 197, 197)


@pytest.mark.slow
@given(schedules())
def test_a_subnet_with_a_schedule_costs_what_its_model_does(schedule):
    """Any counts: those of the published schedules rise in places."""
    for model in (tiny_vit(num_hidden_layers=3), scheduled_vit()):
        subnet = SubnetSpec({}, schedule)
        assert (
            count_macs(model, subnet)
            == count_macs(model.config, subnet)
            == count_macs(slice_model(model, subnet))
        )
    assert slice_model(model, SubnetSpec({}, [[17, 17]] * 3)).config.token_schedule is None


@pytest.mark.parametrize("use", [count_macs, count_params, slice_model])
def test_subnets_with_schedules_that_no_model_follows_are_refused(use):
    for swin in (tiny_swin(), non_uniform_swin()):
        with pytest.raises(
            UnsupportedArchitectureError, match=r"token_schedule is given for a .*swin.*class token"
        ):
            use(swin, SubnetSpec({}, [[17, 17], [5, 5]]))
    for model in (tiny_vit(), scheduled_vit(num_hidden_layers=2, schedule=[[17, 17], [9, 5]])):
        with pytest.raises(
            ValueError, match=r"token_schedule has 3 entries, but num_hidden_layers is 2"
        ):
            use(model, SubnetSpec({}, SCHEDULE))
        with pytest.raises(ValueError, match=r"token_schedule\[1\] is \[9, 1\]"):
            use(model, SubnetSpec({}, [[17, 17], [9, 1]]))


def test_a_layer_without_attention_lets_all_tokens_pass():
    """Whatever ranks them has to be there."""
    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "num_hidden_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 3,
    }
    sizes |= {"num_attention_heads_per_layer": [3, 0, 2], "intermediate_size": 32}
    with pytest.raises(
        ValueError, match=r"token_schedule\[1\] is \[12, 8\].* 17 tokens .*no attention"
    ):
        OFBViTConfig(**sizes, token_schedule=[[17, 17], [12, 8], [8, 8]])
    config = OFBViTConfig(**sizes, token_schedule=[[12, 8], [9, 9], [5, 4]])
    model = OFBViTForImageClassification(config).eval()
    hidden = model(tiny_images(), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in hidden] == [17, 8, 8, 4]
    with pytest.raises(UnsupportedArchitectureError, match=r"attention in layers \[0, 2\]"):
        install_learned_counts(OFBViTForImageClassification(OFBViTConfig(**sizes)))


def test_what_cannot_work_is_refused():
    model = scheduled_vit()
    with pytest.raises(ValueError, match=r"attention_mask.*token_schedule=None"):
        model.vit(tiny_images(), attention_mask=torch.ones(2, 17))
    with pytest.raises(UnsupportedArchitectureError, match=r"token_schedule.*Search widths first"):
        install_bi_masks(model)
    with pytest.raises(ValueError, match=r"token_schedule.*own class"):
        pad_to_stock(model)
    with pytest.raises(TypeError, match="OFBSwinForImageClassification"):
        OFBViTForImageClassification.from_dense(non_uniform_swin(), token_schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"token_schedule.*windows"):
        OFBSwinForImageClassification.from_dense(non_uniform_swin(), token_schedule=SCHEDULE)
    with pytest.raises(ValueError, match=r"token_schedule.*windows"):
        OFBSwinConfig(token_schedule=SCHEDULE)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*'eager', 'sdpa'"):
        model(tiny_images())


# -------------------------------------------------------------------- storing, exporting, compiling


def test_saved_and_loaded_through_the_auto_classes(tmp_path):
    model = scheduled_vit()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config.token_schedule == SCHEDULE
    assert torch.equal(again(tiny_images()).logits, model(tiny_images()).logits)
    assert AutoModel.from_pretrained(tmp_path)(tiny_images()).last_hidden_state.shape == (2, 2, 40)
    dense = AutoModelForImageClassification.from_pretrained(
        tmp_path, token_schedule=None, attn_implementation="eager"
    )
    assert torch.equal(
        dense(tiny_images()).logits, tiny_vit(num_hidden_layers=3)(tiny_images()).logits
    )
    other = AutoModelForImageClassification.from_pretrained(
        tmp_path, token_schedule=[[9, 4], [17, 17], [3, 3]]
    )
    assert other.vit(tiny_images(), output_hidden_states=True).hidden_states[2].shape[1] == 4


@pytest.mark.slow
def test_published_code_brings_the_schedule_along(tmp_path):
    """Loaded by a process without this package; there is no stock twin, which would not follow the
    schedule."""
    model = scheduled_vit()
    folder = publish(model, output_dir=tmp_path / "published")
    assert not (folder / "stock").exists()
    save_file({"images": tiny_images()}, tmp_path / "images.safetensors")
    script = f"""
import sys; sys.modules["ofb_hf"] = None
import torch, safetensors.torch
from transformers import AutoModelForImageClassification
images = safetensors.torch.load_file({str(tmp_path / "images.safetensors")!r})["images"]
settings = {{"trust_remote_code": True, "attn_implementation": "eager"}}
model = AutoModelForImageClassification.from_pretrained({str(folder)!r}, **settings)
with torch.no_grad():
    answers = {{"logits": model(images).logits}}
safetensors.torch.save_file(answers, {str(tmp_path / "answers.safetensors")!r})
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    status, said = run_code(tmp_path, script, environment=environment)
    assert status == 0, said[-3000:]
    with torch.no_grad():
        assert torch.equal(
            load_file(tmp_path / "answers.safetensors")["logits"], model(tiny_images()).logits
        )


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(tmp_path):
    model = scheduled_vit()
    done = export_onnx(model, tmp_path)
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    for count in (1, 4):
        images = tiny_images(count, seed=count)
        (found,) = session.run(None, {"pixel_values": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(found), model(images).logits, rtol=0, atol=1e-5
            )


@pytest.mark.slow
def test_torch_export_computes_the_same(tmp_path):
    assert export_torch(scheduled_vit(), tmp_path).difference <= 1e-5


@pytest.mark.slow
def test_it_compiles_in_one_piece():
    model = scheduled_vit(attn_implementation="sdpa")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny_images()).logits, model(tiny_images()).logits)


def test_half_precision_stays_near():
    # Patches whose importance differs by less than bfloat16 resolves may change places: most images
    # are near, not all.
    model, half, images = scheduled_vit(), scheduled_vit(dtype=torch.bfloat16), tiny_images(32)
    with torch.no_grad():
        exact, rounded = model(images).logits, half(images.bfloat16()).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images).logits
    assert rounded.dtype == torch.bfloat16
    for found in (rounded, mixed):
        assert (found.float() - exact).abs().amax(1).median() < 0.1


def test_gradients_reach_every_weight_and_checkpointing_does_not_change_them():
    gradients = []
    for checkpointing in (False, True):
        model = scheduled_vit(attn_implementation="sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append(model.vit.embeddings.position_embeddings.grad)
    torch.testing.assert_close(*gradients)
