"""The ladder from the stock model to the compressed one: every rung computes the same function as the one before."""

import copy
import random

import pytest
import torch
from factories import (
    TOLERANCE,
    non_uniform_vit,
    optimizer_that_mirrors,
    random_candidate,
    randomize_masks_,
    retire_some_,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_supernet,
    tiny_vit,
    vit_shapes,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import ResNetConfig, ResNetForImageClassification, ViTModel

from ofb_hf import OFBViTForImageClassification, SubnetSpec, compress, count_macs, install_bi_masks, read_subnet
from ofb_hf.architectures import UnsupportedArchitectureError, describe
from ofb_hf.averaging import WeightAverage
from ofb_hf.pmim import mask_patches, normalize_target, reconstruction_loss
from ofb_hf.supernet import Supernet
from ofb_hf.surgery import slice_model, slice_optimizer_, slice_tensor

DTYPES = [torch.float32, torch.float64]
KINDS = ["embedding", "attention", "mlp"]


def masked_patches(count: int = 2, patches: int = 16) -> torch.Tensor:
    """A quarter of the patches of every image."""
    return mask_patches(count, patches, 0.75, torch.Generator().manual_seed(0))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, **kwargs) -> None:
    """Equal up to the tolerance of their precision."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, **kwargs)


@torch.no_grad()
def open_masks_(supernet: Supernet, importance: float | None = None) -> None:
    """All mask values exactly 1: by sparsity alone, or with importance scores that round to 1 as well."""
    for mask in supernet.bi_masks:
        mask.settle_(*mask.largest_size())
        if importance is not None:
            mask.importance_logits.fill_(importance)
    supernet.lam.fill_(0.0 if importance is None else 0.4)


# ------------------------------------------------------------------------------------------------- I1: stock == open


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("importance", [None, 100.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_supernet_with_open_masks_is_the_stock_model(attention, dtype, importance, training):
    stock = tiny_vit(dtype=dtype, attn_implementation=attention).train(training)
    supernet = install_bi_masks(stock, search_config())
    assert supernet.training == training
    open_masks_(supernet, importance)
    images, labels = tiny_images(dtype=dtype), torch.tensor([0, 2])
    expected, output = stock(images, labels=labels), supernet(images, labels=labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


def test_an_open_supernet_has_the_stock_models_gradients():
    stock = tiny_vit().train()
    supernet = install_bi_masks(stock, search_config())
    open_masks_(supernet)
    for model in (stock, supernet):
        model(tiny_images(), labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name: parameter.grad for name, parameter in supernet.model.named_parameters()}
    for name, parameter in stock.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_open_masks_leave_all_outputs_of_the_stock_model():
    stock = tiny_vit()
    supernet = install_bi_masks(stock, search_config())
    open_masks_(supernet)
    large = torch.randn(2, 3, 24, 20)
    flags = {"output_hidden_states": True, "output_attentions": True, "interpolate_pos_encoding": True}
    expected, output = stock(large, **flags), supernet(large, **flags)
    for name in ("hidden_states", "attentions"):
        assert len(output[name]) == len(expected[name]) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(output[name], expected[name], strict=True))


def test_what_compress_gives_for_a_full_budget_is_the_stock_model():
    stock = tiny_vit()
    supernet = install_bi_masks(stock, search_config(target_macs=1.0))
    open_masks_(supernet)
    assert torch.equal(compress(supernet)(tiny_images()).logits, stock(tiny_images()).logits)


# ------------------------------------------------------------------------------------------- I2: masked == sliced


def units_to_keep(supernet: Supernet, kind: str, rng: random.Random) -> SubnetSpec:
    """Some units of every submodule of one kind; `heads` takes whole heads, `channels` some within every head."""
    kept = {}
    for name, shape in supernet.dense_sizes.items():
        if len(shape) == 1:
            searched = kind == ("embedding" if name == "embeddings" else "mlp")
            size = rng.randint(1, shape[0]) if searched else shape[0]
            kept[name] = tuple(sorted(rng.sample(range(shape[0]), size)))
            continue
        heads = rng.randint(1, shape[0]) if kind in ("heads", "attention") else shape[0]
        channels = rng.randint(1, shape[1]) if kind in ("channels", "attention") else shape[1]
        kept[name] = {
            head: tuple(sorted(rng.sample(range(shape[1]), channels)))
            for head in sorted(rng.sample(range(shape[0]), heads))
        }
    return SubnetSpec(kept)


@torch.no_grad()
def close_masks_(supernet: Supernet, subnet: SubnetSpec) -> None:
    """Mask values exactly 1 for the units of a subnet and exactly 0 for all others."""
    open_masks_(supernet, 100.0)
    supernet.lam.fill_(1.0)
    for mask in supernet.bi_masks:
        kept = subnet.kept[mask.name]
        mask.alive.zero_()
        if isinstance(kept, dict):
            for head, channels in kept.items():
                mask.alive[head, list(channels)] = True
        else:
            mask.alive[list(kept)] = True


@pytest.mark.parametrize("kind", ["embedding", "heads", "channels", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
@given(vit_shapes(), st.integers(0, 2**31))
def test_masked_units_might_as_well_not_be_there(dtype, kind, shape, seed):
    overrides, _ = shape
    dense = OFBViTForImageClassification.from_dense(tiny_vit(seed % 97, dtype, **overrides))
    config = search_config(**dict.fromkeys(("embedding_candidates", "head_candidates"), None))
    config.head_dim_candidates = config.mlp_candidates = None
    config.target_macs = 1.0
    supernet = install_bi_masks(dense, config)
    subnet = units_to_keep(supernet, kind, random.Random(seed))
    close_masks_(supernet, subnet)
    small = slice_model(dense, subnet)
    images = tiny_images(dtype=dtype)
    assert count_macs(small) == count_macs(dense, subnet)
    assert_close(supernet(images).logits, small(images).logits)
    assert_close(supernet.fold()(images).logits, small(images).logits)
    supernet.shrink_()
    assert_close(supernet(images).logits, small(images).logits)


@pytest.mark.parametrize("seed", range(3))
def test_masked_equals_sliced_for_all_kinds_together(seed):
    dense = OFBViTForImageClassification.from_dense(tiny_vit(seed, torch.float64))
    supernet = install_bi_masks(dense, search_config())
    settle_randomly_(supernet, seed)
    supernet.lam.fill_(0.0)
    subnet = SubnetSpec({mask.name: mask.kept() for mask in supernet.bi_masks})
    small, images = slice_model(dense, subnet), tiny_images(dtype=torch.float64)
    assert_close(supernet(images).logits, small(images).logits)
    assert (supernet(images).logits - dense(images).logits).abs().max() > 1e-2
    hidden = supernet(images, output_hidden_states=True).hidden_states
    expected = small(images, output_hidden_states=True).hidden_states
    channels = list(subnet.kept["embeddings"])
    for ours, theirs in zip(hidden, expected, strict=True):
        assert_close(ours[..., channels], theirs)
        gone = [channel for channel in range(40) if channel not in channels]
        assert (ours[..., gone] == 0).all()


def test_slicing_gives_a_new_model_of_the_same_make():
    dense = OFBViTForImageClassification.from_dense(tiny_vit(dtype=torch.float64, id2label={0: "a", 1: "b", 2: "c"}))
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    subnet = SubnetSpec({"embeddings": (1, 5, 39), "layers.1.attention": {0: (2, 7), 3: (0, 1)}})
    for training in (True, False):
        small = slice_model(dense.train(training), subnet)
        assert small.training == training
        assert small.dtype == torch.float64
        assert small.config._attn_implementation == dense.config._attn_implementation == "eager"
        assert small.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    assert dense.config.hidden_size == 40


def test_every_unit_matters():
    """The yardstick for the tests above: with a single unit missing, whichever it is, the logits differ."""
    dense = OFBViTForImageClassification.from_dense(tiny_vit(dtype=torch.float64))
    images = tiny_images(dtype=torch.float64)
    logits = dense(images).logits
    for name, shape in describe(dense.config).sizes.items():
        for unit in (0, shape[0] - 1):
            rest = tuple(index for index in range(shape[0]) if index != unit)
            kept = {head: tuple(range(shape[1])) for head in rest} if len(shape) == 2 else rest
            assert (slice_model(dense, SubnetSpec({name: kept}))(images).logits - logits).abs().max() > 1e-5, name


# ----------------------------------------------------------------------------------------------------- I3: folding


@pytest.mark.parametrize("retire", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(2))
def test_folding_keeps_the_function(seed, dtype, training, retire):
    supernet = tiny_supernet(seed, dtype).train(training)
    if retire:
        retire_some_(supernet, seed, share=0.8)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    folded, images = supernet.fold(), tiny_images(dtype=dtype)
    assert_close(folded(images).logits, supernet(images).logits)
    assert folded.training == training
    assert folded.dtype == dtype
    assert type(folded) is OFBViTForImageClassification
    after = supernet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(not mask.alive.all() for mask in supernet.bi_masks) == retire


def test_a_folded_model_carries_nothing_of_the_search():
    folded = compress(tiny_supernet())
    fresh = OFBViTForImageClassification(folded.config)
    assert {n: t.shape for n, t in folded.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    for module in folded.modules():
        assert not type(module).__name__.startswith("Gated")
        assert not hasattr(module, "_gate_store")
    for mark in ("mask", "alpha", "importance", "pmim", "decoder"):
        assert not any(mark in name for name in folded.state_dict()), mark


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_compress_is_settle_fold_and_slice(seed, dtype):
    supernet, images = tiny_supernet(seed, dtype, target_macs=0.45), tiny_images(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    subnet = read_subnet(supernet)
    small = compress(supernet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    settled = copy.deepcopy(supernet)
    assert settled.settle_() == subnet
    assert_close(small(images).logits, settled(images).logits)
    assert {name: describe(small.config).sizes[name] for name in subnet.kept} == {
        name: size if isinstance(size, tuple) else (size,) for name, size in subnet.sizes.items()
    }
    assert small.config.attention_scale == 8**-0.5


def test_compressing_again_changes_nothing():
    supernet = tiny_supernet(dtype=torch.float64, target_macs=0.45)
    supernet.settle_()
    first = compress(supernet)
    supernet.shrink_()
    assert supernet.shrink_() == ({}, {})
    assert supernet.is_settled
    second, images = compress(supernet), tiny_images(dtype=torch.float64)
    assert_close(second(images).logits, first(images).logits)
    assert second.config.to_dict() == first.config.to_dict()


def test_compressed_models_can_be_searched_again():
    small = compress(tiny_supernet(dtype=torch.float64, target_macs=0.6))
    config = search_config(target_macs=0.7)
    config.embedding_candidates = config.head_candidates = config.head_dim_candidates = config.mlp_candidates = None
    config.multiple_of = 1
    supernet = install_bi_masks(small, config)
    open_masks_(supernet)
    images = tiny_images(dtype=torch.float64)
    assert torch.equal(supernet(images).logits, small(images).logits)
    randomize_masks_(supernet)
    again = compress(install_bi_masks(small, config))
    assert count_macs(again) <= 0.7 * count_macs(small)
    assert again.config.attention_scale == 8**-0.5


# ------------------------------------------------------------------------------------------------ shrinking mid-search


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_shrinking_changes_neither_logits_nor_pictures(seed, dtype, share):
    supernet = tiny_supernet(seed, dtype)
    retire_some_(supernet, seed, share)
    images, masked = tiny_images(dtype=dtype), masked_patches()
    before, painted = supernet(images).logits.detach(), supernet(images, bool_masked_pos=masked)
    something_to_remove = not all(mask.alive.all() for mask in supernet.bi_masks)
    supernet.shrink_()
    assert (count_macs(supernet.config) < supernet.dense_macs) == something_to_remove
    assert something_to_remove or share < 0.8
    assert_close(supernet(images).logits, before)
    output = supernet(images, bool_masked_pos=masked)
    assert_close(output.logits, painted.logits)
    assert_close(output.reconstruction, painted.reconstruction)


def gradients_of(supernet: Supernet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss that needs logits, picture, costs and one-hot terms."""
    supernet.zero_grad()
    output = supernet(images, bool_masked_pos=masked_patches())
    loss = output.logits.square().sum() + output.reconstruction.square().mean()
    loss = loss + supernet.one_hot_loss() + supernet.importance_penalty()
    loss = loss + supernet.expected_cost(supernet.sizes("bi_mask")) / supernet.dense_cost
    (loss + supernet.expected_cost(supernet.sizes("sparsity")) / supernet.dense_cost).backward()
    return {name: parameter.grad.clone() for name, parameter in supernet.named_parameters()}


