"""The losses of a training as pure functions of tensors."""

from torch import Tensor
from torch.nn import functional as F


def flops_loss(expected: Tensor, target: float | Tensor, dense: float) -> Tensor:
    """Return the squared gap between expected and target cost, relative to the dense cost.

    As in the published code of arXiv:2403.15835.

    Args:
        expected: expected cost, a scalar.
        target: cost to reach. dense: cost of the dense model. All three in one unit, e.g. MACs.
    """
    return ((expected - target) / dense) ** 2


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, hard: bool = False
) -> Tensor:
    """Return how far a student's prediction is from its teacher's: a scalar, mean over the batch.

    Args:
        logits, teacher_logits: (B, classes).
        temperature: divides both logits; not used if `hard`.
        hard: cross-entropy with the teacher's arg max (arXiv:2012.12877) instead of the divergence
            KL(teacher || student).
    """
    if hard:
        return F.cross_entropy(logits.float(), teacher_logits.argmax(-1))
    student = F.log_softmax(logits.float() / temperature, -1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    # The gradient of the divergence falls with the square of the temperature; the factor keeps its
    # weight against the loss from labels (arXiv:1503.02531, section 2).
    return divergence * temperature**2


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy, a scalar, mean over the batch.

    Args:
        logits: (B, classes).
        labels: class indices (B,) or class probabilities (B, classes).
        label_smoothing: fraction of every label that is spread evenly over all classes.
    """
    if not labels.is_floating_point():
        labels = labels.long()  # torch takes no other integers than these and bytes
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
