"""A supernet is its dense model until masks close; installing one disturbs nothing; and it runs
wherever models run."""

import copy

import pytest
import torch
from factories import (
    AWKWARD,
    FAMILIES,
    OURS,
    randomize_masks_,
    randomize_weights_,
    retire_some_,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
from invariants import (
    DTYPES,
    KINDS,
    LABELS,
    NON_UNIFORM,
    assert_close,
    assert_state,
    attention_scales,
    copy_of_state,
    gradients_of,
    images_for,
    masked_patches,
    names_of,
    open_masks_,
    ours,
    search_loss,
    seeded,
)
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, SwinModel, ViTModel

from ofb_hf import (
    SubnetSpec,
    SwinBiMaskConfig,
    ViTBiMaskConfig,
    compress,
    count_macs,
    install_bi_masks,
)
from ofb_hf.families.description import UnsupportedArchitectureError, heads_of
from ofb_hf.families.registry import describe
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search.shrinking import shrink_
from ofb_hf.search.supernet import Supernet

both_families = pytest.mark.parametrize("family", FAMILIES)

# -------------------------------------------------------------------------------- I1: stock == open


@both_families
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("importance", [None, 100.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_supernet_with_open_masks_is_the_stock_model(
    attention, dtype, importance, training, family
):
    stock = tiny_model(family, dtype=dtype, attn_implementation=attention).train(training)
    supernet = install_bi_masks(stock, search_config(family))
    assert supernet.training == training
    open_masks_(supernet, importance)
    images = tiny_images(dtype=dtype)
    expected, output = seeded(stock, images, labels=LABELS), seeded(supernet, images, labels=LABELS)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


@both_families
def test_an_open_supernet_has_the_stock_models_gradients(family):
    stock = tiny_model(family).train()
    supernet = install_bi_masks(stock, search_config(family))
    open_masks_(supernet)
    for model in (stock, supernet):
        seeded(model, tiny_images(), labels=LABELS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in supernet.model.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("vit", {}), ("swin", {}), ("swin", {"use_absolute_embeddings": True})],
    ids=str,
)
def test_open_masks_leave_all_outputs_of_the_stock_model(family, overrides):
    stock = tiny_model(family, **overrides)
    supernet = install_bi_masks(stock, search_config(family))
    open_masks_(supernet)
    large = torch.randn(2, 3, 24, 20)
    flags = {
        "output_hidden_states": True,
        "output_attentions": True,
        "interpolate_pos_encoding": True,
    }
    expected, output = stock(large, **flags), supernet(large, **flags)
    assert output.keys() == expected.keys() >= {"logits", "hidden_states", "attentions"}
    for name in expected.keys() - {"logits"}:
        assert len(output[name]) == len(expected[name]) > 0
        assert all(
            torch.equal(one, other) for one, other in zip(output[name], expected[name], strict=True)
        ), name


@both_families
def test_what_compress_gives_for_a_full_budget_is_the_stock_model(family):
    stock = tiny_model(family)
    supernet = install_bi_masks(stock, search_config(family, target_macs=1.0))
    open_masks_(supernet)
    assert torch.equal(compress(supernet)(tiny_images()).logits, stock(tiny_images()).logits)


@both_families
def test_a_model_with_different_widths_can_be_searched(family):
    dense = NON_UNIFORM[family](dtype=torch.float64)
    unlisted = dict.fromkeys(AWKWARD[family])
    config = search_config(family, target_macs=0.6, multiple_of=1, **unlisted)
    supernet, images = install_bi_masks(dense, config), images_for(dense)
    open_masks_(supernet)
    assert torch.equal(supernet(images).logits, dense(images).logits)
    supernet = install_bi_masks(dense, config).double()
    randomize_masks_(supernet)
    settled = copy.deepcopy(supernet)
    settled.decisions.settle_()
    small = compress(supernet)
    assert_close(small(images).logits, settled(images).logits)
    assert attention_scales(small) == attention_scales(dense)


# ----------------------------------------------------------------------------- what stays untouched


@both_families
@pytest.mark.parametrize("make", [tiny_model, ours], ids=["stock", "ours"])
def test_installing_masks_leaves_the_dense_model_alone(make, family):
    dense = make(family)
    config, logits, state = (
        dense.config.to_dict(),
        dense(tiny_images()).logits,
        copy_of_state(dense),
    )
    classes = [type(module) for module in dense.modules()]
    supernet = install_bi_masks(dense, search_config(family))
    randomize_masks_(supernet)
    supernet.decisions.settle_()
    shrink_(supernet)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert [type(module) for module in dense.modules()] == classes
    assert dense.config.to_dict() == config
    assert_state(dense, state)
    assert torch.equal(dense(tiny_images()).logits, logits)


@both_families
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_copy_of_a_supernet_is_independent(evaluated, family):
    supernet, images = tiny_supernet(family=family), tiny_images()
    if evaluated:
        supernet(images)
    logits = (
        supernet(images).logits.detach()
        if evaluated
        else copy.deepcopy(supernet)(images).logits.detach()
    )
    twin = copy.deepcopy(supernet)
    assert torch.equal(twin(images).logits, logits)
    randomize_masks_(twin, seed=9)
    twin.decisions.settle_()
    shrink_(twin)
    changed = twin(images).logits
    assert (changed - logits).abs().max() > 1e-3
    assert torch.equal(supernet(images).logits, logits)
    assert torch.equal(twin(images).logits, changed)
    assert count_macs(supernet.config) == supernet.dense_macs
    settle_randomly_(supernet, 0)
    supernet(images)
    assert torch.equal(twin(images).logits, changed)


@both_families
def test_a_copy_does_not_hide_channels_from_its_original(family):
    """Norms cache which channels live; what dies in a copy has to stay alive in the original."""
    supernet, images = tiny_supernet(family=family), tiny_images()
    logits = supernet(images).logits.detach()
    for width in names_of(supernet.config, "embedding"):
        twin = copy.deepcopy(supernet)
        twin(images)
        twin.named_masks[width].settle_(13)
        assert (twin(images).logits - logits).abs().max() > 1e-3
        assert torch.equal(supernet(images).logits, logits)


@both_families
def test_state_dict_keys_of_the_classifier_stay_what_they_were(family):
    stock = set(tiny_model(family).state_dict())
    assert set(tiny_supernet(family=family, pmim=False).model.state_dict()) == stock
    supernet = tiny_supernet(family=family)
    assert set(supernet.model.state_dict()) - stock == {supernet.architecture.mask_token}


# ----------------------------------------------------------------------------------------- refusals


@both_families
def test_an_activation_that_misses_the_origin_is_refused(family):
    with pytest.raises(ValueError, match="hidden_act is 'sigmoid'"):
        install_bi_masks(tiny_model(family, hidden_act="sigmoid"), search_config(family))


@both_families
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "quick_gelu", "gelu_new"])
def test_activations_through_the_origin_are_accepted(activation, family):
    dense = tiny_model(family, hidden_act=activation, dtype=torch.float64)
    supernet = install_bi_masks(dense, search_config(family)).double()
    settle_randomly_(supernet, 0)
    images = tiny_images(dtype=torch.float64)
    assert_close(supernet.fold()(images).logits, supernet(images).logits)


