"""The adaptive one-hot loss: small when one candidate of a submodule owns all probability."""

import math

import torch
from torch import Tensor

# The spread of the probabilities enters through a cotangent with a pole at 0 (uniform) and at 1
# (one-hot). In fp32 the published tan(pi/2 - pi*sigma) has the wrong sign on the poles (-2.3e7 for
# uniform logits), so the spread stays this far away from both; its gradient is zero there, where
# the entropy term goes on pulling.
SPREAD_MARGIN = 1e-4


def one_hot_loss(
    alpha: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the adaptive one-hot loss of one submodule (arXiv:2403.15835).

    It is the entropy plus `cot(pi * sigma) / n`, where sigma, the variance of the n active
    probabilities divided by its largest possible value, is 0 for uniform and 1 for one-hot logits.
    The cotangent's slope is steep near uniform and flat in the middle, and n shrinks as candidates
    retire: that is what adapts.

    Args:
        alpha: architecture logits, any shape; the softmax runs over all active ones together.
        active: bool of the same shape; False = retired.

    Returns:
        Scalar in float32 or alpha's wider type; 0 when a single candidate is left. Finite with
        finite gradients for every alpha, uniform and one-hot included (deviation from the paper:
        sigma is clamped, see `SPREAD_MARGIN`).
    """
    losses = one_hot_losses(
        alpha.reshape(1, -1),
        active.reshape(1, -1),
    )
    return losses[0]


def one_hot_losses(
    alpha: Tensor,
    active: Tensor,
) -> Tensor:
    """Return the `one_hot_loss` of M submodules at once.

    Args:
        alpha: (M, K).
        active: bool (M, K), at least one of each row; to fill a row up, add inactive ones.

    Returns:
        (M,) in float32 or alpha's wider type.
    """
    with torch.autocast(alpha.device.type, enabled=False):
        logits = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
        log_p = logits.masked_fill(~active, -math.inf).log_softmax(1)  # (M, K)
        # 0 for retired ones, as the limit of p * log(p): -inf times 0 would be NaN.
        log_p = log_p.masked_fill(~active, 0.0)
        p = log_p.exp() * active
        entropy = -(p * log_p).sum(1)

        n = active.sum(1, dtype=logits.dtype)  # (M,)
        deviation = p - 1 / n[:, None]
        squares = deviation.square() * active
        # n = 1 would divide by 0; the last line answers it.
        largest_variance = (1 - 1 / n).clamp(min=0.5)
        sigma = squares.sum(1) / largest_variance
        sigma = sigma.clamp(SPREAD_MARGIN, 1 - SPREAD_MARGIN)
        cotangent = torch.cos(math.pi * sigma) / torch.sin(math.pi * sigma)
        return (entropy + cotangent / n) * (n > 1)
