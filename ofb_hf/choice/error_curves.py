"""What it costs to leave units out, after the rest has made up for them as well as it can.

A sum of scores of single units is blind to what the remaining units can take over. An error curve
is not: it gives, for every candidate size of a submodule, the error of the *compensated* submodule
in what it writes into the residual stream. Curves come from second moments alone, so that any
number of images fits into the same memory.

Two moments meet in them. The remaining units are fitted on all tokens alike, as the cut network
will be (`pruning/fit.py`); what is left is measured where the loss minds it. Measured on the
tokens that the fit is weighted by, late layers would look free: the loss minds so few tokens there
that the fit would learn them by heart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Covariances are held away from singular by this fraction of their mean variance, as the fit of the
# remaining layer is.
RIDGE = 1e-2
TINY = 1e-30
# Single units that are removed at once; after each step the others are ranked anew.
STEP = 8


@dataclass(frozen=True)
class ErrorCurve:
    """Errors of a submodule by size, and which units a size keeps.

    Args:
        errors: size, (U,) or (heads, channels per head), -> error.
        orders: channels per head (0 where units are no grid) -> units or heads in the order in
            which they are removed.
    """

    errors: dict[tuple[int, ...], float]
    orders: dict[int, tuple[int, ...]]

    def remaining(self, count: int, channels: int = 0) -> tuple[int, ...]:
        """Return the `count` units, or heads of so many channels, that stay, ascending."""
        order = self.orders[channels]
        return tuple(sorted(order[len(order) - count :]))


def unit_scores(curve: ErrorCurve, shape: tuple[int, ...]) -> Tensor:
    """Return scores of single units whose sums follow an error curve.

    What a size adds to the error of the next larger one is divided among the units in between. No
    unit gets less than one that goes before it, so that the best units are always those that the
    curve keeps; where a curve is not convex, scores are too high.

    Args:
        curve: of a submodule.
        shape: of its units, (U,) or (heads, channels per head).

    Returns:
        Shaped like the units, in float64. On a grid a unit's score is that of its head times the
        fraction that its channel has of the error of a head.
    """
    if len(shape) == 1:
        errors = {size: error for (size,), error in curve.errors.items()}
        return _scores_of(errors, curve.orders[0], shape[0])
    heads, channels = shape
    without = curve.errors.get((0, 0))
    by_heads = {size[0]: error for size, error in curve.errors.items() if size[1] == channels}
    by_channels = {size[1]: error for size, error in curve.errors.items() if size[0] == heads}
    if without is not None:
        by_heads[0] = by_channels[0] = without
    of_heads = _scores_of(by_heads, curve.orders[channels], heads)  # (H,)
    order = tuple(reversed(range(channels)))  # the first channels stay
    of_channels = _scores_of(by_channels, order, channels)  # (D,)
    return torch.outer(of_heads, of_channels / of_channels.sum().clamp(min=TINY))  # (H, D)


def _scores_of(errors: dict[int, float], order: Sequence[int], count: int) -> Tensor:
    """Return scores (U,) of units that go in a given order, by the errors of some numbers of them.

    Units that no number leaves out count as much as the last one that goes.
    """
    scores = torch.zeros(count, dtype=torch.float64)
    highest = 0.0
    sizes = sorted(errors, reverse=True)
    for larger, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        if smaller in errors:
            rise = (errors[smaller] - errors[larger]) / max(larger - smaller, 1)
            highest = max(highest, rise)
        for unit in order[count - larger : count - smaller]:
            scores[unit] = highest
    return scores


@dataclass(frozen=True)
class Moments:
    """Centred second moments of units and of what they write, all in float64.

    Weighted moments are taken about the means of those without weights: the bias is fitted to all
    tokens alike.

    Args:
        units: (U, U).
        cross: units by outputs, (U, D).
        outputs: (D, D).
    """

    units: Tensor
    cross: Tensor
    outputs: Tensor

    def error(self, weight: Tensor, units: Tensor) -> float:
        """Return the mean squared error, summed over outputs, of a layer that reads some units.

        Args:
            weight: (D, K).
            units: their indices, (K,).
        """
        cross = self.cross[units]  # (K, D)
        explained = 2 * (weight.mT * cross).sum()
        energy = (weight @ self.units[units][:, units] * weight).sum()
        return max(float(self.outputs.trace() - explained + energy), 0.0)


def moments_of(products: Tensor, num_units: int, means: Tensor | None = None) -> Moments:
    """Return the moments of rows [units, outputs, 1].

    Args:
        products: sum of outer products of the rows, (U + D + 1, U + D + 1) in float64.
        num_units: U.
        means: of units and outputs, (U + D,); by default their own.
    """
    products = products / products[-1, -1].clamp(min=TINY)
    own = products[-1, :-1]
    means = own if means is None else means
    # E[(x - m)(x - m)'] = E[xx'] - E[x]m' - mE[x]' + mm'
    mixed = torch.outer(own, means)
    centred = products[:-1, :-1] - mixed - mixed.mT + torch.outer(means, means)
    units, outputs = slice(num_units), slice(num_units, None)
    return Moments(centred[units, units], centred[units, outputs], centred[outputs, outputs])


def means_of(products: Tensor) -> Tensor:
    """Return the means of units and outputs, (U + D,); argument as for `moments_of`."""
    return products[-1, :-1] / products[-1, -1].clamp(min=TINY)


def held(covariance: Tensor) -> Tensor:
    """Return a covariance (U, U) plus the ridge on its diagonal."""
    level = covariance.diagonal().mean().clamp(min=TINY)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return covariance + RIDGE * level * identity


def eliminate(
    moments: Moments, group: int, sizes: Sequence[int]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Remove groups of units until none is left, each time those that the others miss least.

    With C the covariance and W (D, U) the least-squares layer, removing a set R and giving its
    contribution to the others leaves

        W - W_R [C^-1]_RR^-1 [C^-1]_R:    and    C^-1 - [C^-1]_:R [C^-1]_RR^-1 [C^-1]_R:

    and adds tr(W_R [C^-1]_RR^-1 W_R') to the error: optimal brain surgeon (Hassibi and Stork, 1993)
    for a layer instead of a loss. No layer is solved anew.

    Args:
        moments: without weights.
        group: neighbouring units that only go together: the channels of a head, or 1.
        sizes: numbers of remaining groups to stop at.

    Yields:
        For each size, from all groups down: all groups removed so far in their order, the units
        that remain (K,), and their least-squares layer (D, K).
    """
    inverse = torch.linalg.inv(held(moments.units))
    weight = (inverse @ moments.cross).mT  # (D, U)
    alive = torch.arange(len(inverse) // group, device=inverse.device)  # (A,), groups
    removed: list[int] = []
    wanted = sorted({*sizes, 0}, reverse=True)
    within = torch.arange(group, device=inverse.device)
    for size in wanted:
        while len(alive) > size:
            count = min(STEP if group == 1 else 1, len(alive) - size)
            ranked = _losses(inverse, weight, group).argsort()
            leaving, staying = ranked[:count].sort().values, ranked[count:].sort().values
            out = (leaving[:, None] * group + within).flatten()  # units, (count * group,)
            rest = (staying[:, None] * group + within).flatten()
            across = inverse[out][:, rest]
            spread = torch.linalg.solve(inverse[out][:, out], across)
            weight = weight[:, rest] - weight[:, out] @ spread
            inverse = inverse[rest][:, rest] - across.mT @ spread
            removed += alive[ranked[:count]].tolist()
            alive = alive[staying]
        if size in sizes:
            units = (alive[:, None] * group + within).flatten()
            yield list(removed), units, weight


def _losses(inverse: Tensor, weight: Tensor, group: int) -> Tensor:
    """Return what each group alone would add to the error, (A,)."""
    if group == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=TINY)
    size = len(inverse) // group
    blocks = inverse.view(size, group, size, group).diagonal(dim1=0, dim2=2)  # (S, S, A)
    blocks = blocks.permute(2, 0, 1)  # (A, S, S)
    columns = weight.view(len(weight), size, group).permute(1, 2, 0)  # (A, S, D)
    return (torch.linalg.solve(blocks, columns) * columns).sum((1, 2))