@pytest.mark.parametrize(("family", "backbone"), [("vit", ViTModel), ("swin", SwinModel)])
def test_models_without_a_classifier_are_refused_by_name(family, backbone):
    with pytest.raises(UnsupportedArchitectureError, match=backbone.__name__):
        install_bi_masks(backbone(tiny_model(family).config), search_config(family))


def test_models_of_other_families_are_refused_by_name():
    tiny = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    with pytest.raises(UnsupportedArchitectureError, match="ResNetForImageClassification"):
        install_bi_masks(ResNetForImageClassification(tiny))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("vit", SwinBiMaskConfig(preset="bi_mask")),
        ("swin", ViTBiMaskConfig(preset="bi_mask")),
    ],
)
def test_the_search_of_another_family_is_refused_by_name(family, config):
    with pytest.raises(ValueError, match=f"{type(config).__name__} searches .* got a OFB.*Config"):
        install_bi_masks(tiny_model(family), config)


@pytest.mark.parametrize(
    ("family", "fields", "scale"),
    [
        ("vit", {"head_dim_per_layer": [4, 8]}, {"attention_scale": 0.4}),
        (
            "swin",
            {"head_dim_per_block": [[10, 5], [10]]},
            {"attention_scale_per_stage": [0.4, 0.3]},
        ),
    ],
)
def test_heads_of_several_widths_need_a_scale_of_their_own(family, fields, scale):
    """Each width would imply another scale, and one number for all of them would change the
    function."""
    stock, make = tiny_model(family).config.to_diff_dict(), OURS[family]
    fields |= {
        name: value
        for name, value in stock.items()
        if name not in ("model_type", "transformers_version")
    }
    with pytest.raises(ValueError, match=r"head_dim_per_.* is \[.*attention_scale"):
        install_bi_masks(make(make.config_class(**fields)))
    dense = make(make.config_class(**fields, **scale)).eval()
    randomize_weights_(dense)
    supernet = install_bi_masks(dense)
    open_masks_(supernet)
    torch.testing.assert_close(supernet.fold()(tiny_images()).logits, dense(tiny_images()).logits)


