"""Error curves of every submodule of a classifier, measured on calibration images."""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from ..choice.error_curves import (
    ErrorCurve,
    Moments,
    eliminate,
    first_channels_errors,
    half_direction_metric,
    means_of,
    moments_of,
)
from ..families.bases import HeadBasis
from ..families.registry import describe, family_of
from ..pruning.sums import Sums
from ..space.search_space import SearchSpace, SubmoduleSpace
from .observation import REPLAYED_IMAGES, Observation

# All layers see the same channels missing from a stream: their errors add up as vectors, while
# errors of different submodules add up as squares. (Found on a ViT of six layers; 1 to 3 differ
# little.)
STREAM_FACTOR = 3.0
# Tokens that curves are measured on, 128 images of 14 x 14 patches. Twice as many choose no better.
MEASURED_TOKENS = 128 * 196


def measure_curves(
    model: PreTrainedModel,
    space: SearchSpace,
    batches: Sequence[Tensor],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ErrorCurve]:
    """Return the error curve of every submodule of a space.

    Args:
        model: an OFB classifier in the basis that is cut, in evaluation mode.
        space: candidate sizes. Residual widths in it are those whose basis was rotated.
        batches: all calibration images, (B, channels, height, width) each; of several processes
            each takes its part.
        seed: of the targets, which are drawn from the model's own outputs.
        progress: is called with the numbers of batches done and to do.

    Raises:
        ValueError: if the model gives out numbers that are not finite.
    """
    channels = {one.name: list(one.dim_candidates) for one in space if one.kind == "attention"}
    widths = [one.name for one in space if one.kind == "embedding"]
    count = _enough_batches(model, batches)
    observation = Observation(model, channels, widths, count * len(batches[0]))
    state = PartialState()
    # The first batches of all processes together are enough for what costs most.
    replayed = math.ceil(REPLAYED_IMAGES / len(batches[0]))
    was_trainable = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        for number in range(state.process_index, count, state.num_processes):
            # The same targets whichever process has the batch.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            observation.add(batches[number], generator, replay=number < replayed)
            progress(min(number + state.num_processes, count), count)
    finally:
        for parameter, trainable in zip(model.parameters(), was_trainable, strict=True):
            parameter.requires_grad_(trainable)
    observation.sums.reduce_()
    num_images = int(observation.sums[("images",)])
    curves: dict[str, ErrorCurve] = {}
    for submodule in space:
        if submodule.kind == "embedding":
            curves[submodule.name] = _stream_curve(model, submodule, observation.sums, num_images)
        elif submodule.kind == "attention":
            head = observation.heads[submodule.name]
            curves[submodule.name] = _head_curve(head, submodule, observation.sums, num_images)
        else:
            curves[submodule.name] = _unit_curve(model, submodule, observation, num_images)
    return curves


def _enough_batches(model: PreTrainedModel, batches: Sequence[Tensor]) -> int:
    """Return how many of the batches curves are measured on; a fit gains more from the others."""
    # The widest layers come last, where a Swin has the fewest tokens.
    images = math.ceil(MEASURED_TOKENS / math.prod(describe(model.config).token_grid))
    wanted = math.ceil(images / len(batches[0]))
    return min(len(batches), max(wanted, PartialState().num_processes))


def _scale(sums: Sums, name: str, num_images: int) -> float:
    """Return what turns a mean squared error of a submodule into a change of the loss."""
    size = len(sums[(name, "gradients")])
    return float(sums[(name, "weight")]) / num_images / size


def _unit_curve(
    model: PreTrainedModel, space: SubmoduleSpace, observation: Observation, num_images: int
) -> ErrorCurve:
    """Return the curve of an MLP."""
    name, sums = space.name, observation.sums
    path = next(path for path, named in observation.outputs.items() if named == name)
    metric = half_direction_metric(sums[(name, "gradients")])
    weight = metric.mT @ model.get_submodule(path).weight.detach().cpu().double()  # (D, U)
    means = means_of(sums[(name, "all")])
    fitted = _with_outputs(moments_of(sums[(name, "all")], space.num_units), weight)
    minded = _with_outputs(moments_of(sums[(name, "minded")], space.num_units, means), weight)
    scale = _scale(sums, name, num_images)
    errors: dict[tuple[int, ...], float] = {(space.num_units,): 0.0}
    order: list[int] = []
    # Also without any unit, which may be no candidate: then the error of the last ones is known.
    sizes = sorted({size for (size,) in space.sizes if size < space.num_units} | {0}, reverse=True)
    for removed, units, layer in eliminate(fitted, 1, sizes):
        errors[(len(units),)] = scale * minded.error(layer, units)
        order = removed
    return ErrorCurve(errors, {0: _whole_order(order, space.num_units)})


def _with_outputs(moments: Moments, weight: Tensor) -> Moments:
    """Return the moments of units with those of what a layer (D, U) writes of them."""
    cross = moments.units @ weight.mT
    return Moments(moments.units, cross, weight @ cross)


def _head_curve(head: HeadBasis, space: SubmoduleSpace, sums: Sums, num_images: int) -> ErrorCurve:
    """Return the curve of an attention: over its heads, for each number of channels."""
    name = space.name
    metric = half_direction_metric(sums[(name, "gradients")])
    scale = _scale(sums, name, num_images)
    errors: dict[tuple[int, ...], float] = {}
    orders: dict[int, tuple[int, ...]] = {}
    for channels in space.dim_candidates:
        if not channels:
            continue
        products = sums[(name, channels, "all")]
        units = head.num_heads * channels
        fitted = _in_metric(moments_of(products, units), metric)
        minded = moments_of(sums[(name, channels, "minded")], units, means_of(products))
        minded = _in_metric(minded, metric)
        sizes = [heads for heads in space.head_candidates if heads] + [0]
        order: list[int] = []
        for removed, remaining, layer in eliminate(fitted, channels, sizes):
            heads = len(remaining) // channels
            size = (heads, channels) if heads else (0, 0)
            error = scale * minded.error(layer, remaining)
            # Without any head it does not matter how many channels it had.
            if heads or channels == head.head_dim:
                errors[size] = error
            order = removed
        orders[channels] = _whole_order(order, head.num_heads)
    errors[(head.num_heads, head.head_dim)] = 0.0
    return ErrorCurve(errors, orders)


def _in_metric(moments: Moments, metric: Tensor) -> Moments:
    outputs = metric.mT @ moments.outputs @ metric
    return Moments(moments.units, moments.cross @ metric, outputs)


def _whole_order(removed: Sequence[int], count: int) -> tuple[int, ...]:
    """Return an order of all units: those that were removed, then the others."""
    rest = sorted(set(range(count)) - set(removed))
    return (*removed, *rest)


def _stream_curve(
    model: PreTrainedModel, space: SubmoduleSpace, sums: Sums, num_images: int
) -> ErrorCurve:
    """Return the curve of a residual width, whose first channels stay."""
    bases = family_of(model.config).bases(model.config)
    stream = next(one for one in bases.streams if one.name == space.name)
    total = torch.zeros(space.num_units + 1, dtype=torch.float64)
    for norm in stream.norms:
        covariance = sums[(norm.norm, "normed")] / sums[(norm.norm, "rows")]
        gradients = sums[(norm.norm, "gradients")] / num_images
        total += first_channels_errors(covariance, gradients)
    sizes = {size for (size,) in space.sizes} | {0}
    errors = {(size,): STREAM_FACTOR * float(total[size]) for size in sizes}
    return ErrorCurve(errors, {0: tuple(reversed(range(space.num_units)))})
