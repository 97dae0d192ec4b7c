"""Our model classes are the stock ones with free widths: same numbers, same interfaces, same way to and from disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import TOLERANCE, non_uniform_vit, randomize_weights_, tiny_images, tiny_vit, vit_config
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

import ofb_hf
from ofb_hf import OFBViTConfig, OFBViTForImageClassification, OFBViTModel

ROOT = Path(ofb_hf.__file__).parents[1]


def run_python(script: str) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter that knows our package and has no network."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


# --------------------------------------------------------------------------------------------------- stock == ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_lists_our_model_is_the_stock_model(attention, dtype, training):
    stock = tiny_vit(dtype=dtype, attn_implementation=attention).train(training)
    ours = OFBViTForImageClassification.from_dense(stock)
    images, labels = tiny_images(dtype=dtype), torch.tensor([0, 2])
    expected, output = stock(images, labels=labels), ours(images, labels=labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert ours.config._attn_implementation == attention
    assert ours.training == training
    assert ours.dtype == dtype
    expected.loss.backward()
    output.loss.backward()
    gradients = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


@pytest.mark.parametrize(
    "overrides",
    [
        {"qkv_bias": False},
        {"hidden_act": "relu"},
        {"image_size": [16, 24]},
        {"patch_size": 8},
        {"num_channels": 1},
        {"layer_norm_eps": 1e-3},
        {"num_labels": 7, "problem_type": "single_label_classification"},
        {"num_attention_heads": 1},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_every_field_of_the_stock_config_reaches_ours(overrides):
    stock = tiny_vit(**overrides)
    ours = OFBViTForImageClassification.from_dense(stock)
    height, width = (16, 24) if "image_size" in overrides else (16, 16)
    images = torch.randn(2, overrides.get("num_channels", 3), height, width)
    assert torch.equal(ours(images).logits, stock(images).logits)
    ignored = {"model_type", "architectures", "transformers_version", "dtype"}
    expected, fields = stock.config.to_dict(), ours.config.to_dict()
    assert {name: fields.get(name) for name in expected if name not in ignored} == {
        name: value for name, value in expected.items() if name not in ignored
    }


def test_labels_travel_with_the_model():
    names = {0: "cat", 1: "dog", 2: "eel"}
    stock = tiny_vit(id2label=names, label2id={name: index for index, name in names.items()})
    ours = OFBViTForImageClassification.from_dense(stock)
    assert ours.config.id2label == names
    assert ours.config.label2id["eel"] == 2


def test_dropout_draws_the_same_random_numbers():
    stock = tiny_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    ours = OFBViTForImageClassification.from_dense(stock)
    torch.manual_seed(5)
    expected = stock(tiny_images()).logits
    torch.manual_seed(5)
    assert torch.equal(ours(tiny_images()).logits, expected)
    torch.manual_seed(6)
    assert not torch.equal(ours(tiny_images()).logits, expected)


def test_from_dense_leaves_the_stock_model_alone():
    stock = tiny_vit()
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    ours = OFBViTForImageClassification.from_dense(stock)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.config.num_labels = 9
    assert type(stock) is ViTForImageClassification
    assert type(stock.config) is ViTConfig
    assert stock.config.num_labels == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


def test_from_dense_takes_checkpoints_with_old_key_names(tmp_path):
    stock = tiny_vit()
    stock.save_pretrained(tmp_path, save_original_format=True)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("vit.encoder.layer.0.attention.attention.query") for name in saved)
    loaded = ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = OFBViTForImageClassification.from_dense(loaded)
    assert torch.equal(ours(tiny_images()).logits, stock(tiny_images()).logits)


@pytest.mark.parametrize(
    "model", [torch.nn.Linear(2, 2), ViTModel(vit_config()), None], ids=["Linear", "ViTModel", "None"]
)
def test_from_dense_refuses_what_is_no_vit_classifier(model):
    with pytest.raises(TypeError, match=f"got a {type(model).__name__}"):
        OFBViTForImageClassification.from_dense(model)


# ------------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"intermediate_size_per_layer": [7]}, "intermediate_size_per_layer has 1 entries, but num_hidden_layers is 2"),
        ({"head_dim_per_layer": [3, 3, 3]}, "head_dim_per_layer has 3 entries, but num_hidden_layers is 2"),
        ({"num_attention_heads_per_layer": []}, "num_attention_heads_per_layer has 0 entries"),
        ({"intermediate_size_per_layer": [7, 0]}, r"intermediate_size_per_layer\[1\] is 0"),
        ({"head_dim_per_layer": [-2, 4]}, r"head_dim_per_layer\[0\] is -2"),
        ({"num_attention_heads_per_layer": [0, 2]}, r"num_attention_heads_per_layer\[0\] is 0"),
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


# ------------------------------------------------------------------------------------------------- non-uniform widths


def test_every_layer_has_its_own_widths():
    model = non_uniform_vit()
    state = model.state_dict()
    shapes = [(2, 7, 19), (5, 3, 64), (1, 11, 23)]
    for layer, (heads, head_dim, mlp) in enumerate(shapes):
        path = f"vit.layers.{layer}"
        for name in "qkv":
            assert state[f"{path}.attention.{name}_proj.weight"].shape == (heads * head_dim, 30)
        assert state[f"{path}.attention.o_proj.weight"].shape == (30, heads * head_dim)
        assert state[f"{path}.mlp.fc1.weight"].shape == (mlp, 30)
    output = model(tiny_images(), output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (2, 3)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 17, 30)] * 4
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_implementations_agree(dtype):
    model, images = non_uniform_vit(dtype=dtype), tiny_images(dtype=dtype)
    eager = model(images, output_attentions=True)
    model.set_attn_implementation("sdpa")
    sdpa = model(images)
    torch.testing.assert_close(sdpa.logits, eager.logits, atol=TOLERANCE[dtype], rtol=1e-5)
    assert model.vit.layers[1].attention.config._attn_implementation == "sdpa"
    assert eager.attentions[0] is not None


@pytest.mark.parametrize("stock", [True, False], ids=["dense", "non-uniform"])
def test_positions_are_interpolated(stock):
    dense = tiny_vit()
    model = OFBViTForImageClassification.from_dense(dense) if stock else non_uniform_vit()
    large = torch.randn(2, 3, 24, 32)
    output = model(large, interpolate_pos_encoding=True)
    assert output.logits.shape == (2, 3)
    assert not stock or torch.equal(output.logits, dense(large, interpolate_pos_encoding=True).logits)
    with pytest.raises(ValueError, match="24"):
        model(large)


def test_gradient_checkpointing_changes_no_gradient():
    plain, checkpointed = non_uniform_vit().train(), non_uniform_vit().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)


def test_the_pipeline_takes_our_models():
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = non_uniform_vit()
    model.config.id2label = names
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    classify = pipeline("image-classification", model=model, image_processor=processor)
    image = Image.new("RGB", (20, 30), (200, 30, 10))
    result = classify(image, top_k=3)
    probabilities = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    assert {row["label"] for row in result} == set(names.values())
    best = int(probabilities.argmax())
    assert result[0]["label"] == names[best]
    assert result[0]["score"] == pytest.approx(probabilities[best].item(), abs=1e-5)


# ------------------------------------------------------------------------------------------------------ save, reload


@pytest.fixture(params=["dense", "non-uniform"])
def saved_model(request, tmp_path):
    model = OFBViTForImageClassification.from_dense(tiny_vit()) if request.param == "dense" else non_uniform_vit()
    model.save_pretrained(tmp_path)
    torch.save({"images": tiny_images(), "logits": model(tiny_images()).logits.detach()}, tmp_path / "expected.pt")
    return model, tmp_path


def test_a_file_holds_the_parameters_and_nothing_else(saved_model):
    model, folder = saved_model
    saved = load_file(folder / "model.safetensors")
    assert set(saved) == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())


def test_reloading_in_this_process_is_bitwise(saved_model):
    model, folder = saved_model
    assert type(AutoConfig.from_pretrained(folder)) is OFBViTConfig
    reloaded = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(reloaded) is OFBViTForImageClassification
    assert torch.equal(reloaded(tiny_images()).logits, model(tiny_images()).logits)
    encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(encoder) is OFBViTModel
    assert encoder.pooler is None
    states = model(tiny_images(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(encoder(tiny_images()).last_hidden_state, model.vit.layernorm(states))


RELOAD = """
import warnings
warnings.simplefilter("error")
import torch
import ofb_hf
from transformers import AutoModel, AutoModelForImageClassification
folder = {folder!r}
expected = torch.load(folder + "/expected.pt", weights_only=True)
torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager").eval()
with torch.no_grad():
    assert torch.equal(model(expected["images"]).logits, expected["logits"])