@both_families
@pytest.mark.parametrize(
    ("kind", "kept", "message"),
    [
        ("mlp", lambda shape: (0, shape[0]), "{name}.*{shape[0]}"),
        ("mlp", lambda shape: {0: (0,)}, "{name}.*list of units"),
        ("embedding", lambda shape: (shape[0],), "{name}.*{shape[0]}"),
        ("attention", lambda shape: (0, 1), "{name}.*head: channels"),
        ("attention", lambda shape: {shape[0]: (0,)}, "{name}.*{shape[0]}"),
        ("attention", lambda shape: {0: (shape[1],)}, "{name}.*{shape[1]}"),
    ],
)
def test_subnets_that_do_not_fit_are_refused_by_name(kind, kept, message, family):
    dense = ours(family)
    name = names_of(dense.config, kind)[0]
    shape = describe(dense.config).sizes[name]
    with pytest.raises(ValueError, match=message.format(name=name, shape=shape)):
        slice_model(dense, SubnetSpec({name: kept(shape)}))


@both_families
def test_submodules_that_do_not_exist_are_refused_by_name(family):
    with pytest.raises(ValueError, match=r"layers\.9\.mlp"):
        slice_model(ours(family), SubnetSpec({"layers.9.mlp": (0,)}))


# --------------------------------------------------------------------------- ways to run a supernet


def checkpoint_(supernet: Supernet, kwargs: dict | None) -> None:
    """Turns on gradient checkpointing by its present name, or by its old one."""
    enable = (
        getattr(supernet, "activation_checkpointing_enable", None)
        or supernet.gradient_checkpointing_enable
    )
    enable(kwargs)
    assert any(getattr(module, "gradient_checkpointing", False) for module in supernet.modules())


@both_families
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(kwargs, family):
    supernet, images = (
        tiny_supernet(dtype=torch.float64, family=family).train(),
        tiny_images(dtype=torch.float64),
    )
    retire_some_(supernet, 0)
    expected = gradients_of(supernet, images)
    checkpoint_(supernet, kwargs)
    gradients = gradients_of(supernet, images)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], msg=name)


@both_families
def test_reentrant_checkpointing_is_refused_in_words(family):
    """All blocks share the gates of one forward pass: reentrant checkpointing runs backward through
    them repeatedly."""
    with pytest.raises(
        ValueError,
        match=r"use_reentrant is True, but all blocks share the gates.*leave it at False",
    ):
        checkpoint_(tiny_supernet(family=family), {"use_reentrant": True})


@both_families
@pytest.mark.parametrize("retire", [False, True])
def test_bf16_autocast_runs(retire, family):
    supernet, images = tiny_supernet(family=family), tiny_images()
    if retire:
        retire_some_(supernet, 0)
    expected = supernet(images).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = supernet(images).logits, search_loss(supernet, images)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(logits.float(), expected, atol=0.15, rtol=0.1)
    for name, parameter in supernet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@both_families
def test_training_goes_on_after_an_evaluation_in_inference_mode(family):
    """What the norms remember about living channels must not be a tensor that autograd refuses."""
    supernet, images = tiny_supernet(family=family), tiny_images()
    for width in names_of(supernet.config, "embedding"):
        supernet.named_masks[width].settle_(13)
    with torch.inference_mode():
        expected = supernet(images).logits.clone()
    logits = supernet(images).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)


@both_families
@pytest.mark.parametrize("state", ["uniform", "random", "one_hot"])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_losses_of_a_search_are_finite(state, autocast, family):
    supernet = tiny_supernet(family=family)
    for mask in supernet.bi_masks:
        with torch.no_grad():
            mask.alpha.mul_(0 if state == "uniform" else 1)
            if state == "one_hot":
                mask.alpha.view(-1)[0] = 500.0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gradients = gradients_of(supernet, tiny_images())
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    masks = [name for name in gradients if name.startswith("bi_masks.")]
    assert len(masks) == 2 * len(supernet.bi_masks)
    assert all((gradients[name] != 0).any() for name in masks if "importance" in name)


