"""Callbacks of every training run: the epoch of its data set, the random streams of its ranks."""

from typing import Any

import torch
from accelerate.utils import reduce, set_seed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochCallback(TrainerCallback):
    """Tell a data set which epoch begins, on every process and before workers copy the data set.

    Args:
        dataset: has `set_epoch(epoch)`, and `end_epoch(sum_over_ranks)` if it reports on an epoch.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Pass the number of the epoch on, also where a run resumes in the middle of one."""
        # `state.epoch` is a sum of fractions, which may end a little below the whole number.
        self.dataset.set_epoch(int(state.epoch + 1e-6))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Let a stream report the images that it could not decode."""
        if hasattr(self.dataset, "end_epoch"):
            self.dataset.end_epoch(lambda counts: reduce(counts.to(args.device), "sum"))


class ResultCallback(TrainerCallback):
    """Let a trainer look at its network before the first step, and choose its result at the end.

    Args:
        trainer: has `begin_result()` and `end_result()`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Look at the network; a checkpoint has been loaded by now."""
        self.trainer.begin_result()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Choose the result."""
        self.trainer.end_result()


class RandomStreamsCallback(TrainerCallback):
    """Give every rank random streams of its own.

    Args:
        generators: are seeded from seed, step and rank before every step, so that a resumed run
            draws the numbers that the interrupted one would have drawn.
    """

    def __init__(self, *generators: torch.Generator):
        self.generators = generators
        self._seed_afterwards = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Seed dropout and drop path with the rank.

        A resumed run restores the saved state of each rank afterwards. This cannot be done earlier:
        the order of the data is drawn from the seed that all ranks share.
        """
        if args.world_size > 1:
            # Drawn from the stream that the ranks still share, so it is the same on all of them.
            self._seed_afterwards = int(torch.randint(2**31, ()))
            set_seed(args.seed, device_specific=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Give all ranks one random stream again."""
        # A second training of the same process draws the order of its data from it.
        if args.world_size > 1:
            set_seed(self._seed_afterwards)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ):
        """Seed the generators for the step about to run."""
        # Different for any two steps below 1,000,003 and any two of up to 4096 ranks.
        of_step = args.seed * 1_000_003 + state.global_step
        for generator in self.generators:
            generator.manual_seed(of_step * 4096 + args.process_index)
