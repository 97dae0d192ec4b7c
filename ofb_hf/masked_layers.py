"""How bi-masks act on a model without changing its modules, parameters or state-dict keys.

A gated module reads a gated parameter as `parameter * gate` along one axis; the parameter itself stays where it was.
Scaling weight rows costs nothing beside scaling (batch x tokens) activations, and it is literally the folding that
`compress` does at the end. Gates are computed once per forward pass of the supernet and shared through a `GateStore`.
"""

import torch
from torch import Tensor, nn


class GateStore:
    """The current gate values, quantity -> (U,), shared by all gated modules of one supernet.

    A quantity is a submodule's name, or `presence_of` it: (1,), the gate of what it adds whichever units it keeps.
    Gradient checkpointing re-reads the same tensors in the backward pass, so the values stay until the next forward.
    A copy starts out empty: non-leaf tensors cannot be deep-copied, and the copy computes its own.
    """

    def __init__(self):
        self.values: dict[str, Tensor] = {}
        self.alive: dict[str, Tensor | None] = {}

    def __deepcopy__(self, memo: dict) -> "GateStore":
        memo[id(self)] = copy = GateStore()
        return copy


def apply_gate(parameter: Tensor, gate: Tensor, axis: int) -> Tensor:
    """Scales a tensor along one axis: gate (U,) against `parameter.shape[axis] == U`, or (1,) for all of it."""
    shape = [1] * parameter.ndim
    shape[axis] = -1
    return parameter * gate.reshape(shape).to(parameter.dtype)


def _gated_parameter(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if parameter is not None:
            for gate, axis in module._gates[name]:
                if gate in module._gate_store.values:
                    parameter = apply_gate(parameter, module._gate_store.values[gate], axis)
        return parameter

    return property(read)


class _LivingLayerNorm(nn.LayerNorm):
    """LayerNorm whose statistics run over living channels only, as they will once the others are sliced away."""

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


def gate_parameters_(module: nn.Module, store: GateStore, gates: dict[str, list[tuple[str, int]]]) -> None:
    """Makes `module` read parameters through gates: {parameter name: [(quantity, axis)]}. Changes only its class."""
    base = type(module)
    module.__class__ = type(f"Gated{base.__name__}", (base,), {name: _gated_parameter(name) for name in gates})
    module._gates, module._gate_store = gates, store


def mask_norm_(norm: nn.LayerNorm, store: GateStore, residual: str) -> None:
    """Makes a LayerNorm skip the channels of submodule `residual` that are no longer alive."""
    if type(norm) is not nn.LayerNorm:
        raise TypeError(f"expected a LayerNorm over the channels of {residual!r}, got {type(norm).__name__}.")
    norm.__class__ = _LivingLayerNorm
    norm._residual, norm._gate_store = residual, store
