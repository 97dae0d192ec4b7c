"""A Trainer whose runs may be killed at any moment, and resume to the same result.

Weights, optimizer and random states are read here. The data of a resumed run continue where the
checkpoint was written: `transformers.Trainer` skips the batches that the interrupted epoch had
finished, and `data/epochs.py` and `data/streaming.py` give the same order of rows again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .checkpoints import ASIDE, STATE_FILE, is_complete, move_into_place, newest_checkpoint
from .interruption import Interruption, TrainingInterrupted, shield_workers
from .ranks import decided_by_rank_0

logger = logging.get_logger(__name__)


def require_same_search(theirs: dict[str, Any], ours: dict[str, Any], checkpoint: Path) -> None:
    """Raise ValueError, naming what differs, unless a checkpoint has the settings of this run.

    Args:
        theirs: settings of the checkpoint.
        ours: settings of this run.
        checkpoint: its folder, for the message.
    """
    values: dict[str, Any] = {}
    tables: list[str] = []
    for name, value in ours.items():
        before = theirs.get(name)
        if before == value:
            continue
        if isinstance(value, dict) or isinstance(before, dict):
            tables.append(name)  # a latency table is hundreds of numbers: its name is enough
        else:
            values[name] = (before, value)
    if values or tables:
        differing = [str(values)] if values else []
        raise ValueError(
            f"the checkpoint {checkpoint} belongs to another search; (checkpoint, this run) differ "
            f"in {' and '.join(differing + tables)}. Resume with the same settings, or start again "
            "with another output_dir."
        )


class ResumableTrainer(Trainer):
    """Train with atomic checkpoints, an orderly end after a signal, and an exact way to resume.

    Args:
        args, kwargs: as for `transformers.Trainer`.

    Attributes:
        ended_early: what to know of a training that made fewer steps than planned, None after a
            whole one.

    Raises:
        TrainingInterrupted: from `train`, after SIGTERM or Ctrl-C, when a checkpoint has been
            saved.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        # The folder that checkpoints are written into while it is not `args.output_dir`.
        self._run_dir: Path | None = None
        self.ended_early: str | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does; stop with a checkpoint after SIGTERM and Ctrl-C.

        Logs a warning if the training ends before its last step for another reason.

        Args:
            resume_from_checkpoint: a checkpoint, or "auto" (or True) for the newest complete one,
                if there is any.
            trial, ignore_keys_for_eval: as for `Trainer.train`.

        Raises:
            TrainingInterrupted: after a signal, when the checkpoint has been saved.
        """
        if resume_from_checkpoint in ("auto", True):
            resume_from_checkpoint = self._newest_checkpoint()
        with self.interruption:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if (signal := self.interruption.stopped_by) is not None:
            checkpoint = Path(self.args.output_dir) / self._checkpoint_name
            message = (
                f"stopped by {signal.name} after step {self.state.global_step} of "
                f"{self.state.max_steps}; the checkpoint is {checkpoint}. Continue with "
                "--resume_from_checkpoint auto."
            )
            logger.warning(message)
            raise TrainingInterrupted(signal, message)
        self.ended_early = None
        if self.state.global_step < self.state.max_steps:
            self.ended_early = (
                f"the training ended after step {self.state.global_step} of "
                f"{self.state.max_steps}: a callback stopped it, or the data gave no more batches"
            )
            logger.warning(f"{self.ended_early}.")
        return result

    @property
    def _checkpoint_name(self) -> str:
        return f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _newest_checkpoint(self) -> str | None:
        folder = Path(self.args.output_dir)
        found = decided_by_rank_0(lambda: newest_checkpoint(folder))
        if found is None:
            return None
        # Without a shared disk the folder may have another path on every machine.
        checkpoint = folder / Path(found).name
        if not all(gather_object([is_complete(checkpoint)])):
            raise ValueError(
                f"not all machines see the complete checkpoint {found}; put --output_dir on a disk "
                "that all of them share, or train with --save_on_each_node."
            )
        return str(checkpoint)

    def get_train_dataloader(self) -> DataLoader:
        """Return the Trainer's loader, with workers that survive a signal to the whole job."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the Trainer's loader, with workers that survive a signal to the whole job."""
        # The Trainer keeps one loader with persistent workers, for whatever data set comes next.
        kept = getattr(self, "_eval_dataloaders", {})
        wanted = self.eval_dataset if eval_dataset is None else eval_dataset
        if "eval" in kept and kept["eval"].dataset is not wanted:
            del kept["eval"]
        return shield_workers(super().get_eval_dataloader(eval_dataset))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that is resumed from its last step has none to do; the Trainer would do one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        if self.interruption.stopped_by is not None or self.interruption.is_asked_for(self.args):
            # A run can only be resumed from a checkpoint with the optimizer's state.
            save_only_model = self.args.save_only_model
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped, trial)
            self.args.save_only_model = save_only_model
            # The run has not ended. If it knew a best model, the Trainer would load that one now,
            # and with save_total_limit=1 delete the checkpoint that was just written.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, *args)

    def _init_training_state(
        self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> Any:
        progress = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if checkpoint is not None and self.state.best_model_checkpoint is None:
            self.state.best_model_checkpoint = _best_next_to(Path(checkpoint))
        return progress

    def _get_output_dir(self, trial: Any) -> str:
        if self._run_dir is not None:
            return str(self._run_dir)
        return super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint into another folder, and rename it when all ranks have finished.

        A kill at any moment leaves the previous checkpoint as it was.
        """
        args = self.args
        state = self.state
        folder = Path(self._get_output_dir(trial))
        name = self._checkpoint_name
        aside = folder / ASIDE
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # The Trainer asks `_get_output_dir` where to write.
        self._run_dir = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        if state.best_model_checkpoint == str(aside / name):
            # The Trainer has noted the path that it wrote to.
            state.best_model_checkpoint = str(folder / name)
            if args.should_save:
                state.save_to_json(str(aside / name / STATE_FILE))
        self.accelerator.wait_for_everyone()
        # One process of every machine: without a shared disk each machine has files of its own.
        if args.local_process_index == 0:
            move_into_place(aside / name, folder / name)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            # The Trainer has rotated inside the other folder, where it found this checkpoint alone.
            rotate_checkpoints(
                str(folder),
                args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # The Trainer pickles its arguments, the access token for the Hub included. Nothing here
            # reads that file, so the secret need not be on the disk.
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_weights(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._is_sharded:
            super()._load_best_model()
        else:
            self._load_weights(Path(self.state.best_model_checkpoint))

    @property
    def _is_sharded(self) -> bool:
        """Whether the Trainer has to load the weights: they are sharded, or adapters of peft."""
        return (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(self.model, "peft_config")
        )

    def _load_weights(self, checkpoint: Path) -> None:
        """Load all weights of a checkpoint, or raise."""
        if isinstance(self.model, PreTrainedModel):
            # The Trainer loads the file itself. But stock ViT and Swin are saved with older names
            # of their weights, so it would load none of them and only warn.
            state = type(self.model).from_pretrained(checkpoint).state_dict()
        else:
            state = safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME)
        self.model.load_state_dict(state)


def _best_next_to(checkpoint: Path) -> str | None:
    """Return the best checkpoint as a path next to this one, None if it does not exist there.

    The state of a run has it by a path that may have been relative to another folder, or may have
    been moved together with the other checkpoints.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    best = state["best_model_checkpoint"]
    if best is None:
        return None
    place = checkpoint.parent / Path(best).name
    return str(place) if place.is_dir() else None