@pytest.mark.parametrize("seed", range(3))
def test_shrinking_changes_no_gradient(seed):
    supernet = tiny_supernet(seed, torch.float64)
    retire_some_(supernet, seed, 0.6)
    images = tiny_images(dtype=torch.float64)
    before = gradients_of(supernet, images)
    _, plan = supernet.shrink_()
    after = gradients_of(supernet, images)
    assert after.keys() == before.keys()
    assert len(plan) > 10
    for name, gradient in after.items():
        # sizes() are float32 by design, so the two cost terms agree to that precision only
        expected = slice_tensor(before[name], plan.get(name, ()))
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_optimizer_and_average_follow_every_shrink(seed):
    """Moments and average start as copies of the parameters; slice by slice they have to stay that."""
    supernet = tiny_supernet(seed, target_macs=0.5)
    optimizer, average = optimizer_that_mirrors(supernet), WeightAverage(supernet, 0.9)
    groups = [len(group["params"]) for group in optimizer.param_groups]
    for event in range(3):
        retire_some_(supernet, seed + event, 0.5)
        replaced, plan = supernet.shrink_()
        names = {parameter: name for name, parameter in supernet.named_parameters()}
        slice_optimizer_(optimizer, replaced, {old: plan[names[new]] for old, new in replaced.items()})
        average.slice_(plan)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in names}
        assert set(optimizer.state) == set(names)
        for parameter, name in names.items():
            state = optimizer.state[parameter]
            assert torch.equal(state["exp_avg"], parameter), name
            assert torch.equal(state["exp_avg_sq"], 2 * parameter.abs()), name
            assert state["step"].item() == 7
            assert torch.equal(average.average[name], parameter), name
    assert [len(group["params"]) for group in optimizer.param_groups] == groups
    assert count_macs(supernet.config) < supernet.dense_macs
    supernet(tiny_images()).logits.sum().backward()
    optimizer.step()
    average.update(supernet)
    assert all(parameter.isfinite().all() for parameter in supernet.parameters())


