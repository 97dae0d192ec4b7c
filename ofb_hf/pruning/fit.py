"""Fit the layers of a cut network, so that the remaining units make up for the removed ones.

Layer by layer in the order of the forward pass, each linear layer is fitted by ridge regression to
give out what the same layer of the uncut network does, on inputs as the layers before it now
produce them (the reconstruction step of channel pruning, arXiv:1707.06168, eq. 1):

- layers that write into the residual stream, whose inputs lost units;
- where channels of a stream itself were cut, also the layers that read it: the norm before them
  sees another mean and another length of what is left, and what the removed channels held is partly
  in the others.

Tokens are reduced while fitting: the uncut network follows the choices of the cut one, so that both
see the same tokens, row by row.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..families.description import Slot, Submodule
from ..families.evaluation import evaluating
from ..families.registry import describe, family_of
from ..families.subnet import SubnetSpec
from ..families.token_reduction import same_tokens
from .paused_forward import PausedForward, Stops
from .sums import Sums, with_ones
from .surgery import flat_indices, unit_group_plan

# How strongly weights are held where they are, relative to the mean square of the inputs; and how
# much more strongly where rows are few, as for a head that reads one token of each image.
RIDGE = 1e-2
RIDGE_OF_FEW_ROWS = 1e-1
FEW_ROWS_PER_INPUT = 20


@torch.no_grad()
def fit_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    subnet: SubnetSpec,
    batches: Sequence[Tensor],
    *,
    readers: bool = True,
    shared: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Fit a cut classifier to the one that it was cut from, in place.

    Args:
        small: `dense` cut to `subnet`, in float32 or wider.
        dense: the uncut classifier, ours or stock.
        subnet: the units of `dense` that `small` has.
        batches: images of this process, (B, channels, height, width) each, at least one batch. Each
            is read once; what the networks make of all of them is in memory at the same time.
        readers: whether to fit the layers that read a cut stream, too; then `dense` is ours.
        shared: whether every process calls this with images of its own; their sums are added up.
        progress: is called with the numbers of layers done and to do.

    Returns:
        The names of the parameters that were fitted.
    """
    reading = _readers_of_cut_streams(dense, subnet) if readers else []
    paths = [*writers(small), *(path for path in reading if _is_linear(small, path))]
    rows = _kept_outputs(dense, subnet)
    fitted: list[str] = []
    pairs: list[_Pair] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(small, dense))
        stack.enter_context(same_tokens(small, dense, lambda: _running.decisions))
        stack.enter_context(Stops(small, paths, before=True))
        stack.enter_context(Stops(dense, paths, before=False))
        try:
            pairs += [_Pair(small, dense, batches, number) for number in range(len(batches))]
            for number in range(len(paths)):
                path = _fit_next(small, pairs, rows, reading, shared)
                layer = small.get_submodule(path)
                fitted += [f"{path}.{name}" for name, _ in layer.named_parameters()]
                progress(number + 1, len(paths))
        finally:
            for pair in pairs:
                pair.small.cancel()
                pair.dense.cancel()
    return fitted


# What the pass that runs in a thread shares with the other one over the same images.
_running = threading.local()


class _Pair:
    """The passes of the cut and the uncut network over one batch; the cut one runs ahead.

    Attributes:
        decisions: layer -> which tokens the cut network chose there; the uncut one follows.
    """

    def __init__(
        self,
        small: PreTrainedModel,
        dense: PreTrainedModel,
        batches: Sequence[Tensor],
        number: int,
    ):
        self.decisions: dict = {}
        self._batches = batches
        self._number = number
        self._images: Tensor | None = None
        self.small = PausedForward(lambda: self._run(small))
        self.dense = PausedForward(lambda: self._run(dense))

    def _run(self, model: PreTrainedModel) -> None:
        _running.decisions = self.decisions
        model(pixel_values=self._taken().to(model.device, model.dtype))

    def _taken(self) -> Tensor:
        """Return the images: read for the first pass, let go of by the second one."""
        if self._images is None:
            self._images = self._batches[self._number]
            return self._images
        images, self._images = self._images, None
        return images


def _is_linear(model: PreTrainedModel, path: str) -> bool:
    """Return whether a model has a linear layer there; halves that were left out have none."""
    return isinstance(dict(model.named_modules()).get(path), nn.Linear)


