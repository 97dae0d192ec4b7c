"""Pictures of what a token schedule does to images, and of how it was learned."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from ..models import OFBViTForImageClassification
from ..models.modeling_ofb_vit import TokenReduction, match_tokens, rank_tokens
from ..tokens.schedules import Schedule, num_tokens, require_class_token
from .plots import draw_schedule, drawing

DROPPED = -1
GREY = 0.25  # what is painted over dropped patches


@torch.no_grad()
def trace_tokens(model: OFBViTForImageClassification, pixel_values: Tensor) -> list[Tensor]:
    """Where the patches of images end up.

    Args:
        model: a ViT classifier with a token schedule.
        pixel_values: (B, C, H, W), as the model takes them.

    Returns:
        For every layer (B, patches): the number of the patch in whose token a patch is now, its own
        if it was neither dropped nor merged, `DROPPED` if it is in none.

    Raises:
        UnsupportedArchitectureError: for models without a class token.
        TypeError: for one that is no classifier of ours. ValueError: for one without a schedule.
    """
    require_class_token(model)
    if not isinstance(model, ViTForImageClassification):
        raise TypeError(
            f"got a {type(model).__name__}; tokens are traced in a classifier, "
            f"OFBViTForImageClassification."
        )
    if getattr(model.config, "token_schedule", None) is None:
        raise ValueError(
            "the model has no token_schedule, so it keeps all tokens; there is nothing to trace."
        )
    tokens = num_tokens(model.config)
    # For each token that is left, the number it began with; and for each token of the image, the
    # one it is in.
    names = torch.arange(tokens).repeat(len(pixel_values), 1)
    place, traced = names.clone(), []

    def follow(reduction: TokenReduction, inputs: tuple[Tensor, ...], _output: Any) -> None:
        nonlocal names, place
        states, _, importance = inputs
        kept = min(reduction.kept, states.shape[1])
        chosen = rank_tokens(importance, kept)
        # for each token that came in, its number among those that stay
        became = torch.full(states.shape[:2], DROPPED)
        became.scatter_(1, chosen.cpu(), torch.arange(kept).repeat(len(states), 1))
        if reduction.merged < kept:
            ordered = states.gather(1, chosen[..., None].expand(-1, -1, states.shape[-1]))
            match = match_tokens(ordered, reduction.merged)[1].cpu()
            joined = torch.cat([torch.arange(reduction.merged).repeat(len(match), 1), match], 1)
            became = torch.where(became < 0, became, joined.gather(1, became.clamp(min=0)))
        place = torch.where(place < 0, place, became.gather(1, place.clamp(min=0)))
        names = names.gather(1, chosen.cpu()[:, : reduction.merged])

    def note(*_: Any) -> None:
        where = torch.where(place < 0, place, names.gather(1, place.clamp(min=0)))
        traced.append(torch.where(where < 0, where, where - 1)[:, 1:])

    was_training = model.training
    handles = [layer.register_forward_hook(note) for layer in model.vit.layers]
    handles += [
        layer.reduction.register_forward_hook(follow)
        for layer in model.vit.layers
        if layer.reduction is not None
    ]
    try:
        model.eval()(pixel_values.to(model.device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return traced


def paint_tokens(image: Tensor, places: Tensor, patch_size: int) -> Tensor:
    """An image as its tokens see it: kept patches as they are, merged ones in the mean colour of
    all that are in the same token, dropped ones dark.

    Args:
        image: (C, H, W) in [0, 1].
        places: (patches,), a layer of `trace_tokens`.
        patch_size: pixels along the side of a patch.

    Returns:
        (C, H, W).
    """
    channels, height, width = image.shape
    grid = (height // patch_size, width // patch_size)
    patches = image.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(-1, channels, patch_size, patch_size).clone()
    means = patches.mean((2, 3), keepdim=True)
    patches[places < 0] *= GREY
    for place in places[places >= 0].unique():
        members = places == place
        if members.sum() > 1:
            patches[members] = means[members].mean(0).expand_as(patches[members])
    rows = patches.reshape(*grid, channels, patch_size, patch_size).permute(2, 0, 3, 1, 4)
    return rows.reshape(channels, height, width)


def draw_tokens(
    model: OFBViTForImageClassification,
    pixel_values: Tensor,
    mean: list[float],
    std: list[float],
    path: str | Path,
) -> None:
    """Draws images, one per row, as the tokens of every layer that reduces them see them.

    Args:
        model, pixel_values: as for `trace_tokens`.
        mean, std: of the image processor, per channel, to undo its normalisation.
        path: PNG to write.
    """
    traced = trace_tokens(model, pixel_values)
    layers = [layer for layer, block in enumerate(model.vit.layers) if block.reduction is not None]
    patch = model.config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    size = (1.6 * (1 + len(layers)), 1.75 * len(pixel_values))
    with drawing(path, len(pixel_values), 1 + len(layers), figsize=size, squeeze=False) as axes:
        for row, image in enumerate((pixel_values.cpu().float() * scale + shift).clamp(0, 1)):
            shown = [image, *(paint_tokens(image, traced[layer][row], side) for layer in layers)]
            for axis, picture in zip(axes[row], shown, strict=True):
                axis.imshow(picture.permute(1, 2, 0).numpy())
                axis.set_axis_off()
        for axis, layer in zip(axes[0][1:], layers, strict=True):
            before, kept, merged = model.config.token_counts(layer)
            fates = f"{before - kept} dropped\n{kept - merged} merged\n{merged} left"
            axis.set_title(f"layer {layer}\n{fates}", fontsize=8)


def plot_token_search(
    history: list[dict[str, Any]], schedule: Schedule, target: float, budget: str, path: str | Path
) -> None:
    """Draws a search for token counts: cost against the budget, and what is left in every layer.

    Args:
        history: rows of `search_history.jsonl`.
        schedule: the result.
        target: the budget, in MACs or milliseconds.
        budget: `target_macs` or `target_latency_ms`.
        path: PNG to write.
    """
    rows = [row for row in history if row["phase"] == "search"]
    scale, unit = (1e9, "G MACs") if target >= 1e9 else (1e6, "M MACs")
    if budget == "target_latency_ms":
        scale, unit = 1, "predicted ms"
    expected = budget.replace("target", "expected")
    with drawing(path, 1, 2, figsize=(11, 4.2)) as (cost, counts):
        cost.plot(
            [row["step"] for row in rows],
            [row[expected] / scale for row in rows],
            label="learned counts",
        )
        cost.axhline(target / scale, label="budget", color="tab:red", linestyle="--", linewidth=1)
        cost.set(title="Cost of the network", xlabel="search step", ylabel=unit, ylim=(0, None))
        cost.legend()
        draw_schedule(counts, schedule)