def first_channels_errors(covariance: Tensor, gradients: Tensor) -> Tensor:
    """Return the errors of a residual stream that keeps its first channels, (D + 1,).

    Readers take what the remaining channels know of the removed ones. Entry k belongs to k kept
    channels; entry 0 is the error without any.

    Args:
        covariance: of what a norm gives out, (D, D) in float64.
        gradients: second moments of the loss's gradients there, (D, D).
    """
    # With the Cholesky factor L, the channels from k on have the covariance L[k:, k:] L[k:, k:]'
    # given those before. Its product with the gradients is a sum over the columns of L.
    factor = torch.linalg.cholesky(held(covariance))
    of_columns = ((gradients @ factor) * factor).sum(0)  # (D,)
    errors = of_columns.flip(0).cumsum(0).flip(0)
    return torch.cat([errors, errors.new_zeros(1)])


def half_direction_metric(gradients: Tensor) -> Tensor:
    """Return L (D, D) with L L' the metric in which errors of a writer are measured.

    Half of it asks how much the loss minds each direction, E[g g'] scaled to mean 1; the other half
    minds all directions alike, as errors also move what later layers make of them.

    Args:
        gradients: second moments of the loss's gradients at the writer's output, (D, D).
    """
    size = len(gradients)
    level = gradients.trace().clamp(min=TINY) / size
    identity = torch.eye(size, dtype=gradients.dtype, device=gradients.device)
    values, vectors = torch.linalg.eigh(gradients / level / 2 + identity / 2)
    return vectors * values.clamp(min=0).sqrt()