def test_a_shrunken_network_looks_like_one_that_was_built_small():
    """Sizes that modules keep beside their weights, frozen parameters, and costs before the next forward pass."""
    supernet = tiny_supernet(target_macs=0.5)
    supernet.model.vit.embeddings.requires_grad_(False)
    frozen = [name for name, parameter in supernet.named_parameters() if not parameter.requires_grad]
    supernet(tiny_images())
    supernet.settle_()
    supernet.shrink_()
    small = OFBViTForImageClassification(supernet.config)
    theirs = dict(small.named_modules())
    for name, module in supernet.model.named_modules():
        for attribute in (
            "in_features", "out_features", "in_channels", "out_channels", "normalized_shape", "num_attention_heads",
            "head_dim", "scaling",
        ):  # fmt: skip
            assert getattr(module, attribute, None) == getattr(theirs[name], attribute, None), (name, attribute)
    assert [name for name, parameter in supernet.named_parameters() if not parameter.requires_grad] == frozen
    supernet.sizes("bi_mask").sum().backward()
    assert all(mask.importance_logits.grad is not None for mask in supernet.bi_masks)


def test_a_parameter_without_a_plan_starts_with_fresh_moments():
    supernet = tiny_supernet()
    optimizer = optimizer_that_mirrors(supernet)
    supernet.named_masks["layers.0.mlp"].settle_(29)
    replaced, plan = supernet.shrink_()
    names = {parameter: name for name, parameter in supernet.named_parameters()}
    entries = {old: plan[names[new]] for old, new in replaced.items() if not names[new].endswith(".alpha")}
    slice_optimizer_(optimizer, replaced, entries)
    alpha = supernet.named_masks["layers.0.mlp"].alpha
    assert any(new is alpha for new in replaced.values())
    assert alpha not in optimizer.state
    assert any(parameter is alpha for parameter in optimizer.param_groups[0]["params"])
    assert supernet.named_masks["layers.1.mlp"].alpha in optimizer.state


