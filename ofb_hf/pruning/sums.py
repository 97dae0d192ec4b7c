"""Sums over calibration images that fit into the same memory however many images there are."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor


class Sums:
    """Named sums of tensors, on the CPU, over the batches of all ranks.

    Products are made in the precision of their factors, at least float32; only adding them up needs
    more, and not every device has it. A batch gives the same product on whichever rank it is.

    Args:
        dtype: in which they are kept. float32 takes half the memory.
    """

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.dtype = dtype
        self._totals: dict[tuple, Tensor] = {}

    def add(self, key: tuple, value: Tensor | float) -> None:
        """Add a tensor or a number to the sum of this name."""
        value = torch.as_tensor(value).detach().cpu().to(self.dtype)
        total = self._totals.get(key)
        if total is None:
            self._totals[key] = value.clone()
        else:
            total += value

    def reduce_(self) -> None:
        """Add up the sums of all ranks; every rank has to call it. A missing sum counts as 0."""
        shapes: dict[tuple, tuple[int, ...]] = {}
        own = {key: tuple(total.shape) for key, total in self._totals.items()}
        for of_rank in gather_object([own]):
            shapes |= of_rank
        state = PartialState()
        device = state.device if state.use_distributed else "cpu"
        for key in sorted(shapes, key=repr):
            total = self._totals.get(key)
            if total is None:
                total = torch.zeros(shapes[key], dtype=self.dtype)
            # Some backends only know tensors of the device.
            self._totals[key] = reduce(total.to(device), "sum").cpu()

    def __getitem__(self, key: tuple) -> Tensor:
        """Return a sum in float64."""
        return self._totals[key].double()


def with_ones(rows: Tensor) -> Tensor:
    """Return rows (N, D) with a last column of ones, (N, D + 1), for their mean and number."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
