"""Our model classes are the stock ones with free widths: same numbers, same interfaces, same way to
and from disk."""

from pathlib import Path

import pytest
import torch
from factories import (
    FAMILIES,
    OURS,
    TOLERANCE,
    randomize_weights_,
    swin_config,
    tiny_images,
    tiny_model,
    vit_config,
)
from huggingface_hub.errors import StrictDataclassFieldValidationError
from invariants import NON_UNIFORM, images_for, ours
from PIL import Image
from runs import run_code
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
    pipeline,
)

import ofb_hf
from ofb_hf import OFBSwinConfig, OFBSwinModel, OFBViTConfig, OFBViTModel, SubnetSpec
from ofb_hf.pruning.surgery import slice_model

ROOT = Path(ofb_hf.__file__).parents[1]

# (config, encoder, classifier) of transformers, and ours; functions that make a tiny stock config.
STOCK = {
    "vit": (ViTConfig, ViTModel, ViTForImageClassification),
    "swin": (SwinConfig, SwinModel, SwinForImageClassification),
}
CONFIGS = {"vit": OFBViTConfig, "swin": OFBSwinConfig}
ENCODERS = {"vit": OFBViTModel, "swin": OFBSwinModel}
TINY = {"vit": vit_config, "swin": swin_config}
# Everything that draws random numbers in training, at rates that show.
NOISE = {
    "vit": {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3},
    "swin": {
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "drop_path_rate": 0.6,
    },
}
# How a query projection is called in checkpoints that were written before transformers 5.
OLD_NAMES = {
    "vit": "vit.encoder.layer.0.attention.attention.query",
    "swin": "swin.encoder.layers.0.blocks.0.attention.self.query",
}


def seeded_logits(model: torch.nn.Module, images: torch.Tensor, seed: int = 5) -> torch.Tensor:
    """Logits of a model that draws its random numbers from this seed."""
    torch.manual_seed(seed)
    return model(images).logits


# ------------------------------------------------------------------------------------ stock == ours


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_lists_our_model_is_the_stock_model(family, attention, dtype, training):
    stock = tiny_model(family, dtype=dtype, attn_implementation=attention, **NOISE[family]).train(
        training
    )
    model = OURS[family].from_dense(stock)
    images, labels = tiny_images(4, dtype=dtype), torch.tensor([0, 2, 1, 2])
    outputs = []
    for network in (stock, model):
        torch.manual_seed(5)
        output = network(images, labels=labels)
        output.loss.backward()
        outputs.append(output)
    assert torch.equal(outputs[1].logits, outputs[0].logits)
    assert torch.equal(outputs[1].loss, outputs[0].loss)
    assert model.config._attn_implementation == attention
    assert model.training == training
    assert model.dtype == dtype
    gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions_are_those_of_the_stock_model(family):
    stock = tiny_model(family)
    model = OURS[family].from_dense(stock)
    expected, output = (
        network(tiny_images(), output_hidden_states=True, output_attentions=True)
        for network in (stock, model)
    )
    assert list(output) == list(expected)
    for name, values in expected.items():
        mine = output[name]
        values, mine = (values, mine) if isinstance(values, tuple) else ((values,), (mine,))
        assert len(mine) == len(values), name
        assert all(torch.equal(one, other) for one, other in zip(mine, values, strict=True)), name


COMMON_FIELDS = [
    {"qkv_bias": False},
    {"hidden_act": "relu"},
    {"image_size": [16, 24]},
    {"num_channels": 1},
    {"layer_norm_eps": 1e-2},
    {"num_labels": 7, "problem_type": "single_label_classification"},
    {"hidden_dropout_prob": 0.4},
    {"attention_probs_dropout_prob": 0.4},
    {"initializer_range": 0.5},
]
FIELDS = {
    "vit": [
        {"hidden_size": 30},
        {"intermediate_size": 19},
        {"num_hidden_layers": 1},
        {"patch_size": 8},
        {"num_attention_heads": 1},
        {"head_dim": 16},
    ],
    "swin": [
        {"embed_dim": 8},
        {"depths": [1, 1, 3], "num_heads": [1, 5, 2], "window_size": 2},
        {"patch_size": 4, "window_size": 2},
        {"window_size": 4},
        {"mlp_ratio": 2},
        {"num_heads": [5, 1]},
        {"drop_path_rate": 0.9},
        {"use_absolute_embeddings": True},
        {"image_size": 17},
        {"encoder_stride": 16},
    ],
}


