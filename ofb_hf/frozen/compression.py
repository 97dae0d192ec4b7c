"""Compress a classifier whose weights stay frozen: measured on unlabeled images, fitted in closed
form.

In four steps, each one pass or a few over the calibration images: rewrite the network in a basis in
which units are easy to cut (`pruning/equivalent_basis.py`), measure for every submodule what
leaving units out costs (`curves.py`), choose sizes and tokens under the exact budget
(`choice.py`), cut, and fit what is left (`pruning/fit.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..choice.error_curves import ErrorCurve
from ..families.evaluation import evaluating, logits_of, total_distance
from ..families.registry import (
    describe,
    family_of,
    require_classifier,
    require_single_label,
)
from ..families.subnet import SubnetSpec, require_basis
from ..families.token_reduction import supports_tokens
from ..pruning.equivalent_basis import equivalent_basis
from ..pruning.fit import fit_
from ..pruning.surgery import slice_model
from ..space.configuration import BiMaskConfig, default_config
from ..space.search_space import SearchSpace
from .choice import chosen_subnet
from .curves import measure_curves
from .memory import trim_memory

# Images for the second moments of a basis.
BASIS_IMAGES = 128
# Tokens that a fit should see for each input of a layer; more make it hardly better.
TOKENS_PER_INPUT = 64
# Floats that a fit may hold at once, 1 GiB.
MEMORY = 2**28
# Where all features are equal.
TINY = 1e-12
# Images that are computed together.
BATCH = 16
# Images on which a subnet is fitted to see whether tokens should give up more of the budget, or
# less; as many others tell.
TRIED_IMAGES = 64


@dataclass(frozen=True)
class Compressed:
    """A compressed classifier and where it comes from.

    Args:
        model: the small classifier, of the stored type of the given one.
        subnet: its units as units of `dense`.
        dense: the given classifier in the basis that was cut.
        curves: submodule -> what each of its sizes would cost.
    """

    model: PreTrainedModel
    subnet: SubnetSpec
    dense: PreTrainedModel
    curves: dict[str, ErrorCurve]


class Part(Sequence):
    """Some batches of a sequence, read when they are asked for.

    Args:
        batches: the sequence.
        numbers: which of them.
    """

    def __init__(self, batches: Sequence[Tensor], numbers: range):
        self.batches = batches
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Tensor:
        return self.batches[self.numbers[number]]


class FrozenCompressor:
    """Measure a classifier once; compress it to any number of budgets.

    Args:
        model: a classifier, stock or ours; it stays as it is. Without a head (`num_labels` 0) its
            features decide.
        batches: calibration images, a sequence of (B, channels, height, width), the same on all
            processes, which share the work. Each is read several times.
        space: sizes to choose from and whether tokens are chosen; its budget does not matter. By
            default `frozen_config` of the model.
        basis: "equivalent": heads and, where the family allows, residual streams are rewritten
            before the cut; "heads": heads only; "given": nothing, so only MLP units and whole heads
            are cut.
        rewritten: whether `model` is a classifier of this package in that basis already.
        seed: of the targets that are drawn from the model's own outputs.
        progress: called as progress(step, done, total) after each batch.

    Raises:
        UnsupportedArchitectureError: if the model belongs to no supported family.
        TypeError: for images that are no tensors of floating-point numbers.
        ValueError: for an unknown basis, without images or of another shape, for a model with one
            output or one that is not trained with a softmax, and for outputs that are not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        space: BiMaskConfig | None = None,
        basis: str = "equivalent",
        rewritten: bool = False,
        seed: int = 0,
        progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    ):
        require_compressible(model)
        require_basis(basis)
        require_images(batches, model.config)
        state = PartialState()
        if len(batches) < state.num_processes:
            raise ValueError(
                f"there are {len(batches)} batches of calibration images for "
                f"{state.num_processes} processes; give more images or smaller batches, so that "
                "each process has one."
            )
        self.batches = batches
        self.basis = basis
        self.progress = progress
        self.stored_type = model.dtype
        self.config = space or frozen_config(model.config)
        self._answers: list[Tensor] | None = None
        self.dense = model.eval() if rewritten else self._rewritten(model)
        self.space = frozen_space(self.config, self.dense.config, basis)
        self.curves = measure_curves(
            self.dense,
            self.space,
            batches,
            seed=seed,
            progress=self._step("measuring"),
        )
        trim_memory()

    def _step(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)

    def _rewritten(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return the model in the basis that is cut."""
        if self.basis == "given":
            dense = family_of(model.config).from_dense(model).float().eval()
            family_of(dense.config).pin(dense.config)
            return dense
        count = min(len(self.batches), math.ceil(BASIS_IMAGES / len(self.batches[0])))
        some = Part(self.batches, range(count))
        streams = self.basis == "equivalent"
        return equivalent_basis(model, some, streams=streams, progress=self._step("rewriting"))

    def compress(self, config: BiMaskConfig) -> Compressed:
        """Return the classifier under one budget.

        Args:
            config: the budget; the space of sizes is that of the whole compressor.

        Raises:
            UnreachableBudgetError: if no subnet fits, naming the smallest possible cost.
        """
        subnet = self.choose(config)
        trim_memory()
        processes = PartialState().num_processes
        most = max(processes, images_to_fit(self.dense, processes) // len(self.batches[0]))
        fitted_on = Part(self.batches, range(min(len(self.batches), most)))
        small = self._fitted(subnet, fitted_on, self._step("fitting")).to(self.stored_type)
        trim_memory()
        return Compressed(small, subnet, self.dense, self.curves)

    def choose(self, config: BiMaskConfig) -> SubnetSpec:
        """Return the units, and the tokens, that are kept under one budget.

        Args, errors: as of `compress`.
        """
        subnet = chosen_subnet(
            self.dense, config, self.space, self.curves, self.config.search_tokens, self._distance
        )
        return replace(subnet, basis=self.basis)

    def _fitted(
        self,
        subnet: SubnetSpec,
        batches: Sequence[Tensor],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> PreTrainedModel:
        """Return the network of a subnet, fitted on batches that the processes share."""
        state = PartialState()
        mine = Part(batches, range(state.process_index, len(batches), state.num_processes))
        small = slice_model(self.dense, subnet).eval()
        fit_(small, self.dense, subnet, mine, shared=True, progress=progress)
        return small

    def _distance(self, subnet: SubnetSpec) -> float:
        """Return how far a subnet is from the model if it is fitted on a part of the images."""
        batches = self.batches
        processes = PartialState().num_processes
        count = max(processes, math.ceil(TRIED_IMAGES / len(batches[0])))
        count = min(count, len(batches))
        others = range(count, min(len(batches), 2 * count))
        fitted_on = Part(batches, range(count))
        measured_on = Part(batches, others) if others else fitted_on
        small = self._fitted(subnet, fitted_on)
        if self._answers is None:
            self._answers = [_answers(self.dense, images) for images in measured_on]
        return _divergence(small, measured_on, self._answers)


def require_compressible(model: PreTrainedModel) -> None:
    """Raise unless a model predicts one of several classes, or gives out features.

    Raises:
        TypeError, UnsupportedArchitectureError: if it is no classifier of a supported family.
        ValueError: if its outputs are no logits of a softmax over two or more classes.
    """
    require_classifier(model)
    require_single_label(
        model.config,
        advice="Give a classifier of that kind, or a checkpoint without a head, whose features "
        "decide.",
    )


def require_images(batches: Sequence[Tensor], config: PreTrainedConfig) -> None:
    """Raise unless there are calibration images, and the first batch is what a model takes.

    Raises:
        TypeError: for other things than a sequence of tensors of floating-point numbers.
        ValueError: without an image, and for another shape.
    """
    if not isinstance(batches, Sequence):
        raise TypeError(
            f"images is a {type(batches).__name__}; give a tensor (N, channels, height, width), or "
            "a sequence of such batches, which are read several times."
        )
    if not len(batches) or not len(batches[0]):
        raise ValueError("there are no calibration images, or none in the first batch.")
    first = batches[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        kind = str(first.dtype) if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(
            f"images are {kind}; give tensors of floating-point numbers, as the image processor of "
            "the model returns them."
        )
    channels = describe(config).num_channels
    if first.dim() != 4 or first.shape[1] != channels:
        raise ValueError(
            f"a batch of images has the shape {tuple(first.shape)}; the model takes (images, "
            f"{channels}, height, width)."
        )


def divergence(small: PreTrainedModel, dense: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """Return how far the predictions of two classifiers are apart: KL in nats, a mean over images.

    Without a head it is the mean squared distance of features, relative to their variance.

    Args:
        small, dense: the classifiers.
        batches: images, (B, channels, height, width) each.
    """
    return _divergence(small, batches, [_answers(dense, images) for images in batches])


@torch.no_grad()
def _answers(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Return logits, or features of a model without a head, in float32 in evaluation mode."""
    with evaluating(model):
        return logits_of(model, images.to(model.device, model.dtype)).float()


def _divergence(small: PreTrainedModel, batches: Sequence[Tensor], answers: list[Tensor]) -> float:
    """Return the divergence from given answers of the dense classifier."""
    total = 0.0
    for batch, wanted in zip(batches, answers, strict=True):
        found = _answers(small, batch)
        total += float(total_distance(found, wanted, small.config.num_labels))
    everything = torch.cat(answers)  # (N, classes)
    if small.config.num_labels:
        return total / len(everything)
    spread = everything - everything.mean(0)
    return total / max(float(spread.square().sum()), TINY)


def images_to_fit(model: PreTrainedModel, processes: int = 1) -> int:
    """Return how many images a fit should use: enough for its widest layer, if memory allows it.

    Args:
        model: the classifier.
        processes: that share what waits in memory. How many images are enough does not depend on
            them, so neither does the result.
    """
    architecture = describe(model.config)
    widest = max(math.prod(shape) for shape in architecture.sizes.values())
    # The widest layers come last, where a Swin has the fewest tokens.
    enough = math.ceil(TOKENS_PER_INPUT * widest / math.prod(architecture.token_grid))
    (width,) = architecture.sizes[architecture.first_width]
    # The residual streams of both networks, largest where patches enter.
    possible = MEMORY * processes // (2 * (math.prod(architecture.patch_grid) + 1) * width)
    return max(1, min(enough, possible))


def frozen_config(model_config: PreTrainedConfig, **values: Any) -> BiMaskConfig:
    """Return the space that a frozen network is cut in: wider than that of a search that trains.

    Attentions and MLPs may be left out, and tokens are chosen as well where the family can reduce
    them.

    Args:
        model_config: of the classifier.
        values: fields of `BiMaskConfig` to set, such as the budget.
    """
    values.setdefault("search_depth", True)
    if "search_tokens" not in values:
        able = (
            supports_tokens(model_config) and getattr(model_config, "token_schedule", None) is None
        )
        by_params = values.get("target_params") is not None
        values["search_tokens"] = able and not by_params
    return default_config(model_config, **values)


def frozen_space(config: BiMaskConfig, model_config: PreTrainedConfig, basis: str) -> SearchSpace:
    """Return the sizes to choose from by error curves: only streams that were rotated are cut.

    Args:
        config: the space of all sizes.
        model_config: of the classifier.
        basis: that it is cut in.
    """
    rotated = set()
    if basis == "equivalent":
        rotated = {stream.name for stream in family_of(model_config).bases(model_config).streams}
    spaces = []
    for space in config.search_space(model_config):
        if space.kind == "embedding" and space.name not in rotated:
            continue
        if space.kind == "attention" and basis == "given":
            # First channels mean nothing in the given basis.
            whole = [size for size in space.dim_candidates if size in (0, space.head_dim)]
            space = replace(space, dim_candidates=tuple(whole))
        spaces.append(space)
    return SearchSpace(tuple(spaces))


def compress_frozen(
    model: PreTrainedModel,
    images: Tensor | Sequence[Tensor],
    *,
    basis: str = "equivalent",
    seed: int = 0,
    **budget: Any,
) -> Compressed:
    """Compress a classifier without training, measured on unlabeled images.

    Args:
        model: a classifier, stock or ours; it stays as it is.
        images: (N, channels, height, width) as the model takes them, or batches of them.
        basis, seed: see `FrozenCompressor`.
        budget: `target_macs`, `target_params` or `target_latency_ms` with `latency_table`, and
            other fields of `BiMaskConfig` that say what may change.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTForImageClassification
    >>> from ofb_hf import compress_frozen, count_macs
    >>> from ofb_hf.models.shapes import SHAPES

    >>> model = ViTForImageClassification(SHAPES["digits_vit"].config(["even", "odd"]))
    >>> small = compress_frozen(model, torch.randn(16, 3, 8, 8), target_macs=0.5).model
    >>> count_macs(small) <= 0.5 * count_macs(model)
    True
    ```"""
    if isinstance(images, Tensor):
        images = images.split(BATCH) if len(images) else ()
    config = frozen_config(model.config, **budget)
    return FrozenCompressor(model, images, space=config, basis=basis, seed=seed).compress(config)
