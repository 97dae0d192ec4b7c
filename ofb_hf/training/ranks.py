"""One network on all ranks: the check for it, and decisions that are made on one rank."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object
from torch import Tensor, nn

# Bytes of a tensor's entry -> integers of the same size.
_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The constants of splitmix64, as signed numbers: torch has no unsigned 64-bit arithmetic.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class RanksDifferError(RuntimeError):
    """Report that ranks which should hold identical networks do not."""


def checksum(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of a tensor's bits and their places: scalar int64 on its device.

    It is the sum of splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) over all entries,
    applied to the bits of an entry and its position. Every bit of an entry changes every bit of its
    summand, so that two changes do not cancel as they may in a plain sum.
    """
    bits = tensor.detach().contiguous().reshape(-1)  # (N,)
    integers = bits.view(_INTEGER_OF_SIZE[bits.element_size()]).to(torch.int64)
    positions = torch.arange(1, bits.numel() + 1, device=bits.device)  # (N,)
    hashes = integers + positions * _GOLDEN
    for shift, factor in _MIXING:
        hashes = (hashes ^ (hashes >> shift)) * factor
    return (hashes ^ (hashes >> 31)).sum()


def require_identical_ranks(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raise unless all ranks hold the same tensors, and optimizer states of the same shapes.

    It costs one pass over the weights, one small message and one of 8 bytes per tensor, so it can
    be called after every shrink. Every rank has to call it.

    Args:
        module: is compared by names, shapes and bits.
        optimizer: the state of the module's parameters in it is compared by shapes.
        step: the global step, for the message.

    Raises:
        RanksDifferError: on every rank, naming the tensor and the ranks.
    """
    tensors = dict(module.state_dict())
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                shapes[f"{name} (optimizer's {key})"] = list(value.shape)
    _require_identical_shapes(shapes, step)
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()])
    sums_of_ranks = gather(sums[None])  # (ranks, tensors)
    differing = (sums_of_ranks != sums_of_ranks[0]).nonzero().tolist()  # pairs (rank, tensor)
    if differing:
        rank, first = differing[0]
        num_others = len({index for _, index in differing}) - 1
        raise RanksDifferError(
            f"after step {step} ranks 0 and {rank} hold different values of {list(tensors)[first]} "
            f"(and of {num_others} other tensors). Gradients are no longer averaged, or a rank was "
            "changed on its own; resume from the last checkpoint."
        )


def _require_identical_shapes(shapes: dict[str, list[int]], step: int) -> None:
    # The names and shapes themselves travel only if their hashes differ.
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    if len(set(gather_object([digest]))) == 1:
        return
    of_ranks = gather_object([shapes])
    for name in sorted(set().union(*of_ranks)):
        found = [of_rank.get(name) for of_rank in of_ranks]
        if any(shape != found[0] for shape in found):
            raise RanksDifferError(
                f"after step {step} the ranks have different shapes, in rank order, of {name}: "
                f"{found}."
            )


def decided_by_rank_0(decide: Callable[[], Any]) -> Any:
    """Return on every rank what `decide` returns on rank 0; raise everywhere what it raises there.

    Ranks on different hardware may round differently, so a choice that depends on rounding must be
    made once.
    """
    # Broadcast as one object: (result, None) or (None, error).
    outcome: list[Any] = [None]
    if _is_rank_0():
        try:
            outcome = [(decide(), None)]
        except Exception as error:
            outcome = [(None, error)]
    result, error = broadcast_object_list(outcome)[0]
    if error is not None:
        raise error
    return result


def _is_rank_0() -> bool:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_rank() == 0
