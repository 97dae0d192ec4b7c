"""How bi-masks act on a model without changing its modules, parameters or state-dict keys.

A gated module reads a gated parameter as `parameter * gate` along one axis; the parameter itself
stays where it was. Scaling weight rows costs little beside scaling (batch x tokens) activations,
unless those are few, and it is literally the folding that `compress` does at the end. Gates are
computed once per forward pass of the supernet and shared through a `GateStore`.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..families.description import Submodule, presence_of


class GateStore:
    """The current gate values, quantity -> (U,), shared by all gated modules of one supernet.

    A quantity is a submodule's name, or `presence_of` it: (1,), the gate of what it adds whichever
    units it keeps. Gradient checkpointing re-reads the same tensors in the backward pass, so the
    values stay until the next forward. A copy starts out empty: non-leaf tensors cannot be
    deep-copied, and the copy computes its own.

    Attributes:
        values: quantity -> (U,).
        of_images: quantity -> (B, U), one gate for every image of the batch; then there are no
            `values`.
        separates: whether the next forward pass is to have those.
        alive: residual width -> its living channels, bool (U,), or None if all are.
    """

    def __init__(self):
        self.values: dict[str, Tensor] = {}
        self.of_images: dict[str, Tensor] = {}
        self.separates = False
        self.alive: dict[str, Tensor | None] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def __deepcopy__(self, memo: dict) -> "GateStore":
        memo[id(self)] = copy = GateStore()
        return copy

    def clear(self) -> None:
        """Forgets everything, as after a shrink."""
        self.values, self.of_images = {}, {}
        self._versions.clear()

    def separate_(self, count: int) -> None:
        """Gives each of `count` images gates of its own, equal to the values: leaves of the graph,
        but for presence."""
        gates = {
            name: gate.detach().expand(count, -1).clone().requires_grad_()
            for name, gate in self.values.items()
        }
        present = {presence_of(name): gate.amax(1, keepdim=True) for name, gate in gates.items()}
        self.of_images = gates | {name: gate for name, gate in present.items() if name in gates}
        self.values = {}

    def refresh_liveness(self, name: str, alive: Tensor) -> None:
        """Tells the norms which units (bool, any shape) of a submodule live.

        Reading "is everything alive" from the device would wait for it; the version counter says
        for free whether the tensor was written since the last look.
        """
        version = (id(alive), alive._version)
        if self._versions.get(name) != version:
            self._versions[name] = version
            with torch.inference_mode(False):  # training may go on with it after an evaluation
                self.alive[name] = None if alive.all() else alive.flatten().clone()


def apply_gate(parameter: Tensor, gate: Tensor, axis: int) -> Tensor:
    """Scales a tensor along one axis: gate (U,) against `parameter.shape[axis] == U`, or (1,) for
    all of it."""
    shape = [1] * parameter.ndim
    shape[axis] = -1
    return parameter * gate.reshape(shape).to(parameter.dtype)


class GatedLinearFunction(torch.autograd.Function):
    """A linear layer whose outputs are gated through its weight and bias; arguments as for
    `gated_linear`.

    Left to autograd, `weight * gate` would be kept for the backward pass: a second copy of every
    weight. Here it is made again there, which costs little beside the products with it.
    """

    # Not split into `forward` and `setup_context`: torch would inspect the signature at every call.
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
        """Values, in the precision of `x`."""
        ctx.save_for_backward(x, weight, bias, gate)  # all of which are there anyway
        # outputs are fewer numbers than weights, and so cheaper to scale
        ctx.few = x.numel() < x.shape[-1] ** 2
        if ctx.few:
            return F.linear(
                x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
            ) * gate.to(x.dtype)
        bias = None if bias is None else apply_gate(bias, gate, 0).to(x.dtype)
        return F.linear(x, apply_gate(weight, gate, 0).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of inputs, weight, bias and gate."""
        x, weight, bias, gate = ctx.saved_tensors
        for_x, for_weight, for_bias, for_gate = ctx.needs_input_grad
        # also a single vector
        rows, x = (torch.atleast_2d(each).flatten(0, -2) for each in (grad, x))
        grad_x = grad_weight = grad_bias = grad_gate = None
        # of flat rows: as many products as there are images, with the same weights, take longer
        # than one
        if for_x:
            if ctx.few:
                grad_x = (rows * gate.to(grad.dtype)) @ weight.to(grad.dtype)
            else:
                grad_x = rows @ apply_gate(weight, gate, 0).to(grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if for_weight or for_gate:
            grad_weight = (rows.mT @ x).to(weight.dtype)  # of the gated weight, so far
        if bias is not None and (for_bias or for_gate):
            grad_bias = rows.sum(0).to(bias.dtype)
        if for_gate:
            grad_gate = (grad_weight * weight).sum(1)
            grad_gate = (
                grad_gate if bias is None else torch.addcmul(grad_gate, grad_bias, bias)
            ).to(gate.dtype)
        if for_weight:
            # in place, for new memory takes longer than the product
            grad_weight *= gate[:, None].to(weight.dtype)
        grad_bias = apply_gate(grad_bias, gate, 0) if for_bias else None
        return grad_x, grad_weight if for_weight else None, grad_bias, grad_gate


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """`F.linear` of `weight * gate` and `bias * gate`, row by row; under autocast in its precision.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None. gate: (O,).
    """
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if enabled and x.dtype != torch.float64:  # which autocast leaves alone
        x = x.to(torch.get_autocast_dtype(device))
    return GatedLinearFunction.apply(x, weight, bias, gate)


class GatedLinear(nn.Linear):
    """A linear layer with gated outputs."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self._gate_store.values.get(self._scaled_by[0])
        return super().forward(x) if gate is None else gated_linear(x, self.weight, self.bias, gate)


class ScaledFunction(torch.autograd.Function):
    """`x * gate` for a gate that broadcasts against x; where it is 0, as for units that are gone,
    it has no gradient.

    Left to autograd, x would be kept for the backward pass. Here the product is, which whoever
    reads it keeps as well.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        """Values, in the precision of `x`."""
        out = x * gate.to(x.dtype)
        ctx.save_for_backward(out, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and gate."""
        out, gate = ctx.saved_tensors
        grad_gate = (grad.to(gate.dtype) * out).sum_to_size(gate.shape) / gate
        return grad * gate.to(grad.dtype), grad_gate.masked_fill(gate == 0, 0.0)


class ImageGated:
    """A linear layer, convolution or norm that gates its outputs image by image, where gates are
    given so.

    Attributes:
        _scaled_by: quantities that gate weight and bias, output by output.
        _present_with: quantities that gate the bias besides, as a whole.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, gates = super().forward(x), self._gate_store.of_images
        if not gates:
            return out
        # Images come first, and Swin lines up the windows of each; channels come last, or second
        # after a convolution.
        is_map, count = isinstance(self, nn.Conv2d), len(next(iter(gates.values())))
        rows = out.flatten(2).mT if is_map else out.reshape(count, -1, out.shape[-1])
        for gate in (gates[name] for name in self._present_with if name in gates):
            rows = rows + self._parameters["bias"].to(out.dtype) * (gate[:, None] - 1).to(out.dtype)
        for gate in (gates[name] for name in self._scaled_by if name in gates):
            rows = ScaledFunction.apply(rows, gate[:, None])
        return (rows.mT if is_map else rows).reshape(out.shape)


def _gated_parameter(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter, store = module._parameters[name], module._gate_store
        if parameter is None:
            return None
        for gate, axis in module._gates[name]:
            if gate in store.values:
                parameter = apply_gate(parameter, store.values[gate], axis)
            # tokens, (1, N, U)
            elif gate in store.of_images and not isinstance(module, ImageGated):
                parameter = parameter * store.of_images[gate][:, None].to(parameter.dtype)
        return parameter

    return property(read)


class _LivingLayerNorm(nn.LayerNorm):
    """LayerNorm whose statistics run over living channels only, as they will once the others are
    sliced away."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        alive = self._gate_store.alive.get(self._residual)
        if alive is None:
            return super().forward(hidden_states)
        dtype = hidden_states.dtype
        # Patch merging normalises several neighbours side by side, each with all the channels.
        alive = alive.repeat(hidden_states.shape[-1] // alive.numel())
        x = hidden_states.to(torch.promote_types(dtype, torch.float32))
        count = alive.sum()
        centered = (x - (x * alive).sum(-1, keepdim=True) / count) * alive
        variance = centered.square().sum(-1, keepdim=True) / count
        normalized = centered * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return (normalized * alive).to(dtype)


def gate_parameters_(
    module: nn.Module, store: GateStore, gates: dict[str, list[tuple[str, int]]]
) -> None:
    """Makes `module` read parameters through gates: {parameter name: [(quantity, axis)]}. Changes
    only its class."""
    base, bases = type(module), ()
    scaled = [quantity for quantity, _ in gates.get("weight", ())]
    if "weight" in gates or "bias" in gates:
        module._scaled_by = scaled
        module._present_with = [
            quantity for quantity, _ in gates.get("bias", ()) if quantity not in scaled
        ]
        bases = (ImageGated,)
    if base is nn.Linear and len(scaled) == 1:
        # which gates weight and bias by itself; properties read what else there is
        base = GatedLinear
        gates = {name: [gate for gate in of if gate[0] != scaled[0]] for name, of in gates.items()}
    read = {name: _gated_parameter(name) for name, of in gates.items() if of}
    prefix = "" if base is GatedLinear else "Gated"
    module.__class__ = type(f"{prefix}{base.__name__}", (*bases, base), read)
    module._gates, module._gate_store = gates, store


def mask_norm_(norm: nn.LayerNorm, store: GateStore, residual: str) -> None:
    """Makes a LayerNorm skip the channels of submodule `residual` that are no longer alive."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(
            f"expected a LayerNorm over the channels of {residual!r}, got {type(norm).__name__}."
        )
    norm.__class__ = _LivingLayerNorm
    norm._residual, norm._gate_store = residual, store


def install_gates(model: nn.Module, submodules: list[Submodule], store: GateStore) -> None:
    """Makes a classifier read the gated slots of its submodules through gates, and its norms skip
    dead channels."""
    gates: dict[str, dict[str, list[tuple[str, int]]]] = {}
    parameters = dict(model.named_parameters())
    for submodule in submodules:
        for parameter, gate, axis in submodule.gates:
            if parameter in parameters:
                path, _, name = parameter.rpartition(".")
                gates.setdefault(path, {}).setdefault(name, []).append((gate, axis))
        for norm in submodule.norms:
            mask_norm_(model.get_submodule(norm), store, submodule.name)
    for path, names in gates.items():
        gate_parameters_(model.get_submodule(path), store, names)


@torch.no_grad()
def apply_gates_(tensors: dict[str, Tensor], submodules: list[Submodule], store: GateStore) -> None:
    """Multiplies gates into the tensors, named as a classifier's parameters, whose slots they
    gate."""
    for submodule in submodules:
        for parameter, gate, axis in submodule.gates:
            if parameter in tensors and gate in store.values:
                tensors[parameter].copy_(apply_gate(tensors[parameter], store.values[gate], axis))