def test_training_goes_on_after_a_shrink_as_if_units_had_been_masked():
    """One AdamW step on the shrunken network gives the parameters that a step on the masked one gives."""
    masked, images = tiny_supernet(dtype=torch.float64), tiny_images(dtype=torch.float64)
    shrunk = copy.deepcopy(masked)
    for supernet in (masked, shrunk):
        retire_some_(supernet, 1, 0.6)
    optimizers = [torch.optim.AdamW(supernet.parameters(), lr=1e-2) for supernet in (masked, shrunk)]
    for step in range(3):
        if step == 1:
            replaced, plan = shrunk.shrink_()
            names = {parameter: name for name, parameter in shrunk.named_parameters()}
            slice_optimizer_(optimizers[1], replaced, {old: plan[names[new]] for old, new in replaced.items()})
        for supernet, optimizer in zip((masked, shrunk), optimizers, strict=True):
            optimizer.zero_grad()
            supernet(images, labels=torch.tensor([0, 2])).loss.backward()
            optimizer.step()
    expected = dict(masked.named_parameters())
    for name, parameter in shrunk.named_parameters():
        assert_close(parameter, slice_tensor(expected[name], plan.get(name, ())), msg=name)
    assert_close(shrunk(images).logits, masked(images).logits)


def test_read_subnet_names_units_of_the_dense_parent_after_shrinks():
    """A shrunken search and the same search without shrinking agree on what they keep."""
    kept, shrunk = tiny_supernet(target_macs=0.4), tiny_supernet(target_macs=0.4)
    for event in range(3):
        for supernet in (kept, shrunk):
            retire_some_except_best_(supernet, event)
        shrunk.shrink_()
        assert read_subnet(shrunk) == read_subnet(kept)
    dense = tiny_vit()
    assert count_macs(compress(shrunk)) == count_macs(dense, read_subnet(kept)) <= 0.4 * count_macs(dense)


