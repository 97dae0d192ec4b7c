"""Do all processes of a distributed search still hold the same network? Cheap enough to ask after
every shrink."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather, gather_object
from torch import Tensor, nn

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# splitmix64's constants, as the signed numbers that torch knows.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class RanksDifferError(RuntimeError):
    """Processes that should hold identical networks do not."""


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and their places: scalar int64 on its device.

    The sum over all entries of splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) of bits
    and position; every bit of an entry reaches every bit of its summand, so that no two changes
    cancel as they would in a plain sum.
    """
    bits = tensor.detach().contiguous().reshape(-1)
    bits = bits.view(_INTEGER_OF_SIZE[bits.element_size()]).to(torch.int64)
    x = bits + torch.arange(1, bits.numel() + 1, device=bits.device) * _GOLDEN
    for shift, factor in _MIXING:
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)).sum()


def require_identical_ranks(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Compares names, shapes and bits of a module's tensors, and the shapes of its optimizer's
    state, over all ranks.

    Costs one pass over the weights, one small message and one of 8 bytes per tensor. Every rank has
    to call it.

    Raises:
        RanksDifferError: on every rank, naming the tensor and the ranks.
    """
    tensors = dict(module.state_dict())
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                shapes[f"{name} (optimizer's {key})"] = list(value.shape)
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        everyone = gather_object([shapes])
        first = next(
            f"{name}: {[row.get(name) for row in everyone]}"
            for name in sorted(set().union(*everyone))
            if any(row.get(name) != everyone[0].get(name) for row in everyone)
        )
        raise RanksDifferError(
            f"after step {step} the ranks have different shapes, in rank order, of {first}."
        )
    sums = gather(torch.stack([checksum(tensor) for tensor in tensors.values()])[None])
    differing = (sums != sums[0]).nonzero().tolist()
    if differing:
        rank, index = differing[0]
        raise RanksDifferError(
            f"after step {step} ranks 0 and {rank} hold different values of "
            f"{list(tensors)[index]} (and of "
            f"{len({i for _, i in differing}) - 1} other tensors). Gradients are no longer "
            f"averaged, or a rank was "
            "changed on its own; resume from the last checkpoint."
        )


def decided_by_rank_0(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on rank 0, on every rank; what it raises there is raised everywhere.

    Ranks on different hardware may round differently; a choice that depends on rounding must be
    made once.
    """
    answer: list[Any] = [None]
    if _is_rank_0():
        try:
            answer = [(decide(), None)]
        except Exception as error:
            answer = [(None, error)]
    result, error = broadcast_object_list(answer)[0]
    if error is not None:
        raise error
    return result


def _is_rank_0() -> bool:
    distributed = torch.distributed
    return (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_rank() == 0
    )
