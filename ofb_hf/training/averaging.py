"""A running average of the weights that survives when the network shrinks."""

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
    """Exponential moving average of a module's trainable floating-point parameters, by name.

    Args:
        module: whose parameters to follow.
        decay: share of the average that stays at each update; early updates use less, `(1 + n) /
            (10 + n)`.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.restart(module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the current parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def restart(self, module: nn.Module) -> None:
        """Forgets everything but the current parameters."""
        self.updates = 0
        self.average = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }

    def slice_(self, plan: Plan, names: Collection[str]) -> None:
        """Follows the module through a shrink.

        Args:
            plan: how parameters are sliced.
            names: of the parameters that the module still has.
        """
        self.average = {
            name: slice_tensor(self.average[name], plan.get(name, ())) for name in names
        }

    def part_of(self, prefix: str) -> dict[str, torch.Tensor]:
        """The averages themselves, to be changed in place, of parameters whose names begin like
        this; without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.average.items()
            if name.startswith(prefix)
        }

    @torch.no_grad()
    def copy_to_(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with their average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Puts the average into the module's parameters for the time of a block."""
        current = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters()
        }
        self.copy_to_(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    parameter.copy_(current[name])

    def save(self, path: str | Path) -> None:
        """Writes the average as safetensors."""
        safetensors.torch.save_file(self.average, path, metadata={"updates": str(self.updates)})

    def load(self, path: str | Path) -> None:
        """Reads what `save` wrote; names and shapes are taken from the file: the module may have
        shrunk since."""
        with safetensors.safe_open(path, "pt") as file:
            self.updates = int(file.metadata()["updates"])
        saved = safetensors.torch.load_file(path)
        device = next(iter(self.average.values())).device
        self.average = {name: tensor.to(device) for name, tensor in saved.items()}


class AverageCallback(TrainerCallback):
    """Updates the weight average after every step and puts it into the model at the end."""

    def __init__(self, average: "WeightAverage"):
        self.average = average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Follows the weights."""
        self.average.update(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """The average is the result."""
        self.average.copy_to_(kwargs["model"])
