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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..families.description import Slot, Submodule
from ..families.evaluation import evaluating
from ..families.registry import describe, family_of
from ..families.subnet import SubnetSpec
from ..families.token_reduction import same_tokens
from .paused_forward import Call, PausedForward, waiting_at
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
            is read once; the residual streams of all of them are in memory at the same time.
        readers: whether to fit the layers that read a cut stream, too; then `dense` is ours.
        shared: whether every process calls this with images of its own; their sums are added up.
        progress: is called with the numbers of layers done and to do.

    Returns:
        The names of the parameters that were fitted.
    """
    reading = _readers_of_cut_streams(dense, subnet) if readers else []
    paths = [*writers(small), *(path for path in reading if _is_linear(small, path))]
    embeddings = describe(small.config).embeddings
    units = {embeddings: [], **_units(small, paths)}
    rows = _kept_outputs(dense, subnet)
    # They lie behind the place where the cut network decides about tokens.
    ends = {each.output for each in describe(small.config).submodules if each.kind == "mlp"}
    fitted: list[str] = []
    pairs: list[_Pair] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(small, dense))
        stack.enter_context(same_tokens(small, dense, lambda: _current.decisions))
        stack.enter_context(waiting_at(small, units))
        stack.enter_context(waiting_at(dense, units))
        try:
            for images in batches:
                pairs.append(_Pair(small, dense, images.shape))
                pairs[-1].go_on()
                pairs[-1].embed(images)
            for number in range(len(units) - 1):
                for pair in pairs:
                    pair.go_on()
                unit = pairs[0].unit
                stages = _stages(small, unit, units[unit], reading)
                for stage in stages:
                    is_end = stage is stages[-1] and stage[0] in ends
                    _fit_stage_(pairs, stage, rows, reading, shared, is_end)
                    for path in stage:
                        layer = small.get_submodule(path)
                        fitted += [f"{path}.{name}" for name, _ in layer.named_parameters()]
                for pair in pairs:
                    pair.compute()
                progress(number + 1, len(units) - 1)
        finally:
            for pair in pairs:
                pair.cancel()
    return fitted


def _units(small: PreTrainedModel, paths: list[str]) -> dict[str, list[str]]:
    """Return the modules that passes wait at, with the layers to fit in each.

    They are the transformer blocks, and the layers that are in none of them.
    """
    blocks = {each.block for each in describe(small.config).submodules if each.block}
    units: dict[str, list[str]] = {}
    for path in paths:
        of_block = [block for block in blocks if path.startswith(f"{block}.")]
        units.setdefault(of_block[0] if of_block else path, []).append(path)
    return units


def _stages(
    small: PreTrainedModel, unit: str, paths: list[str], reading: list[str]
) -> list[list[str]]:
    """Return the layers of a unit in the order of the forward pass, those with one input together.

    Args:
        small: the model.
        unit: a module that passes wait at.
        paths: the layers to fit in it.
        reading: those that read a cut stream.
    """
    stages: list[list[str]] = []
    for submodule in describe(small.config).submodules:
        if submodule.block != unit or submodule.output not in paths:
            continue
        # What reads the stream for this half of the block: its slots run over the same units.
        own = {slot.parameter.rpartition(".")[0] for slot in submodule.slots if slot.axis == 0}
        stages += [[path for path in paths if path in own and path in reading]]
        stages += [[submodule.output]]
    stages = [stage for stage in stages if stage]
    return stages or [paths]


class _Reached(Exception):
    """End a computation that has given what was wanted."""


# What a computation shares with the other network over the same images.
_current = threading.local()


class _Pair:
    """The passes of the cut and the uncut network over one batch.

    Args:
        small, dense: the networks; they wait where pixels become tokens, and at every unit.
        shape: of the images, (B, channels, height, width).

    Attributes:
        unit: the module that both wait at.
        decisions: layer -> which tokens the cut network chose there; the uncut one follows.
    """

    def __init__(self, small: PreTrainedModel, dense: PreTrainedModel, shape: torch.Size):
        self.models = (small, dense)
        self.decisions: dict = {}
        self.unit = ""
        self._forwards: list[PausedForward] = []
        for model in self.models:
            # A pass keeps what it was called with, so it gets something that takes no memory.
            stand_in = torch.zeros((), dtype=model.dtype, device=model.device).expand(shape)
            self._forwards.append(PausedForward(partial(model, pixel_values=stand_in)))
        self._calls: list[Call | None] = [None, None]
        self._results: list[Any] = [None, None]

    def go_on(self) -> None:
        """Let both passes go on to the next unit, with the results of this one."""
        results, self._results = self._results, [None, None]
        for number, forward in enumerate(self._forwards):
            self._calls[number] = forward.send(results[number])
            results[number] = None
        self.unit = self._calls[0].path
        if self._calls[1].path != self.unit:
            raise RuntimeError(
                f"the cut network is at {self.unit}, the uncut one at {self._calls[1].path}."
            )

    def embed(self, images: Tensor) -> None:
        """Turn pixels into tokens, where both passes wait first."""
        for number, model in enumerate(self.models):
            images = images.to(model.device, model.dtype)
            self._results[number] = self._call(number, images)
            self._calls[number] = None

    def compute(self) -> None:
        """Compute this unit, now that it is fitted, where it has not been computed yet."""
        # The cut network comes first: it decides about tokens.
        for number, call in enumerate(self._calls):
            if call is not None:
                self._finish(number, self._call(number, call.args[0]))

    def _finish(self, number: int, result: Any) -> None:
        self._results[number] = _in_place(self._calls[number].args[0], result)
        self._calls[number] = None

    def inputs(self, path: str) -> Tensor:
        """Return what a layer of the cut network gets."""
        layer = self.models[0].get_submodule(path)
        seen: list[Tensor] = []

        def stop(layer: nn.Module, args: tuple) -> None:
            seen.append(args[0])
            raise _Reached

        self._call_until(0, [layer.register_forward_pre_hook(stop)])
        return seen[0]

    def outputs(self, paths: list[str], finish: bool) -> list[Tensor]:
        """Return what layers of the uncut network give out that read the same input.

        Args:
            paths: of the layers.
            finish: whether to compute the rest of the unit as well, as nothing of it is asked for
                later. The cut network has decided about tokens then.
        """
        seen: dict[str, Tensor] = {}

        def see(layer: nn.Module, args: tuple, output: Tensor, path: str) -> None:
            seen[path] = output
            if len(seen) == len(paths) and not finish:
                raise _Reached

        handles = []
        for path in paths:
            layer = self.models[1].get_submodule(path)
            handles.append(layer.register_forward_hook(partial(see, path=path)))
        result = self._call_until(1, handles)
        if finish:
            self._finish(1, result)
        return [seen[path] for path in paths]

    def _call_until(self, number: int, handles: list[RemovableHandle]) -> Any:
        """Compute a unit, as far as hooks let it; return its result if it comes to its end."""
        try:
            return self._call(number, self._calls[number].args[0])
        except _Reached:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, number: int, first: Tensor) -> Any:
        """Compute the unit that a pass waits at, of this first argument."""
        _current.decisions = self.decisions
        call = self._calls[number]
        unit = self.models[number].get_submodule(call.path)
        return unit(first, *call.args[1:], **call.kwargs)

    def cancel(self) -> None:
        """Let go of both passes."""
        for forward in self._forwards:
            forward.cancel()


def _in_place(stream: Tensor, result: Any) -> Any:
    """Return a unit's result in the memory of the stream that it was computed from.

    The frames of a pass keep the streams before and after, so they had better be the same.
    """
    is_alone = isinstance(result, Tensor)
    after = result if is_alone else result[0]
    if after.shape != stream.shape or after.data_ptr() == stream.data_ptr():
        return result
    stream.copy_(after)
    return stream if is_alone else (stream, *result[1:])


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


def _fit_stage_(
    pairs: list[_Pair],
    stage: list[str],
    rows: dict[str, Tensor],
    reading: list[str],
    shared: bool,
    is_end: bool,
) -> None:
    """Fit layers that read the same input, in place.

    Args:
        pairs: over all batches.
        stage: the layers.
        rows: outputs that remain, by layer.
        reading: layers that read a cut stream.
        shared: whether sums are added up over processes.
        is_end: whether they are the last ones of the unit, and tokens were decided on before.
    """
    small = pairs[0].models[0]
    sums = Sums()
    for pair in pairs:
        given = pair.inputs(stage[0])
        wanted = pair.outputs(stage, is_end)
        inputs = _flat(given)
        # The bias is the weight of an input that is always 1.
        extended = with_ones(inputs)
        sums.add(("rows",), len(inputs))
        sums.add(("inputs",), extended.mT @ extended)
        for path, outputs in zip(stage, wanted, strict=True):
            layer = small.get_submodule(path)
            present = _flat(F.linear(given, layer.weight, layer.bias))
            sums.add((path,), extended.mT @ (_outputs(outputs, rows.get(path)) - present))
    if shared:
        sums.reduce_()
    for path in stage:
        _solve_(small.get_submodule(path), sums, path, path in reading)


def _flat(tensor: Tensor) -> Tensor:
    """Return the last axis in rows, at least in float32."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.flatten(0, -2).to(wide)


def _outputs(tensor: Tensor, kept: Tensor | None) -> Tensor:
    tensor = _flat(tensor)
    return tensor if kept is None else tensor[:, kept.to(tensor.device)]


def _solve_(layer: nn.Linear, sums: Sums, path: str, reads: bool) -> None:
    """Give a layer the (W, b) that minimise |inputs W' + b - wanted|^2 + ridge |change|^2."""
    gram, cross = sums[("inputs",)], sums[(path,)]
    if layer.bias is None:
        gram, cross = gram[:-1, :-1], cross[:-1]
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
