"""Pictures of which patches a token schedule drops and merges, and of how it was learned."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..families.description import square_patch
from ..families.evaluation import evaluating
from ..families.registry import family_of, is_ours
from ..families.token_reduction import token_layers, token_reductions
from ..models.modeling_ofb_vit import TokenReduction, match_tokens, rank_tokens, take_tokens
from ..tokens.schedules import Schedule, num_tokens, require_class_token
from .plots import column, cost_axis, draw_budget, draw_schedule, drawing, rows_of

DROPPED = -1
DIMMED = 0.25  # brightness of dropped patches


@torch.no_grad()
def trace_tokens(model: PreTrainedModel, pixel_values: Tensor) -> list[Tensor]:
    """Return in which token each patch of some images is, layer by layer.

    Args:
        model: a ViT classifier with a token schedule.
        pixel_values: (B, C, H, W), as the model takes them.

    Returns:
        One tensor (B, patches) for every layer. Each patch has the number of the patch whose token
        it is in: its own if it was neither dropped nor merged, `DROPPED` if it was dropped.

    Raises:
        UnsupportedArchitectureError: for models without a class token.
        TypeError: for a model that is no classifier.
        ValueError: for a model without a token schedule.
    """
    require_class_token(model)
    if getattr(model.config, "token_schedule", None) is None:
        raise ValueError(
            "the model has no token_schedule, so it keeps all tokens; there is nothing to trace."
        )
    if not is_ours(model):
        raise TypeError(
            f"got a {type(model).__name__}; tokens are traced in a classifier, "
            f"{family_of(model.config).model_class.__name__}."
        )
    trace = _Trace(len(pixel_values), num_tokens(model.config))
    handles = [layer.register_forward_hook(trace.note) for layer in token_layers(model)]
    handles += [
        reduction.register_forward_hook(trace.follow)
        for reduction in token_reductions(model)
        if reduction is not None
    ]
    try:
        with evaluating(model):
            model(pixel_values.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return trace.traced


class _Trace:
    """Forward hooks that follow the patches of B images through the layers of a model.

    Args:
        num_images: B.
        num_tokens: N, tokens of one image, class token included.

    Attributes:
        first: (B, M), for each token that a layer hands on, its number in the image. A token that
            absorbed others has its own.
        places: (B, N), for each token of the image, the position among these M of the token that it
            is in; `DROPPED` if it is in none.
        traced: (B, patches) for every layer so far, as `trace_tokens` returns it.
    """

    def __init__(self, num_images: int, num_tokens: int):
        self.first = torch.arange(num_tokens).repeat(num_images, 1)
        self.places = self.first.clone()
        self.traced: list[Tensor] = []

    def follow(self, reduction: TokenReduction, inputs: tuple[Tensor, ...], _output: Any) -> None:
        """Repeat the ranking and matching of one token reduction; a hook of `TokenReduction`."""
        states, _, importance = inputs  # (B, M, C), sizes, (B, M - 1)
        num_images, entering, _ = states.shape
        kept = min(reduction.kept, entering)
        left = min(reduction.merged, kept)
        chosen = rank_tokens(importance, kept)  # (B, kept), positions among the M
        order = chosen.cpu()

        # For each token that enters, its rank if it is kept.
        ranks = torch.arange(kept).repeat(num_images, 1)  # (B, kept)
        became = torch.full((num_images, entering), DROPPED)  # (B, M)
        became.scatter_(1, order, ranks)
        if left < kept:
            ranked = take_tokens(states, chosen)  # (B, kept, C)
            _, match = match_tokens(ranked, left)  # (B, kept - left), ranks below `left`
            stays = ranks[:, :left]
            merged_into = torch.cat([stays, match.cpu()], 1)  # (B, kept)
            became = _look_up(merged_into, became)

        self.places = _look_up(became, self.places)
        absorbing = order[:, :left]
        self.first = self.first.gather(1, absorbing)  # (B, left)

    def note(self, *_: Any) -> None:
        """Append where the patches are now; a hook of every layer."""
        numbers = _look_up(self.first, self.places)  # (B, N), the class token is number 0
        patches = numbers[:, 1:]  # (B, patches)
        patches = torch.where(patches == DROPPED, patches, patches - 1)
        self.traced.append(patches)


def _look_up(table: Tensor, places: Tensor) -> Tensor:
    """Return table[places] image by image, and `DROPPED` where a place is that.

    Args:
        table: (B, M).
        places: (B, N), positions among the M.

    Returns:
        (B, N).
    """
    found = table.gather(1, places.clamp(min=0))
    return torch.where(places == DROPPED, places, found)


def paint_tokens(image: Tensor, places: Tensor, patch_size: int) -> Tensor:
    """Return an image as the tokens of a layer show it.

    Patches that are in a token alone stay as they are, patches that share a token get their mean
    colour, and dropped patches become dark.

    Args:
        image: (C, H, W) in [0, 1].
        places: (patches,), a row of what `trace_tokens` returns for the layer.
        patch_size: pixels along the side of a patch.

    Returns:
        (C, H, W).
    """
    channels, height, width = image.shape
    rows = height // patch_size
    columns = width // patch_size
    patches = image.unfold(1, patch_size, patch_size)  # (C, rows, W, P)
    patches = patches.unfold(2, patch_size, patch_size)  # (C, rows, columns, P, P)
    patches = patches.permute(1, 2, 0, 3, 4)  # (rows, columns, C, P, P)
    patches = patches.reshape(rows * columns, channels, patch_size, patch_size).clone()
    colours = patches.mean((2, 3), keepdim=True)  # (patches, C, 1, 1)
    patches[places == DROPPED] *= DIMMED
    for place in places[places != DROPPED].unique():
        members = places == place  # (patches,) bool
        if members.sum() > 1:
            mean = colours[members].mean(0)  # (C, 1, 1)
            patches[members] = mean.expand_as(patches[members])
    grid = patches.reshape(rows, columns, channels, patch_size, patch_size)
    grid = grid.permute(2, 0, 3, 1, 4)  # (C, rows, P, columns, P)
    return grid.reshape(channels, height, width)


def draw_tokens(
    model: PreTrainedModel,
    pixel_values: Tensor,
    mean: list[float],
    std: list[float],
    path: str | Path,
) -> None:
    """Draw images, one per row, as the tokens of every layer that reduces tokens show them.

    Args:
        model: as for `trace_tokens`.
        pixel_values: as for `trace_tokens`.
        mean: of the image processor, per channel, to undo its normalisation.
        std: the same.
        path: PNG file to write.
    """
    traced = trace_tokens(model, pixel_values)
    reductions = token_reductions(model)
    layers = [layer for layer, reduction in enumerate(reductions) if reduction is not None]
    side = square_patch(model.config)
    scale = torch.tensor(std).view(-1, 1, 1)  # (C, 1, 1)
    shift = torch.tensor(mean).view(-1, 1, 1)  # (C, 1, 1)
    images = pixel_values.cpu().float() * scale + shift  # (B, C, H, W)
    images = images.clamp(0, 1)
    rows = len(images)
    columns = 1 + len(layers)
    size = (1.6 * columns, 1.75 * rows)
    with drawing(path, rows, columns, figsize=size, squeeze=False) as axes:
        for row, image in enumerate(images):
            _draw_image(axes[row][0], image)
            for axis, layer in zip(axes[row][1:], layers, strict=True):
                places = traced[layer][row]  # (patches,)
                _draw_image(axis, paint_tokens(image, places, side))
        for axis, layer in zip(axes[0][1:], layers, strict=True):
            entering, kept, left = model.config.token_counts(layer)
            lines = [
                f"layer {layer}",
                f"{entering - kept} dropped",
                f"{kept - left} merged",
                f"{left} remaining",
            ]
            axis.set_title("\n".join(lines), fontsize=8)


def _draw_image(axis: Any, image: Tensor) -> None:
    pixels = image.permute(1, 2, 0)  # (H, W, C)
    axis.imshow(pixels.numpy())
    axis.set_axis_off()


def plot_token_search(
    history: list[dict[str, Any]],
    schedule: Schedule,
    target: float,
    budget: str,
    path: str | Path,
) -> None:
    """Draw a search for token counts: cost against the budget, and the tokens of every layer.

    Args:
        history: rows of `search_history.jsonl`.
        schedule: the resulting token schedule.
        target: the budget, in MACs or milliseconds.
        budget: `target_macs` or `target_latency_ms`.
        path: PNG file to write.
    """
    rows = rows_of(history, "search")
    scale, label = cost_axis(budget, target)
    steps = column(rows, "step")
    expected = column(rows, budget.replace("target", "expected"), scale)
    with drawing(path, 1, 2, figsize=(11, 4.2)) as (cost, tokens):
        cost.plot(steps, expected, label="learned counts")
        draw_budget(cost, target / scale, label)
        draw_schedule(tokens, schedule)
