"""The one-hot loss is finite with finite gradients wherever a search can take it, and pulls in the
direction that it promises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

from ofb_hf.masks.one_hot import SPREAD_MARGIN, one_hot_loss, one_hot_losses

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def logits_of(kind: str, shape: tuple[int, ...], gap: float = 20.0) -> torch.Tensor:
    """Uniform, random or one-hot architecture logits."""
    alpha = torch.zeros(shape)
    if kind == "random":
        alpha = torch.rand(shape)
    elif kind == "one_hot":
        alpha.view(-1)[-1] = gap
    return alpha


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (33,), (3, 7)])
@pytest.mark.parametrize(
    ("kind", "gap"), [("uniform", 0), ("random", 0), ("one_hot", 10), ("one_hot", 2000)]
)
def test_one_hot_loss_is_finite(kind, gap, shape, dtype, autocast):
    alpha = logits_of(kind, shape, gap).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = one_hot_loss(alpha, torch.ones(shape, dtype=torch.bool))
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    assert alpha.grad.isfinite().all()


def test_one_hot_loss_is_computed_in_float32_under_autocast():
    alpha, active = torch.randn(7), torch.ones(7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        inside = one_hot_loss(alpha, active)
    assert inside.item() == one_hot_loss(alpha, active).item()


@pytest.mark.parametrize("count", [2, 3, 7, 17, 42])
def test_one_hot_loss_falls_from_uniform_to_one_hot(count):
    alpha = torch.zeros(30, count, dtype=torch.float64)
    alpha[:, 0] = torch.linspace(0, 20, 30)
    active = torch.ones(count, dtype=torch.bool)
    losses = torch.stack([one_hot_loss(row, active) for row in alpha])
    assert (losses.diff() < 0).all()
    assert losses[0].item() == pytest.approx(
        math.log(count) + 1 / math.tan(SPREAD_MARGIN * math.pi) / count
    )
    assert losses[-1].item() == pytest.approx(
        -1 / math.tan(SPREAD_MARGIN * math.pi) / count, rel=1e-3
    )


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_one_hot_gradient_favours_the_leader(count, seed):
    alpha = torch.randn(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()
    (gradient,) = torch.autograd.grad(
        one_hot_loss(alpha, torch.ones(count, dtype=torch.bool)), alpha
    )
    leader = int(alpha.argmax())
    assert gradient[leader] <= 0
    assert gradient.argmin() == leader or gradient.abs().max() < 1e-12
    assert gradient.sum().abs() < 1e-9 * (1 + gradient.abs().max())


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_retired_candidates_do_not_count(count, seed):
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.randn(count, generator=generator, dtype=torch.float64)
    active = torch.rand(count, generator=generator) < 0.6
    active[int(torch.randint(count, (1,), generator=generator))] = True
    full = alpha.clone().requires_grad_()
    loss = one_hot_loss(full, active)
    loss.backward()
    alone = one_hot_loss(alpha[active], torch.ones(int(active.sum()), dtype=torch.bool))
    assert loss.item() == pytest.approx(alone.item(), rel=1e-9, abs=1e-12)
    assert (full.grad[~active] == 0).all()
    with torch.no_grad():
        full[~active] = 1e4
    assert one_hot_loss(full, active).item() == pytest.approx(alone.item(), rel=1e-9, abs=1e-12)


def test_one_hot_loss_of_a_grid_is_that_of_its_cells():
    alpha, active = torch.randn(3, 7), torch.rand(3, 7) < 0.7
    assert (
        one_hot_loss(alpha, active).item() == one_hot_loss(alpha.flatten(), active.flatten()).item()
    )


def test_one_hot_losses_of_many_submodules_are_those_of_each():
    shapes = [(1,), (7,), (3, 5), (2,), (33,)]
    alphas = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    actives = [torch.rand(shape) < 0.7 for shape in shapes]
    for active in actives:
        active.view(-1)[0] = True
    weights = torch.randn(len(shapes), dtype=torch.float64)
    rows = [
        pad_sequence([tensor.flatten() for tensor in tensors], batch_first=True)
        for tensors in (alphas, actives)
    ]
    together = one_hot_losses(*rows)
    gradients = torch.autograd.grad((together * weights).sum(), alphas)
    for index, (alpha, active) in enumerate(zip(alphas, actives, strict=True)):
        alone = one_hot_loss(alpha, active)
        torch.testing.assert_close(together[index], alone)
        torch.testing.assert_close(
            gradients[index], weights[index] * torch.autograd.grad(alone, alpha)[0]
        )


def test_one_hot_loss_of_two_candidates_by_hand():
    p = torch.tensor([0.8, 0.2], dtype=torch.float64)
    spread = 2 * (0.3**2) / 0.5
    expected = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)) + 1 / math.tan(math.pi * spread) / 2
    assert one_hot_loss(p.log(), torch.ones(2, dtype=torch.bool)).item() == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(("spread", "value", "slope"), [(0.25, 1, 2), (0.5, 0, 1), (0.75, -1, 2)])
def test_the_variance_term_at_known_points(spread, value, slope):
    """cot(pi * sigma) / n is 1/n, 0, -1/n at a quarter, a half and three quarters, with slopes -2,
    -1, -2 pi/n."""
    for count in (2, 5, 17):
        excess = torch.tensor(math.sqrt(spread), dtype=torch.float64, requires_grad=True)
        # p of the first one above the uniform share, the others share the rest: the spread is
        # excess squared
        first = 1 / count + (1 - 1 / count) * excess
        p = torch.cat([first[None], ((1 - first) / (count - 1)).expand(count - 1)])
        variance = (
            one_hot_loss(p.log(), torch.ones(count, dtype=torch.bool)) - torch.special.entr(p).sum()
        )
        (gradient,) = torch.autograd.grad(variance, excess)
        assert variance.item() == pytest.approx(value / count, abs=1e-9)
        assert (gradient / (2 * excess)).item() == pytest.approx(-slope * math.pi / count, rel=1e-6)
