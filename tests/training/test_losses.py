"""Losses are finite with finite gradients wherever a search can take them, and pull in the
direction they promise."""

import pytest
import torch
from torch.nn import functional as F

from ofb_hf.training.losses import classification_loss, distillation_loss, flops_loss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# --------------------------------------------------------------------------------------- flops loss


def test_flops_loss_is_the_squared_share():
    expected = torch.tensor(3e9, dtype=torch.float64, requires_grad=True)
    loss = flops_loss(expected, 2e9, 4e9)
    loss.backward()
    assert loss.item() == pytest.approx(0.0625)
    assert expected.grad.item() == pytest.approx(2 * 0.25 / 4e9)
    assert flops_loss(torch.tensor(1e9), 2e9, 4e9).item() == pytest.approx(0.0625)


# --------------------------------------------------------------------- distillation, classification


def test_soft_distillation_is_a_divergence():
    teacher = torch.randn(6, 5)
    assert distillation_loss(teacher + 3.0, teacher).item() == pytest.approx(0, abs=1e-6)
    for temperature in (1.0, 2.0, 5.0):
        student = torch.randn(6, 5)
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
        assert distillation_loss(student, teacher, temperature).item() == pytest.approx(
            expected.item(), rel=1e-4
        )
        assert expected > 0


def test_distillation_at_temperature_two_by_default():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    assert (
        distillation_loss(student, teacher).item()
        == distillation_loss(student, teacher, 2.0).item()
    )


def test_hard_distillation_is_cross_entropy_with_the_teachers_choice():
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    expected = F.cross_entropy(student, teacher.argmax(-1))
    assert distillation_loss(student, teacher, hard=True).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distillation_is_finite_for_extreme_logits(dtype, hard):
    student = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]]).to(dtype).requires_grad_()
    teacher = torch.tensor([[-300.0, 300.0, 0.0], [300.0, 0.0, 0.0]]).to(dtype)
    loss = distillation_loss(student, teacher, hard=hard)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad != 0).any()


def test_classification_loss_with_indices_and_with_probabilities():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    by_hand = -logits.log_softmax(-1)[torch.arange(6), labels].mean()
    assert classification_loss(logits, labels).item() == pytest.approx(by_hand.item(), rel=1e-6)
    one_hot = F.one_hot(labels, 5).float()
    assert classification_loss(logits, one_hot).item() == pytest.approx(by_hand.item(), rel=1e-6)
    mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)
    expected = -(mixed * logits.log_softmax(-1)).sum(-1).mean()
    assert classification_loss(logits, mixed).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_mixes_in_the_uniform_distribution(soft):
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    target = F.one_hot(labels, 5).float()
    smooth = 0.9 * target + 0.1 / 5
    expected = -(smooth * logits.log_softmax(-1)).sum(-1).mean()
    loss = classification_loss(logits, target if soft else labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_classification_loss_is_computed_in_at_least_float32(dtype):
    logits = torch.tensor([[9.0, -9.0, 1.0]]).to(dtype).requires_grad_()
    for labels in (torch.tensor([1]), torch.tensor([[0.2, 0.5, 0.3]])):
        loss = classification_loss(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient.isfinite().all()
