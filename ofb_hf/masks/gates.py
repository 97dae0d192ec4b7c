"""Gates: how bi-masks act on a model without changing its modules, parameters or state-dict keys.

A gated module reads a gated parameter as `parameter * gate` along one axis; the parameter itself
stays where it was. Scaling weight rows costs little compared with scaling (batch x tokens)
activations, unless those are few, and it is literally the folding that `compress` does at the end.
Gates are computed once per forward pass of the supernet and shared through a `GateStore`.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..families.description import Submodule, presence_of

# The gates of one parameter: (quantity, axis that it gates) each.
ParameterGates = list[tuple[str, int]]


class GateStore:
    """Store the current gate values, shared by all gated modules of one supernet.

    A quantity is a submodule's name, or `presence_of` it: (1,), the gate of the whole submodule,
    whichever units it keeps. Gradient checkpointing reads the same tensors again in the backward
    pass, so the values stay until the next forward pass. A copy starts out empty: non-leaf tensors
    cannot be deep-copied, and the copy computes its own.

    Attributes:
        values: quantity -> (U,).
        of_images: quantity -> (B, U), one gate for every image of the batch; then there are no
            `values`.
        separates: whether the next forward pass gets gates of its images.
        alive: residual width -> its living channels, bool (U,), or None if all are alive.
    """

    def __init__(self):
        self.values: dict[str, Tensor] = {}
        self.of_images: dict[str, Tensor] = {}
        self.separates = False
        self.alive: dict[str, Tensor | None] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def __deepcopy__(self, memo: dict) -> "GateStore":
        copy = GateStore()
        memo[id(self)] = copy
        return copy

    def clear(self) -> None:
        """Forget all values and versions, as after a shrink."""
        self.values = {}
        self.of_images = {}
        self._versions.clear()

    def separate_(self, count: int) -> None:
        """Give each of `count` images gates of its own, equal to the values.

        Those of units are leaves of the graph; those of presence follow from them.
        """
        units: dict[str, Tensor] = {}
        for name, gate in self.values.items():
            own = gate.detach().expand(count, -1).clone()  # (B, U)
            units[name] = own.requires_grad_()
        self.of_images = dict(units)
        for name, gate in units.items():
            presence = presence_of(name)
            if presence in units:
                # A submodule is as present as its best unit.
                self.of_images[presence] = gate.amax(1, keepdim=True)  # (B, 1)
        self.values = {}

    def image_gates(self, quantities: list[str]) -> list[Tensor]:
        """Return the gates of images (B, U) of those of the quantities that have some."""
        return [self.of_images[name] for name in quantities if name in self.of_images]

    def refresh_liveness(
        self,
        name: str,
        alive: Tensor,
    ) -> None:
        """Tell the norms which units (bool, any shape) of a submodule are alive.

        Reading "is everything alive" from the device would wait for it; the version counter says
        for free whether the tensor was written since the last call.
        """
        version = (id(alive), alive._version)
        if self._versions.get(name) == version:
            return
        self._versions[name] = version
        # An evaluation may be the first to see the change, and training then uses the tensor too.
        with torch.inference_mode(False):
            everything = bool(alive.all())
            self.alive[name] = None if everything else alive.flatten().clone()


def apply_gate(
    parameter: Tensor,
    gate: Tensor,
    axis: int,
) -> Tensor:
    """Return a tensor scaled along one axis.

    Args:
        parameter: any shape. gate: (U,) with `parameter.shape[axis] == U`, or (1,) for all of it.
    """
    shape = [1] * parameter.ndim
    shape[axis] = -1
    return parameter * gate.reshape(shape).to(parameter.dtype)


class GatedLinearFunction(torch.autograd.Function):
    """Linear layer whose outputs are gated through its weight and bias, as `gated_linear`.

    Left to autograd, `weight * gate` would be kept for the backward pass: a second copy of every
    weight. Here it is computed again there, which costs little compared with the products with it.
    """

    # Not split into `forward` and `setup_context`: torch would inspect the signature at every call.
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
    ) -> Tensor:
        """Return the values (..., O), in the precision of `x` (..., I)."""
        ctx.save_for_backward(x, weight, bias, gate)  # all of which exist anyway
        # For few rows, the outputs are fewer numbers than the weight, and so cheaper to scale.
        ctx.few = x.numel() < x.shape[-1] ** 2
        dtype = x.dtype
        if ctx.few:
            if bias is not None:
                bias = bias.to(dtype)
            return F.linear(x, weight.to(dtype), bias) * gate.to(dtype)
        if bias is not None:
            bias = apply_gate(bias, gate, 0).to(dtype)
        return F.linear(x, apply_gate(weight, gate, 0).to(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight, bias and gate."""
        x, weight, bias, gate = ctx.saved_tensors
        for_x, for_weight, for_bias, for_gate = ctx.needs_input_grad
        # Flat rows: one product for all images, because one per image with the same weight takes
        # longer. `atleast_2d` is for a single vector.
        rows = torch.atleast_2d(grad).flatten(0, -2)  # (N, O)
        x = torch.atleast_2d(x).flatten(0, -2)  # (N, I)
        grad_x = None
        grad_weight = None
        grad_bias = None
        grad_gate = None
        if for_x:
            if ctx.few:
                grad_x = (rows * gate.to(grad.dtype)) @ weight.to(grad.dtype)
            else:
                grad_x = rows @ apply_gate(weight, gate, 0).to(grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], -1)  # (..., I)
        # Of the gated weight and bias first: with respect to w * g, the gradient is G; then it is
        # G * g for w, and the sum of G * w over a row for the gate of that row.
        if for_weight or for_gate:
            grad_weight = (rows.mT @ x).to(weight.dtype)  # (O, I)
        if bias is not None and (for_bias or for_gate):
            grad_bias = rows.sum(0).to(bias.dtype)  # (O,)
        if for_gate:
            grad_gate = (grad_weight * weight).sum(1)  # (O,)
            if bias is not None:
                grad_gate = torch.addcmul(grad_gate, grad_bias, bias)
            grad_gate = grad_gate.to(gate.dtype)
        if for_weight:
            # In place: allocating memory takes longer than the product.
            grad_weight *= gate[:, None].to(weight.dtype)
        else:
            grad_weight = None
        grad_bias = apply_gate(grad_bias, gate, 0) if for_bias else None
        return grad_x, grad_weight, grad_bias, grad_gate


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
) -> Tensor:
    """Return `F.linear` of `weight * gate` and `bias * gate`; under autocast in its precision.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None. gate: (O,), scales row by row.
    """
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # float64 is left alone, as by autocast.
    if enabled and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return GatedLinearFunction.apply(x, weight, bias, gate)


