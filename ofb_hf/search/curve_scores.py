"""Scores of a supernet's units from error curves, in place of observed gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..choice.error_curves import unit_scores
from ..families.registry import family_of
from ..frozen.curves import measure_curves
from .supernet import Supernet, dense_parent


def require_curves(supernet: Supernet) -> None:
    """Raise ValueError unless every searched residual width was rewritten: others have no curve."""
    model_config = supernet.model.config
    bases = family_of(model_config).bases(model_config)
    rewritten = {stream.name for stream in bases.streams}
    for space in supernet.decisions.space:
        if space.kind == "embedding" and space.name not in rewritten:
            raise ValueError(
                f"importance_source is 'error_curves', but the residual width {space.name} has no "
                f"error curve: {bases.fixed.get(space.name, 'its basis stays as it is')}. Give "
                "search_embedding=False as well, or leave importance_source out."
            )


def score_by_error_curves_(supernet: Supernet, images: Sequence[Tensor], seed: int) -> None:
    """Set the scores of all units to what the error curves say that they are worth, in place.

    Args:
        supernet: before anything learned or was cut; its network is in basis "equivalent".
        images: batches (B, channels, height, width), the same on all ranks, which share the work.
        seed: of the targets that are drawn from the network's own outputs.
    """
    dense = dense_parent(supernet)
    # Gradients were switched off for what decides; curves need those of the images.
    with torch.enable_grad(), torch.random.fork_rng():
        curves = measure_curves(dense, supernet.decisions.space, images, seed=seed)
    for mask in supernet.bi_masks:
        scores = unit_scores(curves[mask.name], tuple(mask.first_order.shape))
        mask.first_order.copy_(scores)