@pytest.mark.parametrize(
    ("family", "overrides"),
    [(family, overrides) for family in FAMILIES for overrides in [*COMMON_FIELDS, *FIELDS[family]]],
    ids=str,
)
def test_every_field_of_the_stock_config_reaches_ours(family, overrides):
    stock = tiny_model(family, **overrides)
    model = OURS[family].from_dense(stock)
    images = images_for(stock)
    assert torch.equal(model(images).logits, stock(images).logits)
    assert torch.equal(seeded_logits(model.train(), images), seeded_logits(stock.train(), images))
    ignored = {"model_type", "architectures", "transformers_version", "dtype"}
    expected, fields = stock.config.to_dict(), model.config.to_dict()
    assert {name: fields.get(name) for name in expected if name not in ignored} == {
        name: value for name, value in expected.items() if name not in ignored
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_of_the_stock_config_is_forgotten_above(family):
    """What the decoders of masked image modelling and backbones read has no part in a
    classifier."""
    declared = set(STOCK[family][0].__annotations__) - {
        "model_type",
        "attribute_map",
        "_out_features",
        "_out_indices",
    }
    tried = {name for overrides in [*COMMON_FIELDS, *FIELDS[family]] for name in overrides}
    assert declared - tried <= {"encoder_stride", "pooler_output_size", "pooler_act"}


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_travel_with_the_model(family):
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = ours(family, id2label=names, label2id={name: index for index, name in names.items()})
    assert model.config.id2label == names
    assert model.config.label2id["eel"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_draws_the_same_random_numbers(family):
    stock = tiny_model(family, **NOISE[family]).train()
    model = OURS[family].from_dense(stock)
    expected = seeded_logits(stock, tiny_images())
    assert torch.equal(seeded_logits(model, tiny_images()), expected)
    assert not torch.equal(seeded_logits(model, tiny_images(), seed=6), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_leaves_the_stock_model_alone(family):
    stock = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = OURS[family].from_dense(stock)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.num_labels = 9
    assert type(stock) is STOCK[family][2]
    assert type(stock.config) is STOCK[family][0]
    assert stock.config.num_labels == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_stays_frozen(family):
    stock = tiny_model(family)
    stock.base_model.embeddings.requires_grad_(False)
    frozen = {name for name, parameter in stock.named_parameters() if not parameter.requires_grad}
    model = OURS[family].from_dense(stock)
    assert (
        {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        == frozen
        != set()
    )


@pytest.mark.parametrize("old", [True, False], ids=["old names", "new names"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_takes_checkpoints_with_old_and_new_key_names(family, old, tmp_path):
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path, save_original_format=old)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith(OLD_NAMES[family]) for name in saved) == old
    loaded = STOCK[family][2].from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = OURS[family].from_dense(loaded)
    assert torch.equal(model(tiny_images()).logits, stock(tiny_images()).logits)


@pytest.mark.parametrize(
    ("family", "model"),
    [
        *((family, model) for family in FAMILIES for model in (torch.nn.Linear(2, 2), None)),
        ("vit", ViTModel(vit_config())),
        ("swin", SwinModel(swin_config())),
        ("vit", tiny_model("swin")),
        ("swin", tiny_model("vit")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_from_dense_refuses_what_is_no_classifier_of_its_family(family, model):
    with pytest.raises(
        TypeError, match=f"got a {type(model).__name__}; .*{STOCK[family][2].__name__}"
    ):
        OURS[family].from_dense(model)


# ------------------------------------------------------------------------------- non-uniform widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementations_agree(family, dtype):
    model = NON_UNIFORM[family](dtype=dtype)
    images = images_for(model)
    eager = model(images, output_attentions=True)
    model.set_attn_implementation("sdpa")
    sdpa = model(images)
    torch.testing.assert_close(sdpa.logits, eager.logits, atol=TOLERANCE[dtype], rtol=1e-5)
    assert {
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "scaling")
    } == {"sdpa"}
    assert eager.attentions[0] is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_interpolated(family):
    dense = tiny_model(family, **({"use_absolute_embeddings": True} if family == "swin" else {}))
    model, large = OURS[family].from_dense(dense), torch.randn(2, 3, 24, 32)
    output = model(large, interpolate_pos_encoding=True)
    assert output.logits.shape == (2, 3)
    assert torch.equal(output.logits, dense(large, interpolate_pos_encoding=True).logits)
    with pytest.raises((ValueError, RuntimeError), match=r"24|192"):
        model(large)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    plain, checkpointed = NON_UNIFORM[family]().train(), NON_UNIFORM[family]().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(5)
        model(images_for(model), labels=torch.tensor([0, 2])).loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_takes_our_models(family):
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = NON_UNIFORM[family]()
    model.config.id2label = names
    processor = ViTImageProcessorPil(
        size={"height": model.config.image_size, "width": model.config.image_size}
    )
    classify = pipeline("image-classification", model=model, image_processor=processor)
    image = Image.new("RGB", (20, 30), (200, 30, 10))
    result = classify(image, top_k=3)
    probabilities = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    assert {row["label"] for row in result} == set(names.values())
    best = int(probabilities.argmax())
    assert result[0]["label"] == names[best]
    assert result[0]["score"] == pytest.approx(probabilities[best].item(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_has_no_break(family):
    model = NON_UNIFORM[family]()
    images = images_for(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


# ------------------------------------------------------------------------------------- save, reload


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    """(model, folder) of dense and non-uniform models of all families, with images and logits
    beside the weights."""
    rows = []
    for family in FAMILIES:
        for model in (ours(family), NON_UNIFORM[family]()):
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            images = images_for(model)
            torch.save(
                {"images": images, "logits": model(images).logits.detach()}, folder / "expected.pt"
            )
            rows.append((family, model, folder))
    return rows


def test_a_file_holds_the_parameters_and_nothing_else(saved_models):
    for _, model, folder in saved_models:
        saved = load_file(folder / "model.safetensors")
        assert (
            set(saved) == set(model.state_dict()) == {name for name, _ in model.named_parameters()}
        )
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())


def test_reloading_in_this_process_is_bitwise(saved_models):
    for family, model, folder in saved_models:
        images = images_for(model)
        assert type(AutoConfig.from_pretrained(folder)) is CONFIGS[family]
        reloaded = AutoModelForImageClassification.from_pretrained(
            folder, attn_implementation="eager"
        ).eval()
        assert type(reloaded) is OURS[family]
        assert torch.equal(reloaded(images).logits, model(images).logits)
        encoder = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        assert type(encoder) is ENCODERS[family]
        assert (encoder.pooler is None) == (family == "vit")
        states = model(images, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(encoder(images).last_hidden_state, model.base_model.layernorm(states))


RELOAD = """
import warnings
warnings.simplefilter("error")
import torch
import ofb_hf
from transformers import AutoModel, AutoModelForImageClassification
torch.set_num_threads(1)
for folder in {folders!r}:
    expected = torch.load(folder + "/expected.pt", weights_only=True)
    eager = {{"attn_implementation": "eager"}}
    model = AutoModelForImageClassification.from_pretrained(folder, **eager).eval()
    with torch.no_grad():
        assert torch.equal(model(expected["images"]).logits, expected["logits"]), folder
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True, **eager)
    assert not any(info.values()), info
    print(type(model).__name__, type(encoder).__name__)
"""


@pytest.mark.slow
def test_reloading_in_a_fresh_process_is_bitwise_and_silent(saved_models, tmp_path):
    """Only `import ofb_hf`, then the Auto classes; loading the encoder alone drops the classifier
    without a word."""
    folders = [str(folder) for _, _, folder in saved_models]
    status, said = run_code(tmp_path, RELOAD.format(folders=folders))
    assert status == 0, said
    classes = [
        f"{OURS[family].__name__} {ENCODERS[family].__name__}" for family, _, _ in saved_models
    ]
    lines = [line for line in said.splitlines() if line.strip() and "Loading weights" not in line]
    assert lines == classes


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_survives_the_disk(family, tmp_path):
    model = NON_UNIFORM[family](dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    reloaded = OURS[family].from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(reloaded(images_for(model)).logits, model(images_for(model)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_initialised_as_in_the_stock_model(family):
    config = TINY[family](initializer_range=0.05)
    torch.manual_seed(3)
    stock = STOCK[family][2](config)
    torch.manual_seed(3)
    model = OURS[family](CONFIGS[family](**config.to_diff_dict()))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(
        torch.equal(tensor, stock.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
    assert model.classifier.weight.std().item() == pytest.approx(0.05, rel=0.25)


@pytest.mark.parametrize("family", FAMILIES)
def test_randomized_weights_move_the_logits(family):
    """The yardstick of all comparisons here: different weights, visibly different logits."""
    model = NON_UNIFORM[family]()
    before = model(images_for(model)).logits.detach()
    assert before.std() > 0.3
    randomize_weights_(model, seed=1)
    assert (model(images_for(model)).logits - before).abs().max() > 0.3


# ------------------------------------------------------------------------- in transformers' classes


def cut(family, **fields):
    """Our model of a tiny config with these fields."""
    config = TINY[family](encoder_stride=5).to_dict()
    for key in ("model_type", "transformers_version"):
        config.pop(key, None)
    return OURS[family](CONFIGS[family](**config, **fields)).eval()


NOT_FOLLOWED = {
    "tokens": ("vit", {"token_schedule": [[17, 9], [9, 9]]}, "a token_schedule"),
    "scale": ("vit", {"attention_scale": 0.2}, "an attention_scale"),
    # no tensor has another shape: the stock class would make up those of the missing MLP
    "depth": ("vit", {"intermediate_size_per_layer": [72, 0]}, "widths per layer"),
    "width": ("vit", {"intermediate_size_per_layer": [72, 64]}, "widths per layer"),
    "swin scale": ("swin", {"attention_scale_per_stage": [0.2, 0.2]}, "an attention_scale_per"),
    "swin depth": ("swin", {"num_heads_per_block": [[2, 0], [4]]}, "widths per block"),
}


@pytest.mark.parametrize("case", NOT_FOLLOWED)
def test_the_stock_class_stops_where_it_would_compute_something_else(case, tmp_path):
    family, fields, reason = NOT_FOLLOWED[case]
    model = cut(family, **fields)
    model.save_pretrained(tmp_path)
    _, *classes = STOCK[family]
    for stock in classes:
        message = f"encoder_stride.*{reason}.* ofb_hf .*trust_remote_code=True"
        with pytest.raises(StrictDataclassFieldValidationError, match=f"(?s){message}"):
            stock.from_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.encoder_stride == model.config.encoder_stride == 5
    assert loaded.config.to_dict()["encoder_stride"] == 5
    images = tiny_images()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    loaded.save_pretrained(tmp_path / "again")
    texts = [(folder / "config.json").read_text() for folder in (tmp_path, tmp_path / "again")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_class_goes_on_where_it_computes_the_same(family, tmp_path):
    dense = tiny_model(family).eval()
    # cut of nothing: lists and scales of the dense model
    model = slice_model(OURS[family].from_dense(dense), SubnetSpec({}))
    model.save_pretrained(tmp_path)
    loaded = STOCK[family][2].from_pretrained(tmp_path)
    images = tiny_images()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, dense(images).logits)
