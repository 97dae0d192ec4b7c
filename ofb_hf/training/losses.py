"""The losses of a search as pure functions of tensors."""

from torch import Tensor
from torch.nn import functional as F


def flops_loss(expected: Tensor, target: float | Tensor, dense: float) -> Tensor:
    """Squared gap between expected and target cost, as a share of the dense cost (arXiv:2403.15835,
    published code).

    All three in the same unit (MACs); scalar out.
    """
    return ((expected - target) / dense) ** 2


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, hard: bool = False
) -> Tensor:
    """How far a student's prediction is from its teacher's. Logits (B, classes) both -> scalar,
    mean over the batch.

    Soft: KL(teacher || student) at `temperature`, times temperature squared so that its gradient
    does not fade (arXiv:1503.02531). Hard: cross-entropy with the teacher's arg max
    (arXiv:2012.12877).
    """
    if hard:
        return F.cross_entropy(logits.float(), teacher_logits.argmax(-1))
    student = F.log_softmax(logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class indices (B,) or class probabilities (B, classes), mean over the
    batch."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
