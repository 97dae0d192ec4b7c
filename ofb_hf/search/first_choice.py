"""Make the choice of a search before its first step, from error curves, and fit what is left.

It is what `ofb-hf compress` does; the search then trains the result.
"""

from collections.abc import Sequence

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedModel

from ..families.registry import describe
from ..frozen.compression import FrozenCompressor, frozen_space, images_to_fit
from ..training.arguments import OFBTrainingArguments
from .rewriting import BASIS_IMAGES, as_bi_masks
from .supernet import Supernet


def images_to_choose_by(model: PreTrainedModel) -> int:
    """Return how many images the curves and the fit of a classifier use at most."""
    return max(BASIS_IMAGES, images_to_fit(model))


def require_something_to_cut(supernet: Supernet) -> None:
    """Raise ValueError if nothing that is to be searched can be cut in the basis of the network."""
    config, model_config = supernet.bi_mask_config, supernet.model.config
    if not tuple(frozen_space(config, model_config, config.basis)):
        names = ", ".join(space.name for space in supernet.space)
        raise ValueError(
            f"basis is {config.basis!r}, in which error curves can cut none of {names} of this "
            f"{type(supernet.model).__name__}; search attentions or MLPs as well, or give "
            "preset='bi_mask'."
        )
    as_bi_masks(config, model_config)  # refuses candidates that are none


@torch.no_grad()
def settle_first_(
    supernet: Supernet, dense: PreTrainedModel, batches: Sequence[Tensor], seed: int
) -> PreTrainedModel | None:
    """Make the choice of a fresh supernet final, in place; nothing is cut yet.

    Args:
        supernet: that nothing has moved yet.
        dense: its network without masks, in the basis of the search.
        batches: images, (B, channels, height, width) each, the same on all ranks, which share the
            work.
        seed: of the targets that are drawn from the network's own outputs.

    Returns:
        The network that is left, fitted to the dense one; None where the config wants no fit.

    Raises:
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible cost.
    """
    config = supernet.bi_mask_config
    small = None
    with torch.enable_grad():
        compressor = FrozenCompressor(
            dense, batches, space=config, basis=config.basis, rewritten=True, seed=seed
        )
        if config.compensate:
            compressed = compressor.compress(config)
            subnet, small = compressed.subnet, compressed.model
        else:
            subnet = compressor.choose(config)
    # No importance in the bi-masks: units that stay count in full.
    supernet.lam.fill_(0.0)
    supernet.decisions.settle_to_(subnet)
    supernet.importance_known.fill_(True)
    return small


@torch.no_grad()
def take_weights_(supernet: Supernet, small: PreTrainedModel, args: OFBTrainingArguments) -> None:
    """Give a network the weights that were fitted for it, bit for bit the same on all ranks.

    Args:
        supernet: cut and folded.
        small: the fitted network, of the same sizes.
        args: of the run, for its ranks.
    """
    sizes = describe(supernet.model.config).sizes
    if describe(small.config).sizes != sizes:
        raise RuntimeError(f"the search was cut to {sizes}, the fit to others.")
    own = dict(supernet.model.named_parameters())
    for name, values in small.named_parameters():
        values = values.to(own[name].device, own[name].dtype)
        if args.world_size > 1:
            # Least squares may differ on other hardware.
            values = broadcast(values.contiguous())
        own[name].copy_(values)