def retire_some_except_best_(supernet: Supernet, seed: int) -> None:
    """Retires at random, but leaves the best choice within the budget."""
    best = supernet.settlement().choice
    generator = torch.Generator().manual_seed(seed)
    for mask in supernet.bi_masks:
        wanted = torch.rand(mask.candidate_sizes.max(), generator=generator) < 0.5
        weak = wanted[mask.candidate_sizes - 1] & mask.active_candidates
        weak[mask.index_of(best[mask.name].size)] = False
        mask.retire_(weak)


def test_retirement_spares_the_best_choice_within_the_budget():
    for seed in range(4):
        supernet = tiny_supernet(seed, target_macs=0.5)
        for mask in supernet.bi_masks:
            with torch.no_grad():
                mask.alpha.mul_(4)
        best = supernet.settlement().choice
        assert supernet.retire_candidates() > 0
        for mask in supernet.bi_masks:
            assert mask.active_candidates[mask.index_of(best[mask.name].size)]
        assert supernet.settlement().cost <= supernet.target


def test_a_fresh_supernet_takes_the_state_of_a_shrunken_one():
    saved, images = tiny_supernet(0, target_macs=0.5), tiny_images()
    for event in range(2):
        retire_some_except_best_(saved, event)
        saved.shrink_()
    saved.multiplier.fill_(0.3)
    state = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    fresh = install_bi_masks(tiny_vit(seed=5), search_config(target_macs=0.5))
    fresh(images)
    fresh.shrink_to_(state)
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(images).logits, saved(images).logits)
    assert read_subnet(fresh) == read_subnet(saved)
    assert fresh.config.to_dict() == saved.config.to_dict()
    other = install_bi_masks(tiny_vit(), search_config(search_mlp=False, target_macs=0.8))
    with pytest.raises(ValueError, match="checkpoint"):
        other.shrink_to_({name: tensor for name, tensor in state.items() if not name.startswith("bi_masks.2.")})