class GatedLinear(nn.Linear):
    """Linear layer with gated outputs."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self._gate_store.values.get(self._scaled_by[0])
        if gate is None:
            return super().forward(x)
        return gated_linear(x, self.weight, self.bias, gate)


class ScaledFunction(torch.autograd.Function):
    """`x * gate` for a gate that broadcasts against x; where the gate is 0, as for dead units, it
    has no gradient.

    Left to autograd, x would be kept for the backward pass. Here the product is kept, which the
    next layer keeps as well.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        gate: Tensor,
    ) -> Tensor:
        """Return the values, in the precision of `x`."""
        out = x * gate.to(x.dtype)
        ctx.save_for_backward(out, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and gate."""
        out, gate = ctx.saved_tensors
        # The sum of grad * x, with x = out / gate.
        products = grad.to(gate.dtype) * out
        grad_gate = products.sum_to_size(gate.shape) / gate
        grad_gate = grad_gate.masked_fill(gate == 0, 0.0)
        return grad * gate.to(grad.dtype), grad_gate


class ImageGated:
    """Mixin for a linear layer, convolution or norm: gates its outputs image by image.

    Only where the store has gates of images. With one gate for all images, the module reads gated
    parameters (`_gated_parameter`); gates that differ between images cannot be multiplied into a
    shared weight, so they scale the outputs here, with the same result.

    Attributes:
        _scaled_by: quantities that gate weight and bias, output by output.
        _present_with: quantities that gate the bias in addition, as a whole.
    """

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        store = self._gate_store
        if not store.of_images:
            return out
        # As (B, N, U): images first, gated channels last. A convolution has its channels second;
        # in Swin the first axis runs over windows, all windows of an image one after the other.
        is_map = isinstance(self, nn.Conv2d)
        if is_map:
            rows = out.flatten(2).mT  # (B, U, h, w) -> (B, h * w, U)
        else:
            images = len(next(iter(store.of_images.values())))
            rows = out.reshape(images, -1, out.shape[-1])  # (B * windows, n, U) -> (B, N, U)
        for gate in store.image_gates(self._present_with):
            # The bias is in `out` already, so it is added `gate - 1` times.
            missing = (gate[:, None] - 1).to(out.dtype)  # (B, 1, 1)
            bias = self._parameters["bias"].to(out.dtype)
            rows = rows + bias * missing  # (U,) * (B, 1, 1)
        for gate in store.image_gates(self._scaled_by):
            rows = ScaledFunction.apply(rows, gate[:, None])  # gate (B, 1, U)
        if is_map:
            rows = rows.mT
        return rows.reshape(out.shape)


def _gated_parameter(name: str) -> property:
    """Return a property that reads the parameter `name` of a module through its gates."""

    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        store = module._gate_store
        if parameter is None:
            return None
        for quantity, axis in module._gates[name]:
            if quantity in store.values:
                parameter = apply_gate(parameter, store.values[quantity], axis)
            elif quantity in store.of_images and not isinstance(module, ImageGated):
                # A class, mask or position token (1, N, U): it becomes one per image, (B, N, U).
                gate = store.of_images[quantity][:, None]  # (B, 1, U)
                parameter = parameter * gate.to(parameter.dtype)
        return parameter

    return property(read)


class _LivingLayerNorm(nn.LayerNorm):
    """LayerNorm with statistics of the living channels only.

    They are then the same as after the dead channels are sliced away.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        alive = self._gate_store.alive.get(self._residual)
        if alive is None:
            return super().forward(hidden_states)
        dtype = hidden_states.dtype
        # Patch merging normalises several neighbours at once, each with all channels: (..., n * U).
        copies = hidden_states.shape[-1] // alive.numel()
        alive = alive.repeat(copies)
        x = hidden_states.to(torch.promote_types(dtype, torch.float32))
        count = alive.sum()
        mean = (x * alive).sum(-1, keepdim=True) / count
        centered = (x - mean) * alive
        variance = centered.square().sum(-1, keepdim=True) / count
        normalized = centered * torch.rsqrt(variance + self.eps)
        normalized = normalized * self.weight + self.bias
        return (normalized * alive).to(dtype)


def gate_parameters_(
    module: nn.Module,
    store: GateStore,
    gates: dict[str, ParameterGates],
) -> None:
    """Make a module read parameters through gates.

    Its class is replaced by a subclass of it that is made here; parameters and state-dict keys stay
    the same.

    Args:
        module: a linear layer, convolution or norm, or a module that owns tokens.
        store: of the supernet, with the current gates.
        gates: the gates of each gated parameter, by its name.
    """
    original = type(module)
    scaled = [quantity for quantity, _ in gates.get("weight", ())]
    bases: tuple[type, ...] = (original,)
    name = f"Gated{original.__name__}"
    if original is nn.Linear and len(scaled) == 1:
        # The usual case: one gate of weight and bias, which `GatedLinear` applies by itself. The
        # properties read the others, such as the gate of presence on a bias.
        bases = (GatedLinear,)
        name = GatedLinear.__name__
        gates = _without(gates, scaled[0])
    if "weight" in gates or "bias" in gates:
        module._scaled_by = scaled
        module._present_with = [
            quantity for quantity, _ in gates.get("bias", ()) if quantity not in scaled
        ]
        bases = (ImageGated, *bases)
    properties = {}
    for parameter, of_parameter in gates.items():
        if of_parameter:
            properties[parameter] = _gated_parameter(parameter)
    module.__class__ = type(name, bases, properties)
    module._gates = gates
    module._gate_store = store


def _without(
    gates: dict[str, ParameterGates],
    quantity: str,
) -> dict[str, ParameterGates]:
    """Return the gates of each parameter except those of one quantity."""
    others = {}
    for parameter, of_parameter in gates.items():
        others[parameter] = [gate for gate in of_parameter if gate[0] != quantity]
    return others


def mask_norm_(
    norm: nn.LayerNorm,
    store: GateStore,
    residual: str,
) -> None:
    """Make a LayerNorm skip the dead channels of submodule `residual`."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(
            f"expected a LayerNorm over the channels of {residual!r}, got {type(norm).__name__}; "
            "its statistics cannot leave out dead channels."
        )
    norm.__class__ = _LivingLayerNorm
    norm._residual = residual
    norm._gate_store = store


def install_gates(
    model: nn.Module,
    submodules: list[Submodule],
    store: GateStore,
) -> None:
    """Make a classifier read its gated slots through gates, and its norms skip dead channels.

    Args:
        model: the classifier, changed in place.
        submodules: those that are searched.
        store: of the supernet, with the current gates.
    """
    # Path of a module -> the gates of its parameters.
    gates: dict[str, dict[str, ParameterGates]] = {}
    parameters = dict(model.named_parameters())
    for submodule in submodules:
        for parameter, quantity, axis in submodule.gates:
            if parameter in parameters:
                path, _, name = parameter.rpartition(".")
                of_module = gates.setdefault(path, {})
                of_module.setdefault(name, []).append((quantity, axis))
        for norm in submodule.norms:
            mask_norm_(model.get_submodule(norm), store, submodule.name)
    for path, of_module in gates.items():
        gate_parameters_(model.get_submodule(path), store, of_module)


@torch.no_grad()
def apply_gates_(
    tensors: dict[str, Tensor],
    submodules: list[Submodule],
    store: GateStore,
) -> None:
    """Multiply gates into the tensors whose slots they gate.

    Args:
        tensors: by the name of the classifier's parameter, changed in place.
        submodules: those that are searched.
        store: of the supernet, with the current gates.
    """
    for submodule in submodules:
        for name, quantity, axis in submodule.gates:
            if name in tensors and quantity in store.values:
                gated = apply_gate(tensors[name], store.values[quantity], axis)
                tensors[name].copy_(gated)
