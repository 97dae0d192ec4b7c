"""A running average of the weights that shrinks with the network."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pruning.surgery import Plan, slice_tensor


class WeightAverage:
    """Keep an exponential moving average of a module's parameters, by name.

    Args:
        module: the module whose parameters are averaged.
        decay: fraction of the average that remains at an update. The n-th update uses at most
            `(1 + n) / (10 + n)`, so that the average soon forgets the first weights.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.restart(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the current parameters."""
        self.updates += 1
        # The warm-up of tf.train.ExponentialMovingAverage with num_updates.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in module.named_parameters():
            # average <- decay * average + (1 - decay) * parameter
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def restart(self, module: nn.Module) -> None:
        """Begin again with the current parameters."""
        self.updates = 0
        self.average = _copies(module)

    def slice_(self, plan: Plan, names: Collection[str]) -> None:
        """Slice the average as the module was sliced.

        Args:
            plan: how parameters are sliced.
            names: names of the parameters that the module still has; averages of others are
                dropped.
        """
        self.average = {
            name: slice_tensor(self.average[name], plan.get(name, ())) for name in names
        }

    def part_of(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the averages of parameters below a prefix, by their names without the prefix.

        They are the tensors themselves, not copies: what changes them in place changes the average.
        """
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.average.items()
            if name.startswith(prefix)
        }

    @torch.no_grad()
    def copy_to_(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with their average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Put the average into the module's parameters for the time of a block."""
        # Values are exchanged, not tensors: the optimizer and DDP hold the parameters themselves.
        current = _copies(module)
        self.copy_to_(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(current[name])

    def save(self, path: str | Path) -> None:
        """Write the average as safetensors."""
        safetensors.torch.save_file(self.average, path, metadata={"updates": str(self.updates)})

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote.

        Names and shapes are those of the file: in a resumed search the network is still larger than
        the one that was saved.
        """
        with safetensors.safe_open(path, "pt") as file:
            self.updates = int(file.metadata()["updates"])
        saved = safetensors.torch.load_file(path)
        device = next(iter(self.average.values())).device
        self.average = {name: tensor.to(device) for name, tensor in saved.items()}


def _copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class AverageCallback(TrainerCallback):
    """Update a weight average after every step."""

    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Update the average."""
        self.average.update(kwargs["model"])