def _kept_outputs(dense: PreTrainedModel, subnet: SubnetSpec) -> dict[str, Tensor]:
    """Return the outputs that remain, (K,), of the layers that lost some, by module path."""
    architecture = describe(dense.config)
    kept: dict[str, Tensor] = {}
    for name, shape in architecture.sizes.items():
        if name in subnet.kept:
            kept[name] = flat_indices(subnet, name, shape)
    names = {name for name, _ in dense.named_parameters()}
    plan = unit_group_plan(architecture.submodules, kept, names)
    found: dict[str, Tensor] = {}
    for parameter, entries in plan.items():
        path, _, kind = parameter.rpartition(".")
        for axis, indices in entries:
            if kind == "weight" and axis == 0:
                found[path] = indices
    return found


def writers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that write into a residual stream.

    Returns:
        Module path -> the residual width that the layer's outputs belong to.
    """
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    for submodule in describe(model.config).submodules:
        for slot in submodule.slots:
            path, _, name = slot.parameter.rpartition(".")
            is_linear = isinstance(modules.get(path), nn.Linear)
            if name == "weight" and is_linear and _is_written(submodule, slot):
                found[path] = submodule.name
    return found


def _is_written(submodule: Submodule, slot: Slot) -> bool:
    """Return whether a slot runs over outputs that are added to the residual stream."""
    return submodule.kind == "embedding" and slot.gated and slot.axis == 0


def _readers_of_cut_streams(dense: PreTrainedModel, subnet: SubnetSpec) -> list[str]:
    """Return the layers that read a residual stream through its norms, of streams that were cut."""
    sizes = describe(dense.config).sizes
    readers: list[str] = []
    for stream in family_of(dense.config).bases(dense.config).streams:
        if subnet.shapes.get(stream.name, sizes[stream.name]) == sizes[stream.name]:
            continue
        for norm in stream.norms:
            readers += norm.readers
    return readers


def _fit_next(
    small: PreTrainedModel,
    pairs: list[_Pair],
    rows: dict[str, Tensor],
    reading: list[str],
    shared: bool,
) -> str:
    """Let all passes go on to the next layer and fit it; return its path."""
    sums = Sums()
    path = ""
    for pair in pairs:
        path, inputs = pair.small.advance()
        behind, outputs = pair.dense.advance()
        if behind != path:
            raise RuntimeError(f"the cut network is at {path}, the uncut one at {behind}.")
        layer = small.get_submodule(path)
        missing = _outputs(outputs, rows.get(path)) - _flat(
            F.linear(inputs, layer.weight, layer.bias)
        )
        inputs = _flat(inputs)
        sums.add(("rows",), len(inputs))
        if layer.bias is not None:
            # The bias is the weight of an input that is always 1.
            inputs = with_ones(inputs)
        sums.add(("inputs",), inputs.mT @ inputs)
        sums.add(("missing",), inputs.mT @ missing)
    if shared:
        sums.reduce_()
    _solve_(small.get_submodule(path), sums, path in reading)
    return path


def _flat(tensor: Tensor) -> Tensor:
    """Return the last axis in rows, at least in float32."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.flatten(0, -2).to(wide)


def _outputs(tensor: Tensor, kept: Tensor | None) -> Tensor:
    tensor = _flat(tensor)
    return tensor if kept is None else tensor[:, kept.to(tensor.device)]


def _solve_(layer: nn.Linear, sums: Sums, reads: bool) -> None:
    """Give a layer the (W, b) that minimise |inputs W' + b - wanted|^2 + ridge |change|^2."""
    gram, cross = sums[("inputs",)], sums[("missing",)]
    is_few = float(sums[("rows",)]) < FEW_ROWS_PER_INPUT * layer.in_features
    ridge = RIDGE_OF_FEW_ROWS if reads and is_few else RIDGE
    ridge = ridge * gram.diagonal().mean().clamp(min=1e-12)
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    change = torch.linalg.solve(gram, cross).mT.to(
        layer.weight
    )  # (out, in), with bias (out, in + 1)
    layer.weight += change[:, : layer.in_features]
    if layer.bias is not None:
        layer.bias += change[:, -1]