# --------------------------------------------------------------------------------------------- what stays untouched


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "ours"])
def test_installing_masks_leaves_the_dense_model_alone(ours):
    dense = OFBViTForImageClassification.from_dense(tiny_vit()) if ours else tiny_vit()
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    config, logits = dense.config.to_dict(), dense(tiny_images()).logits
    classes = [type(module) for module in dense.modules()]
    supernet = install_bi_masks(dense, search_config())
    randomize_masks_(supernet)
    supernet.settle_()
    supernet.shrink_()
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.zero_()
    assert [type(module) for module in dense.modules()] == classes
    assert dense.config.to_dict() == config
    assert dense.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())
    assert torch.equal(dense(tiny_images()).logits, logits)


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_copy_of_a_supernet_is_independent(evaluated):
    supernet, images = tiny_supernet(), tiny_images()
    if evaluated:
        supernet(images)
    logits = supernet(images).logits.detach() if evaluated else copy.deepcopy(supernet)(images).logits.detach()
    twin = copy.deepcopy(supernet)
    assert torch.equal(twin(images).logits, logits)
    randomize_masks_(twin, seed=9)
    twin.settle_()
    twin.shrink_()
    changed = twin(images).logits
    assert (changed - logits).abs().max() > 1e-3
    assert torch.equal(supernet(images).logits, logits)
    assert torch.equal(twin(images).logits, changed)
    assert count_macs(supernet.config) == supernet.dense_macs
    settle_randomly_(supernet, 0)
    supernet(images)
    assert torch.equal(twin(images).logits, changed)


def test_a_copy_does_not_hide_channels_from_its_original():
    """Norms cache which channels live; what dies in a copy has to stay alive in the original."""
    supernet, images = tiny_supernet(), tiny_images()
    logits = supernet(images).logits.detach()
    twin = copy.deepcopy(supernet)
    twin(images)
    twin.named_masks["embeddings"].settle_(13)
    assert (twin(images).logits - logits).abs().max() > 1e-3
    assert torch.equal(supernet(images).logits, logits)


def test_state_dict_keys_of_the_classifier_stay_what_they_were():
    supernet = tiny_supernet(pmim=False)
    assert set(supernet.model.state_dict()) == set(tiny_vit().state_dict())
    with_pmim = tiny_supernet()
    assert set(with_pmim.model.state_dict()) - set(tiny_vit().state_dict()) == {"vit.embeddings.mask_token"}


# --------------------------------------------------------------------------------------------------------- refusals


def test_an_activation_that_misses_the_origin_is_refused():
    with pytest.raises(ValueError, match="hidden_act is 'sigmoid'"):
        install_bi_masks(tiny_vit(hidden_act="sigmoid"), search_config())


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "quick_gelu", "gelu_new"])
def test_activations_through_the_origin_are_accepted(activation):
    supernet = install_bi_masks(tiny_vit(hidden_act=activation, dtype=torch.float64), search_config()).double()
    settle_randomly_(supernet, 0)
    images = tiny_images(dtype=torch.float64)
    assert_close(supernet.fold()(images).logits, supernet(images).logits)


def test_models_that_cannot_be_searched_are_refused_by_name():
    with pytest.raises(UnsupportedArchitectureError, match="ViTModel"):
        install_bi_masks(ViTModel(tiny_vit().config), search_config())
    tiny = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    with pytest.raises(UnsupportedArchitectureError, match="ResNetForImageClassification"):
        install_bi_masks(ResNetForImageClassification(tiny))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.9.mlp": (0,)}, "layers.9.mlp"),
        ({"layers.0.mlp": (0, 72)}, r"layers\.0\.mlp.*72"),
        ({"layers.0.mlp": {0: (0,)}}, r"layers\.0\.mlp.*list of units"),
        ({"layers.0.attention": (0, 1)}, r"layers\.0\.attention.*head: channels"),
        ({"layers.0.attention": {5: (0,)}}, r"layers\.0\.attention.*5"),
        ({"layers.0.attention": {0: (8,)}}, r"layers\.0\.attention.*8"),
    ],
)
def test_subnets_that_do_not_fit_are_refused_by_name(kept, message):
    dense = OFBViTForImageClassification.from_dense(tiny_vit())
    with pytest.raises(ValueError, match=message):
        slice_model(dense, SubnetSpec(kept))


# ------------------------------------------------------------------------------------------ ways to run a supernet


