"""Callbacks of every training run: epochs for data sets, random streams for ranks."""

from typing import Any

import torch
from accelerate.utils import reduce, set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Tells a data set that wants to know which epoch begins, on every process and before workers
    copy it."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Passes the number of the epoch on, also in the middle of a resumed one."""
        self.dataset.set_epoch(int(state.epoch + 1e-6))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Lets a stream judge and report what it could not read."""
        if hasattr(self.dataset, "end_epoch"):
            self.dataset.end_epoch(lambda counts: reduce(counts.to(args.device), "sum"))


class RandomStreamsCallback(TrainerCallback):
    """Gives every rank random streams of its own.

    Args:
        generators: seeded from seed, step and rank before every step: a resumed run draws what it
            would have drawn.
    """

    def __init__(self, *generators: torch.Generator):
        self.generators, self._seed_afterwards = generators, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Seeds dropout and drop path with the rank; a resumed run then restores each rank's own
        saved state.

        Not earlier: the order of the data is drawn from the seed that all ranks share.
        """
        if args.world_size > 1:
            self._seed_afterwards = int(torch.randint(2**31, ()))
            set_seed(args.seed, device_specific=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Gives all ranks one random stream again: a second training draws the order of its data
        from it."""
        if args.world_size > 1:
            set_seed(self._seed_afterwards)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Seeds the generators for the step about to run."""
        for generator in self.generators:
            generator.manual_seed(
                (args.seed * 1_000_003 + state.global_step) * 4096 + args.process_index
            )
