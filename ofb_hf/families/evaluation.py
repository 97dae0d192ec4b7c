"""Evaluation mode for the time of a block, logits without what they do not follow from, and how far
apart they are."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .registry import FAMILIES, is_ours


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode for the time of a block.

    At its end every model as a whole is in the mode in which the model itself was before.
    """
    was_training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)


def logits_of(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Return the logits (B, classes) of any image classifier.

    Ours leave out the tokens that logits do not follow from, where their family says how. The model
    is called in any case: it may have hooks, or be wrapped or compiled.

    Args:
        pixel_values: (B, C, H, W).
    """
    arguments = {}
    for family in FAMILIES.values():
        # a subclass may take other arguments
        has_class = type(model).__name__ == family.model_class.__name__ and is_ours(model)
        if has_class and family.only_logits is not None:
            arguments = family.only_logits(pixel_values)
    return model(pixel_values=pixel_values, **arguments).logits


def total_distance(found: Tensor, wanted: Tensor, num_labels: int) -> Tensor:
    """Return how far outputs are from those that are wanted, summed over the images, a scalar.

    Args:
        found, wanted: (B, K) logits, or features of models without a head.
        num_labels: K for logits, whose distance is KL(wanted || found) in nats; 0 for features,
            whose distance is squared.
    """
    if not num_labels:
        return (found - wanted).square().sum()
    expected = wanted.log_softmax(-1)
    predicted = found.log_softmax(-1)
    return F.kl_div(predicted, expected, reduction="sum", log_target=True)