assert not model.training
encoder, info = AutoModel.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
assert not any(info.values()), info
print(type(model).__name__, type(encoder).__name__)
"""


def test_reloading_in_a_fresh_process_is_bitwise_and_silent(saved_model):
    """Only `import ofb_hf`, then the Auto classes; loading the encoder alone drops the classifier without a word."""
    _, folder = saved_model
    result = run_python(RELOAD.format(folder=str(folder)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["OFBViTForImageClassification", "OFBViTModel"]
    said = [line for line in result.stderr.splitlines() if line.strip() and "Loading weights" not in line]
    assert said == []


def test_half_precision_survives_the_disk(tmp_path):
    model = non_uniform_vit(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = OFBViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert reloaded.dtype == torch.bfloat16
    images = tiny_images(dtype=torch.bfloat16)
    assert torch.equal(reloaded(images).logits, model(images).logits)


def test_fresh_weights_are_initialised_as_in_the_stock_model():
    torch.manual_seed(3)
    stock = ViTForImageClassification(vit_config(initializer_range=0.05))
    torch.manual_seed(3)
    ours = OFBViTForImageClassification(OFBViTConfig(**vit_config(initializer_range=0.05).to_diff_dict()))
    assert set(ours.state_dict()) == set(stock.state_dict())
    for name, tensor in ours.state_dict().items():
        expected = stock.state_dict()[name]
        assert tensor.shape == expected.shape
        assert tensor.std().item() == pytest.approx(expected.std().item(), abs=0.02), name


def test_randomized_weights_move_the_logits():
    """The yardstick of all comparisons here: different weights, visibly different logits."""
    model = non_uniform_vit()
    before = model(tiny_images()).logits.detach()
    assert before.std() > 0.3
    randomize_weights_(model, seed=1)
    assert (model(tiny_images()).logits - before).abs().max() > 0.3
