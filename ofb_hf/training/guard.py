"""Keep the best of a training: the weights before it, those after it, or their average.

A network that was cut well can be worse after a short training than before. So the weights that a
training began with are kept, and all of them are measured in the end on images that it never saw.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from transformers import TrainingArguments
from transformers.utils import logging

from ..families.evaluation import evaluating, logits_of
from .averaging import WeightAverage

logger = logging.get_logger(__name__)

BEFORE, AFTER, AVERAGE = "before", "after", "average"


class Outcome(NamedTuple):
    """What one version of the weights made of the held-out images of this process."""

    correct: Tensor  # (n,), 0 or 1, float64
    losses: Tensor  # (n,), float64


class TrainingGuard:
    """Remember weights, and decide afterwards which ones to keep.

    Args:
        dataset: rows of {"pixel_values" (3, H, W), "labels"} that the training does not see.

    Attributes:
        kept: which version was kept: "before", "after" or "average"; None while nothing is decided.
        top1: version -> its accuracy on the held-out images in percent.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.kept: str | None = None
        self.top1: dict[str, float] = {}
        self._before: dict[str, Tensor] | None = None

    @property
    def remembers(self) -> bool:
        """Whether there are weights from before."""
        return self._before is not None

    def remember(self, model: nn.Module) -> None:
        """Keep the present weights as those before the training."""
        self._before = _weights_of(model)

    def decide_(
        self, model: nn.Module, args: TrainingArguments, average: WeightAverage | None = None
    ) -> None:
        """Put the best version of the weights into a model, the same on all ranks.

        Args:
            model: holds the weights after the training.
            args: of the training, for its batch size, device and ranks.
            average: of the weights, if there is one.
        """
        versions = {BEFORE: self._before, AFTER: _weights_of(model)}
        if average is not None:
            versions[AVERAGE] = average.average
        outcomes = {}
        for name, weights in versions.items():
            _put_(model, weights)
            outcomes[name] = self._measure(model, args)
        self.kept, shares = best_version(outcomes, args.device)
        self.top1 = {name: 100 * share for name, share in shares.items()}
        _put_(model, versions[self.kept])
        if args.process_index == 0:
            logger.warning(self.sentence)

    @property
    def report(self) -> dict[str, Any]:
        """What was measured and kept, as JSON takes it: `kept`, `images` and `top1`."""
        return {"kept": self.kept, "images": len(self.dataset), "top1": self.top1}

    @property
    def sentence(self) -> str:
        """The report as a sentence."""
        figures = ", ".join(f"{name} {top1:.2f} %" for name, top1 in self.top1.items())
        return (
            f"top-1 on {len(self.dataset)} held-out training images: {figures}; kept the weights "
            f"{WORDS[self.kept]}."
        )

    @torch.no_grad()
    def _measure(self, model: nn.Module, args: TrainingArguments) -> Outcome:
        """Return the outcome on this rank's part of the images."""
        mine = range(args.process_index, len(self.dataset), args.world_size)
        correct, losses = [torch.zeros(0)], [torch.zeros(0)]
        with evaluating(model):
            for batch in DataLoader(Subset(self.dataset, mine), args.eval_batch_size):
                logits = logits_of(model, batch["pixel_values"].to(args.device)).float()
                labels = batch["labels"].to(args.device)
                correct.append((logits.argmax(-1) == labels).cpu())
                losses.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        return Outcome(torch.cat(correct).double(), torch.cat(losses).double())

    def save(self, file: Path) -> None:
        """Write the weights from before the training as safetensors, if there are any yet."""
        if self._before is not None:
            safetensors.torch.save_file(self._before, file)

    def load(self, file: Path) -> None:
        """Read what `save` wrote; nothing if it wrote nothing."""
        self._before = safetensors.torch.load_file(file) if file.is_file() else None


WORDS = {
    BEFORE: "from before the training",
    AFTER: "after the training",
    AVERAGE: "of the average over the training",
}


def best_version(
    outcomes: Mapping[str, Outcome], device: torch.device | str = "cpu"
) -> tuple[str, dict[str, float]]:
    """Return which version is best, and the accuracy of each as a fraction.

    It is the most accurate one. Among those that are less accurate by no more than the standard
    error of the difference over the same images, it is the one with the least loss.

    Args:
        outcomes: of this rank's images.
        device: where ranks add up what they counted.
    """
    names = list(outcomes)
    count = len(next(iter(outcomes.values())).correct)
    sums = [float(count)]
    for outcome in outcomes.values():
        sums += [float(outcome.correct.sum()), float(outcome.losses.sum())]
    total, *others = _over_ranks(sums, device)
    shares = dict(zip(names, (number / total for number in others[::2]), strict=True))
    losses = dict(zip(names, others[1::2], strict=True))
    first = max(names, key=shares.__getitem__)
    differences = [outcomes[first].correct - outcomes[name].correct for name in names]
    squares = _over_ranks([float(each.square().sum()) for each in differences], device)
    close = []
    for name, square in zip(names, squares, strict=True):
        behind = shares[first] - shares[name]
        variance = max(square / total - behind**2, 0.0) / total
        if behind <= variance**0.5:
            close.append(name)
    return min(close, key=losses.__getitem__), shares


def _over_ranks(values: list[float], device: torch.device | str) -> list[float]:
    """Return the sums of numbers over all ranks; float32 suffices for counts of images."""
    return reduce(torch.tensor(values, device=device), "sum").tolist()


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters of a model, in the memory of the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
    }


@torch.no_grad()
def _put_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters of a model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