def search_gradients(supernet: Supernet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a classification and a reconstruction loss."""
    supernet.train().zero_grad()
    output = supernet(images, bool_masked_pos=masked_patches())
    (output.logits.square().sum() + output.reconstruction.square().mean()).backward()
    return {name: parameter.grad for name, parameter in supernet.named_parameters() if parameter.grad is not None}


def checkpoint_(supernet: Supernet, kwargs: dict | None) -> None:
    """Turns on gradient checkpointing by its present name, or by its old one."""
    enable = getattr(supernet, "activation_checkpointing_enable", None) or supernet.gradient_checkpointing_enable
    enable(kwargs)
    assert any(getattr(module, "gradient_checkpointing", False) for module in supernet.modules())


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(kwargs):
    supernet, images = tiny_supernet(dtype=torch.float64), tiny_images(dtype=torch.float64)
    retire_some_(supernet, 0)
    expected = {name: gradient.clone() for name, gradient in search_gradients(supernet, images).items()}
    checkpoint_(supernet, kwargs)
    gradients = search_gradients(supernet, images)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], msg=name)


def test_reentrant_checkpointing_is_refused_in_words_or_works():
    """All blocks share the gates of one forward pass: reentrant checkpointing runs backward through them repeatedly."""
    supernet = tiny_supernet()
    try:
        checkpoint_(supernet, {"use_reentrant": True})
    except ValueError as error:
        assert "use_reentrant" in str(error)  # noqa: PT017 - refusing is one of two good answers
        return
    assert search_gradients(supernet, tiny_images())


@pytest.mark.parametrize("retire", [False, True])
def test_bf16_autocast_runs(retire):
    supernet, images = tiny_supernet(), tiny_images()
    if retire:
        retire_some_(supernet, 0)
    expected = supernet(images).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        output = supernet(images, bool_masked_pos=masked_patches())
        logits = supernet(images).logits
        loss = output.logits.float().square().sum() + output.reconstruction.float().square().mean()
        loss = loss + supernet.one_hot_loss() + supernet.importance_penalty()
        loss = loss + supernet.expected_cost(supernet.sizes("bi_mask")) / supernet.dense_cost
        loss = loss + supernet.expected_cost(supernet.sizes("sparsity")) / supernet.dense_cost
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(logits.float(), expected, atol=0.15, rtol=0.1)
    for name, parameter in supernet.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_training_goes_on_after_an_evaluation_in_inference_mode():
    """What the norms remember about living channels must not be a tensor that autograd refuses."""
    supernet, images = tiny_supernet(), tiny_images()
    supernet.named_masks["embeddings"].settle_(24)
    with torch.inference_mode():
        expected = supernet(images).logits.clone()
    logits = supernet(images).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("state", ["uniform", "random", "one_hot"])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_losses_of_a_search_are_finite(state, autocast):
    supernet = tiny_supernet()
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


@pytest.mark.parametrize("name", ["embeddings", "layers.0.attention", "layers.1.mlp"])
@pytest.mark.parametrize("loss", ["logits", "picture", "bi_mask cost", "sparsity cost"])
def test_mask_gradients_are_those_of_the_loss(loss, name):
    """Importance and alpha against central differences in float64: nothing on the way to them is cut off.

    Without normalisation, whose maximum is detached on purpose, and without eager attention, whose softmax is float32.
    """
    supernet = tiny_supernet(dtype=torch.float64, normalize_importance=False)
    supernet.model.set_attn_implementation("sdpa")
    images = tiny_images(dtype=torch.float64)
    mask = supernet.named_masks[name]

    def value() -> torch.Tensor:
        if "cost" in loss:
            supernet.refresh_gates()
            return supernet.sizes(loss.split()[0])[list(supernet.dense_sizes).index(name)]
        output = supernet(images, bool_masked_pos=masked_patches())
        return (output.logits if loss == "logits" else output.reconstruction).square().mean()

    parameters = [mask.alpha] if loss == "sparsity cost" else [mask.alpha, mask.importance_logits]
    step, tolerance = (1e-2, 2e-3) if "cost" in loss else (1e-5, 1e-6)  # sizes are float32
    for parameter, gradient in zip(parameters, torch.autograd.grad(value(), parameters), strict=True):
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
            assert gradient.view(-1)[index].item() == pytest.approx(slope, rel=tolerance, abs=tolerance)
        assert gradient.abs().max() > 10 * tolerance


def test_every_parameter_learns():
    gradients = gradients_of(tiny_supernet().train(), tiny_images())
    silent = [name for name, gradient in gradients.items() if not (gradient != 0).any()]
    # A bias of the keys shifts all logits of a query by the same amount: softmax does not see it.
    assert all(name.endswith("k_proj.bias") for name in silent), silent


def test_images_that_patches_do_not_tile_are_repainted_in_full_or_refused():
    """18 pixels make 4 patches of 4 pixels and a rest of 2 that the stock model never looks at."""
    dense, images = tiny_vit(image_size=18), tiny_images(size=18)
    try:
        supernet = install_bi_masks(dense, search_config())
    except ValueError as error:
        assert "image_size" in str(error)  # noqa: PT017 - refusing is one of two good answers
        return
    output = supernet(images, bool_masked_pos=masked_patches())
    target = normalize_target(images, supernet.pmim_window)
    assert reconstruction_loss(output.reconstruction, target, masked_patches(), 4).isfinite()


def test_no_pmim_means_no_decoder_and_no_mask_token():
    supernet = tiny_supernet(pmim=False)
    assert supernet.pmim_decoder is None
    retire_some_(supernet, 0)
    before = supernet(tiny_images()).logits.detach()
    supernet.shrink_()
    assert_close(supernet(tiny_images()).logits, before)


@pytest.mark.parametrize("searched", KINDS)
def test_one_kind_alone_can_be_searched(searched):
    flags = {f"search_{kind}": kind == searched for kind in KINDS}
    supernet = tiny_supernet(dtype=torch.float64, target_macs=0.9, **flags)
    assert {mask.kind for mask in supernet.bi_masks} == {searched}
    images = tiny_images(dtype=torch.float64)
    settled = copy.deepcopy(supernet)
    settled.settle_()
    small = compress(supernet)
    assert_close(small(images).logits, settled(images).logits)
    for name, shape in describe(small.config).sizes.items():
        if name not in supernet.named_masks:
            assert shape == supernet.dense_sizes[name]


def test_a_model_with_different_widths_can_be_searched():
    dense = non_uniform_vit(dtype=torch.float64)
    config = search_config(target_macs=0.6, multiple_of=1)
    config.embedding_candidates = config.head_candidates = config.head_dim_candidates = config.mlp_candidates = None
    supernet, images = install_bi_masks(dense, config), tiny_images(dtype=torch.float64)
    open_masks_(supernet)
    assert torch.equal(supernet(images).logits, dense(images).logits)
    supernet = install_bi_masks(dense, config).double()
    randomize_masks_(supernet)
    settled = copy.deepcopy(supernet)
    settled.settle_()
    small = compress(supernet)
    assert_close(small(images).logits, settled(images).logits)
    assert small.config.attention_scale == 0.37


def test_labels_and_interfaces_pass_through():
    supernet = tiny_supernet()
    output = supernet(tiny_images(), labels=torch.tensor([0, 2]), output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 2]))
    assert output.loss.item() == pytest.approx(expected.item())
    assert len(output.hidden_states) == 3
    assert supernet.num_active_candidates == sum(mask.alpha.numel() for mask in supernet.bi_masks)
    assert not supernet.is_settled
    for mask in supernet.bi_masks:
        mask.settle_(*random_candidate(mask, random.Random(0)))
    assert supernet.is_settled


# ------------------------------------------------------------------------------------------------- weight average


def test_the_average_follows_the_published_warm_up(tmp_path):
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(layer, decay=0.5)
    expected = layer.weight.detach().clone()
    for update in range(1, 12):
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))
        average.update(layer)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(average.average["weight"], expected)
    average.save(tmp_path / "average.safetensors")
    again = WeightAverage(torch.nn.Linear(3, 2), decay=0.5)
    again.load(tmp_path / "average.safetensors")
    assert again.updates == 11
    again.copy_to_(layer)
    assert torch.equal(layer.weight, average.average["weight"])