@both_families
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("loss", ["logits", "picture", "bi_mask cost", "sparsity cost"])
def test_mask_gradients_are_those_of_the_loss(loss, place, kind, family):
    """Importance and alpha against central differences in float64: nothing on the way to them is
    cut off.

    Without normalisation, whose maximum is detached on purpose, and without eager attention, whose
    softmax is float32.
    """
    supernet = tiny_supernet(dtype=torch.float64, family=family, normalize_importance=False)
    supernet.model.set_attn_implementation("sdpa")
    images, name = tiny_images(dtype=torch.float64), names_of(supernet.config, kind)[place]
    mask = supernet.named_masks[name]
    # `sizes` lists the units of all submodules, and then the heads of all attentions.
    heads = [heads_of(attention) for attention in names_of(supernet.config, "attention")]
    counted = [
        index
        for index, n in enumerate([*supernet.dense_sizes, *heads])
        if n in (name, heads_of(name))
    ]

    def value() -> torch.Tensor:
        if "cost" in loss:
            supernet.refresh_gates()
            return supernet.sizes(loss.split()[0])[counted].sum()
        output = supernet(images, bool_masked_pos=masked_patches(supernet))
        return (output.logits if loss == "logits" else output.reconstruction).square().mean()

    parameters = [mask.alpha] if loss == "sparsity cost" else [mask.alpha, mask.importance_logits]
    step, tolerance = (1e-2, 2e-3) if "cost" in loss else (1e-5, 1e-6)  # sizes are float32
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(value(), parameters), strict=True
    ):
        for index in range(0, parameter.numel(), 3):
            with torch.no_grad():
                entry = parameter.view(-1)[index]
                start = entry.clone()
                entry.copy_(start + step)
                above = value()
                entry.copy_(start - step)
                below = value()
                entry.copy_(start)
            slope = (above - below).item() / (2 * step)
            assert gradient.view(-1)[index].item() == pytest.approx(
                slope, rel=tolerance, abs=tolerance
            )
        assert gradient.abs().max() > 10 * tolerance


@both_families
def test_every_parameter_learns(family):
    gradients = gradients_of(tiny_supernet(family=family), tiny_images())
    silent = [name for name, gradient in gradients.items() if not (gradient != 0).any()]
    # A bias of the keys shifts all logits of a query by the same amount: softmax does not see it.
    assert all(name.endswith("k_proj.bias") for name in silent), silent


@both_families
def test_no_pmim_means_no_decoder_and_no_mask_token(family):
    supernet = tiny_supernet(family=family, pmim=False)
    assert supernet.pmim_decoder is None
    retire_some_(supernet, 0)
    before = supernet(tiny_images()).logits.detach()
    shrink_(supernet)
    assert_close(supernet(tiny_images()).logits, before)


@both_families
@pytest.mark.parametrize("searched", KINDS)
def test_one_kind_alone_can_be_searched(searched, family):
    flags = {f"search_{kind}": kind == searched for kind in KINDS}
    supernet = tiny_supernet(dtype=torch.float64, family=family, target_macs=0.9, **flags)
    assert {mask.kind for mask in supernet.bi_masks} == {searched}
    images = tiny_images(dtype=torch.float64)
    settled = copy.deepcopy(supernet)
    settled.decisions.settle_()
    small = compress(supernet)
    assert_close(small(images).logits, settled(images).logits)
    for name, shape in describe(small.config).sizes.items():
        if name not in supernet.named_masks:
            assert shape == supernet.dense_sizes[name]


@both_families
def test_labels_and_interfaces_pass_through(family):
    supernet = tiny_supernet(family=family)
    output = supernet(tiny_images(), labels=LABELS, output_hidden_states=True)
    assert output.loss.item() == pytest.approx(
        nn.functional.cross_entropy(output.logits, LABELS).item()
    )
    assert len(output.hidden_states) == 3
    assert supernet.decisions.num_active_candidates == sum(
        mask.alpha.numel() for mask in supernet.bi_masks
    )
    assert not supernet.decisions.is_settled
    settle_randomly_(supernet, 0)
    assert supernet.decisions.is_settled
