"""A gated linear layer is a linear layer with gated weights: its values, its gradients, and less
memory."""

import pytest
import torch
from factories import (
    FAMILIES,
    randomize_masks_,
    retire_some_,
    search_config,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
from invariants import assert_close, gradients_of, masked_patches, search_loss
from torch.nn import functional as F

from ofb_hf import install_bi_masks
from ofb_hf.masks.gates import GatedLinear, gated_linear
from ofb_hf.search.shrinking import shrink_

both_families = pytest.mark.parametrize("family", FAMILIES)


def inputs_of(shape=(2, 5, 3), outputs=4, bias=True, dtype=torch.float64):
    """Inputs (..., I), weight, bias and gate of a layer, all of them to learn from; one gate is
    closed."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(size, generator=generator) for size in (shape, (outputs, shape[-1]), (outputs,))
    ]
    gate = torch.rand(outputs, generator=generator)
    gate[1] = 0
    return [
        None if t is made[2] and not bias else t.to(dtype).requires_grad_() for t in (*made, gate)
    ]


def reference(x, weight, bias, gate):
    return F.linear(x, weight * gate[:, None], None if bias is None else bias * gate)


def outcome(function, x, weight, bias, gate):
    """The output, and the gradients of some loss of it for all that learns."""
    learned = [
        tensor for tensor in (x, weight, bias, gate) if tensor is not None and tensor.requires_grad
    ]
    output = function(x, weight, bias, gate)
    loss = (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
    return output, *torch.autograd.grad(loss, learned)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 1, 5, 3)], ids=str)
def test_gradients_are_those_of_central_differences(shape, bias):
    assert torch.autograd.gradcheck(gated_linear, inputs_of(shape, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 3)], ids=["few rows", "many rows"])
def test_it_is_what_autograd_would_make_of_gated_weights(shape, dtype, bias):
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-2}[dtype]
    tensors = inputs_of(shape, bias=bias, dtype=dtype)
    for ours, theirs in zip(
        outcome(gated_linear, *tensors), outcome(reference, *tensors), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("resting", range(4))
@pytest.mark.parametrize("bias", [True, False])
def test_what_rests_gets_no_gradient_and_the_others_theirs(bias, resting):
    tensors = inputs_of(bias=bias)
    if tensors[resting] is not None:
        tensors[resting].requires_grad_(False)
    for ours, theirs in zip(
        outcome(gated_linear, *tensors), outcome(reference, *tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_to_it_what_it_does_to_any_layer(dtype):
    """It computes in bfloat16, or leaves float64 alone, and gradients come in the precision of what
    they are for."""
    tensors = inputs_of(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = gated_linear(*tensors), reference(*tensors)
        gradients = [
            torch.autograd.grad(output.float().square().sum(), tensors) for output in (ours, theirs)
        ]
    assert (
        ours.dtype == theirs.dtype == (torch.bfloat16 if dtype == torch.float32 else torch.float64)
    )
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(*gradients, strict=True):
        assert mine.dtype == other.dtype == dtype
        torch.testing.assert_close(mine, other, atol=3e-2, rtol=3e-2)


def test_a_layer_may_be_used_twice():
    x, weight, bias, gate = inputs_of((5, 4))
    twice = [lambda *t, f=f: f(f(t[0], *t[1:]), *t[1:]) for f in (gated_linear, reference)]
    for ours, theirs in zip(*(outcome(f, x, weight, bias, gate) for f in twice), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_refused_with_an_explanation():
    tensors = inputs_of()
    (gradient,) = torch.autograd.grad(
        gated_linear(*tensors).square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@both_families
def test_a_search_keeps_no_copy_of_a_weight_for_the_backward_pass(family):
    supernet, images = tiny_supernet(family=family).train(), tiny_images()
    shapes = [
        m._parameters["weight"].shape for m in supernet.modules() if isinstance(m, GatedLinear)
    ]
    assert len(shapes) >= 12
    own = {parameter.untyped_storage().data_ptr() for parameter in supernet.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        search_loss(supernet, images)
    assert kept
    assert not set(shapes) & set(kept)


# ---------------------------------------------------------------------------------------- compiling


STAGES = {
    "all candidates active": lambda supernet: None,
    "candidates retired": lambda supernet: retire_some_(supernet, 0),
    "shrunk": lambda supernet: (retire_some_(supernet, 0), shrink_(supernet)),
    "settled and folded": lambda supernet: (
        supernet.decisions.settle_(),
        shrink_(supernet),
        supernet.fold_(),
    ),
}


@pytest.mark.slow
@both_families
@pytest.mark.parametrize("stage", STAGES)
def test_the_forward_pass_is_one_graph_with_the_same_gradients(stage, family):
    """Lambda, masks and hidden patches move without another graph; in one stage the backward pass
    is traced as well."""
    # a second layer of a ViT is only more to compile; of a Swin, every block is of another kind
    model = tiny_model(family, **({"num_hidden_layers": 1} if family == "vit" else {}))
    supernet = install_bi_masks(model, search_config(family)).double().train()
    randomize_masks_(supernet)
    STAGES[stage](supernet)
    supernet.refresh_liveness()
    torch._dynamo.reset()
    backend = "aot_eager" if stage == "candidates retired" else "eager"
    compiled = torch.compile(supernet, backend=backend, fullgraph=True)
    images = tiny_images(dtype=torch.float64)
    for step, lam in enumerate((0.4, 0.3, 0.1)):
        supernet.lam.fill_(lam)
        hidden = masked_patches(supernet).roll(step, 1)
        gradients = []
        for model in (supernet, compiled):
            supernet.zero_grad()
            torch.manual_seed(0)
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                output = model(images, bool_masked_pos=hidden)
            (output.logits.square().sum() + output.reconstruction.square().mean()).backward()
            learned = {
                name: p.grad for name, p in supernet.named_parameters() if p.grad is not None
            }
            gradients.append({name: grad.clone() for name, grad in learned.items()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert_close(gradients[1][name], gradient, msg=name)
    torch._dynamo.reset()


@both_families
def test_gradients_in_float32_are_those_in_float64(family):
    # in eval mode: each precision drops other paths
    wide = tiny_supernet(family=family, dtype=torch.float64)
    expected = gradients_of(wide, tiny_images(dtype=torch.float64))
    for name, gradient in gradients_of(wide.float(), tiny_images()).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(
            gradient.double(), expected[name], atol=1e-4 * scale + 1e-6, rtol=1e-3, msg=name
        )
