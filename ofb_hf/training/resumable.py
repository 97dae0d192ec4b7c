"""A Trainer whose runs may be killed or stopped at any moment and end where they would have
ended."""

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
    """Raises ValueError, naming what differs, unless a checkpoint has the settings of this run.

    Args:
        theirs: settings of the checkpoint. ours: of this run.
    """
    names = [name for name, value in ours.items() if theirs.get(name) != value]
    if names:
        # Of a latency table, which is hundreds of numbers, it is enough to know that it is another
        # one.
        large = [
            name
            for name in names
            if isinstance(ours[name], dict) or isinstance(theirs.get(name), dict)
        ]
        differing: dict[str, Any] = {
            name: (theirs.get(name), ours[name]) for name in names if name not in large
        }
        said = " and ".join([*([str(differing)] if differing else []), *large])
        raise ValueError(
            f"the checkpoint {checkpoint} belongs to another search; (checkpoint, this run) "
            f"differ in {said}. "
            "Resume with the same settings, or start over with another output_dir."
        )


class ResumableTrainer(Trainer):
    """`transformers.Trainer` with atomic checkpoints, an orderly end after a signal, and an exact
    way back.

    Args:
        kwargs: as for `transformers.Trainer`.

    Raises:
        TrainingInterrupted: from `train`, after SIGTERM or Ctrl-C, when a checkpoint has been
            saved.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.interruption = Interruption()
        self.add_callback(self.interruption)
        # where checkpoints are written to at the moment, if not to their place
        self._run_dir: Path | None = None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """As `Trainer.train`; SIGTERM and Ctrl-C end the step, save a checkpoint and raise
        `TrainingInterrupted`.

        Args:
            resume_from_checkpoint: a checkpoint, or "auto" (or True) for the newest complete one,
                if there is any.
        """
        if resume_from_checkpoint in ("auto", True):
            resume_from_checkpoint = self._newest_checkpoint()
        with self.interruption:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if (signal := self.interruption.stopped_by) is not None:
            message = (
                f"stopped by {signal.name} after step {self.state.global_step} of "
                f"{self.state.max_steps}; the "
                f"checkpoint is {Path(self.args.output_dir) / self._checkpoint_name}. Continue "
                f"with "
                "--resume_from_checkpoint auto."
            )
            logger.warning(message)
            raise TrainingInterrupted(signal, message)
        return result

    @property
    def _checkpoint_name(self) -> str:
        return f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _newest_checkpoint(self) -> str | None:
        folder = Path(self.args.output_dir)
        found = decided_by_rank_0(lambda: newest_checkpoint(folder))
        if found is None:
            return None
        ours = folder / Path(found).name  # machines without a shared disk may have it elsewhere
        if not all(gather_object([is_complete(ours)])):
            raise ValueError(
                f"not all machines see the complete checkpoint {found}; put --output_dir on a "
                f"disk that all of them "
                "share, or train with --save_on_each_node."
            )
        return str(ours)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's, with workers that survive a signal to the whole job."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The Trainer's, with workers that survive a signal to the whole job."""
        return shield_workers(super().get_eval_dataloader(eval_dataset))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # resumed from its last step: the Trainer would do one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        if self.interruption.stopped_by is not None or self.interruption.is_asked_for(self.args):
            # nothing else could be resumed
            wanted, self.args.save_only_model = self.args.save_only_model, False
            self._save_checkpoint(self.model_wrapped, trial)
            self.args.save_only_model = wanted
            # Not the end: the best model is not loaded yet, and with a limit of one it would be all
            # that is kept.
            self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, *args)

    def _init_training_state(
        self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> Any:
        progress = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if checkpoint is not None and self.state.best_model_checkpoint is None:
            # It is remembered by its path, which may have been relative to another folder, or moved
            # with the others.
            best = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))[
                "best_model_checkpoint"
            ]
            if best is not None and (beside := Path(checkpoint).parent / Path(best).name).is_dir():
                self.state.best_model_checkpoint = str(beside)
        return progress

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._run_dir is None else str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint aside and renames it once all ranks are done: a kill leaves the
        previous one."""
        args, state = self.args, self.state
        folder, name = Path(self._get_output_dir(trial)), self._checkpoint_name
        aside = folder / ASIDE
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = aside
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        if state.best_model_checkpoint == str(aside / name):
            state.best_model_checkpoint = str(folder / name)
            if args.should_save:
                state.save_to_json(str(aside / name / STATE_FILE))
        self.accelerator.wait_for_everyone()
        if args.local_process_index == 0:
            move_into_place(aside / name, folder / name)
        self.accelerator.wait_for_everyone()
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            best = state.best_model_checkpoint
            rotate_checkpoints(
                str(folder), args.save_total_limit, best_model_checkpoint=best, use_mtime=True
            )
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # The Trainer pickles its arguments, hub token included; nothing of ours reads that
            # file.
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
        """Whether the weights are in several hands, or are adapters; the Trainer knows how to load
        those."""
        return (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(self.model, "peft_config")
        )

    def _load_weights(self, checkpoint: Path) -> None:
        """Loads all weights of a checkpoint, or raises."""
        if isinstance(self.model, PreTrainedModel):
            # Not the file alone, as the Trainer does: stock ViT and Swin are saved under older
            # names of their weights, of which it would load none and warn.
            state = type(self.model).from_pretrained(checkpoint).state_dict()
        else:
            state = safetensors.torch.load_file(checkpoint / SAFE_WEIGHTS_NAME)
        self.model.load_state_dict(state)
