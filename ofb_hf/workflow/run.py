"""One run of a command: its output folder, its phases, and training before and after a search."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

from ..cost.latency import LATENCY_TABLE_FILE
from ..data import DataArguments
from ..durable import damaged_file, write_digests
from ..families.subnet import SubnetSpec
from ..models.shapes import SHAPES
from ..release.hub import require_write_access
from ..search.rewriting import images_for_basis, rewritten
from ..space.configuration import BiMaskConfig
from ..token_search.learned_counts import TokenSearchConfig
from ..training.arguments import OFBTrainingArguments, check_search_arguments
from ..training.classifier import ClassifierTrainer
from ..training.distillation import DistillationTrainer
from ..training.full_precision import to_full_precision_
from ..training.guard import TrainingGuard
from ..training.history import HISTORY_FILE, HistoryCallback, read_history
from ..training.interruption import ending_in_order
from ..training.ranks import decided_by_rank_0
from ..training.requirements import require_batches, require_metric, require_steps
from . import output
from .arguments import FinetuneArguments, ModelArguments, TrainedModelArguments, changed
from .inputs import Inputs, require_findable, require_possible_teacher
from .measure import METRICS, NOT_ROUNDED, OWN_METRICS
from .settings import training_settings

logger = logging.get_logger(__name__)

GUARD_REPORT = "guard.json"
GUARDED_PHASES = ("search", "finetune")
# Those that write a history; the others only compute.
TRAINING_PHASES = ("dense", "search", "finetune")


class EndedEarlyError(RuntimeError):
    """Report that a phase of a run made fewer steps than it should, although nothing asked for it.

    Its result would not be what the settings say; checkpoints of it stay.
    """


@dataclass(kw_only=True)
class Run:
    """Hold what the phases of one run share, and train those phases that are no search.

    Attributes:
        args: training arguments; `output_dir` is the folder of the whole run.
        settings: everything that decides the result; a resumed run has to agree with it.
        inputs: image processor and data.
        source: where `dense` comes from, as `results.source_of` returns it.
        source_subnet: the units of `dense` as units of the model that it was cut from, if known.
        dense: the model to make smaller or to finetune, the reference of all measurements.
        teacher: the classifier that was named as the teacher, if any.
        finetune_args: what follows a search; None in a run that only finetunes, whose training
            arguments are those of the finetuning.
        config: what is searched; None in a run that only finetunes.
        targets: subfolder -> budget in MACs, parameters or milliseconds, the largest first;
            `config` asks for the first one.
        start: the model that the search begins with, where that is not `dense`.
        start_subnet: the units of `start` as units of `dense`.
        steps_before: steps of search that `start` has taken already.
        began: `time.monotonic()` at the beginning of the run, in seconds.
        stored_type: of the weights of `dense` in its checkpoint, and of everything that a run
            leaves; None is found out. All models are trained in float32.

    Raises:
        ValueError: if the training split is too small for one step.
    """

    args: OFBTrainingArguments
    settings: dict[str, Any]
    model_args: TrainedModelArguments
    inputs: Inputs
    source: dict[str, str | None]
    dense: PreTrainedModel
    source_subnet: SubnetSpec | None = None
    teacher: PreTrainedModel | None = None
    finetune_args: FinetuneArguments | None = None
    config: BiMaskConfig | TokenSearchConfig | None = None
    targets: dict[str, int | float] = field(default_factory=dict)
    start: PreTrainedModel | None = None
    start_subnet: SubnetSpec | None = None
    steps_before: int = 0
    began: float = field(default_factory=time.monotonic)
    stored_type: torch.dtype | None = None

    def __post_init__(self):
        require_batches(self.inputs.train, self.args)
        # A run for one of several budgets is made of a run, and knows all of this.
        if self.stored_type is None:
            self.stored_type = self.dense.dtype
            if self.args.bf16_full_eval or self.args.fp16_full_eval:
                logger.warning(
                    "--bf16_full_eval and --fp16_full_eval are not for the measured results: these "
                    "are of the weights as they are stored. --bf16 computes in half precision."
                )
        to_full_precision_(self.dense)
        if self.teacher is not None:
            self.teacher.float()  # it gets the same pixels

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)

    @property
    def target(self) -> int | float:
        """The largest budget."""
        return next(iter(self.targets.values()))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: one, or one per machine with `save_on_each_node`."""
        return self.args.should_save

    @property
    def is_resuming(self) -> bool:
        """Whether an earlier run in the same folder is to be continued."""
        return self.args.resume_from_checkpoint is not None

    def history(self) -> list[dict[str, Any]]:
        """Return the rows logged so far; none on a machine that rank 0 does not write to."""
        file = self.folder / HISTORY_FILE
        return read_history(file) if file.is_file() else []

    # ------------------------------------------------------------------------------------- folders

    @contextmanager
    def unfinished(self) -> Iterator[None]:
        """Mark the output folder as that of an unfinished run until the block ends well.

        A failure leaves `FAILED.txt` there, and checkpoints to resume from.
        """
        # All ranks have looked at the folder before one of them writes to it.
        PartialState().wait_for_everyone()
        if self.is_main:
            output.begin(self.args, self.settings)
            # The file that was given may be missing when the run is resumed.
            table = self.settings.get("latency_table")
            if table:
                output.write_json(self.folder / LATENCY_TABLE_FILE, table)
        with output.marked_if_failed(self.folder, self.is_main), ending_in_order():
            yield

    def phase_folder(self, phase: str) -> Path:
        """Return the folder of a phase's checkpoints.

        Args:
            phase: a key of `output.PHASES`.
        """
        if self.finetune_args is None:
            # The only phase of `ofb-hf finetune`: its checkpoints lie where any Trainer's would.
            return self.folder
        return self.folder / output.PHASES[phase]

    def phase_arguments(self, phase: str, **changes: Any) -> OFBTrainingArguments:
        """Return a copy of the training arguments for one phase, with some of them changed."""
        folder = str(self.phase_folder(phase))
        # Not the checkpoints of a phase are published but the finished output folder.
        settings = {"output_dir": folder, "push_to_hub": False} | OWN_METRICS | NOT_ROUNDED
        return changed(self.args, **(settings | changes))

    def result_folder(self, phase: str) -> Path:
        """Return the folder of the model that a finished phase leaves."""
        return self.phase_folder(phase) / output.RESULT

    def is_done(self, phase: str) -> bool:
        """Return whether a resumed run finds the result of a phase.

        Rank 0 looks for all: no rank may train while others do not. A result that is damaged is
        not one: the phase goes on from its last checkpoint.
        """
        if not self.is_resuming:
            return False
        is_done = decided_by_rank_0(partial(_is_whole, self.result_folder(phase)))
        if is_done and phase in TRAINING_PHASES and self.args.process_index == 0:
            self._warn_of_lost_rows(phase)
        return is_done

    def _warn_of_lost_rows(self, phase: str) -> None:
        """Say so if the history has no row of a finished phase: its last step is always one."""
        if not any(row["phase"] == phase for row in self.history()):
            logger.warning(
                f"{self.folder / HISTORY_FILE} has lost the rows of the phase {phase!r}, which is "
                "finished; the picture of the run will lack them."
            )

    def keep_result(
        self, phase: str, write: Callable[[Path], Any], guard: TrainingGuard | None = None
    ) -> None:
        """Let `write` fill the folder of a phase's result, so that a resumed run finds it.

        Args:
            guard: of the phase, whose report is kept with it.
        """

        def write_with_digests(folder: Path) -> None:
            write(folder)
            if guard is not None and guard.kept is not None:
                (folder / GUARD_REPORT).write_text(json.dumps(guard.report), encoding="utf-8")
            write_digests(folder)

        if self.is_main:
            output.write_aside(self.result_folder(phase), write_with_digests)

    def guard_reports(self) -> dict[str, dict[str, Any]]:
        """Return, by phase, which weights were kept and why; see `TrainingGuard.report`."""
        reports = {}
        for phase in GUARDED_PHASES:
            file = self.result_folder(phase) / GUARD_REPORT
            if file.is_file():
                reports[phase] = json.loads(file.read_text(encoding="utf-8"))
        return reports

    def load_result(self, phase: str) -> PreTrainedModel:
        """Load the model that a finished phase left."""
        return AutoModelForImageClassification.from_pretrained(self.result_folder(phase))

    # ------------------------------------------------------------------------------------ training

    def datasets(self) -> dict[str, Any]:
        """Return what every trainer of a run gets besides model and arguments."""
        return {
            "train_dataset": self.inputs.train,
            "eval_dataset": self.inputs.eval,
            "batch_augmentation": self.inputs.batch_augmentation,
            **METRICS,
        }

    def train(self, trainer: ClassifierTrainer, phase: str) -> None:
        """Train from the start, or from where an interrupted run was, and keep the history.

        Raises:
            EndedEarlyError: if the phase made fewer steps than it should.
        """
        # One history for all phases, in the output folder itself.
        trainer.add_callback(HistoryCallback(self.folder / HISTORY_FILE, phase))
        checkpoint = self.args.resume_from_checkpoint
        if checkpoint not in (None, "auto"):
            folder = Path(trainer.args.output_dir).resolve()
            if Path(checkpoint).resolve().parent != folder:
                # It belongs to an earlier phase, which has gone on from it; this one starts.
                checkpoint = None
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.ended_early is not None:
            raise EndedEarlyError(f"phase {phase!r}: {trainer.ended_early}.")

    def train_dense(self) -> None:
        """Train the dense model if that is asked for; keep it for a resumed run."""
        if not self.model_args.dense_epochs:
            return
        if self.is_done("dense"):
            self.dense = self.load_result("dense")
            return
        args = self.phase_arguments(
            "dense",
            num_train_epochs=self.model_args.dense_epochs,
            max_steps=-1,
            learning_rate=self.model_args.dense_learning_rate,
            # is about the search; the dense model itself has no teacher
            distillation_weight=None,
        )
        self.train(ClassifierTrainer(self.dense, args, **self.datasets()), "dense")
        self.keep_result("dense", self.dense.save_pretrained)

    def rewrite_dense(self) -> None:
        """Rewrite the dense model in the basis that is to be searched; keep it for a resumed run.

        No logit changes: it stays the reference of all measurements.
        """
        if self.config.basis == "given":
            return
        if self.is_done("basis"):
            self.dense = self.load_result("basis").train()
            return
        images = images_for_basis(self.inputs.train_plain, self.args)
        self.dense = rewritten(self.dense, images, self.config.basis, self.args)
        self.keep_result("basis", self.dense.save_pretrained)

    def finetune(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> PreTrainedModel:
        """Finetune a model in place and return it, or return what a resumed run finds.

        Args:
            model: becomes the finetuned one.
            teacher: the classifier to learn from besides the labels; None = labels only.
        """
        if self.is_done("finetune"):
            return self.load_result("finetune")
        # A run that was resumed after its search has drawn other numbers so far than one that was
        # not interrupted.
        set_seed(self.args.seed)
        args = self._finetune_arguments()
        # `from_pretrained` returns models in evaluation mode.
        trainer = DistillationTrainer(
            model.train(),
            args,
            teacher=teacher,
            guard_dataset=self.inputs.guard,
            **self.datasets(),
        )
        self.train(trainer, "finetune")
        self.keep_result("finetune", model.save_pretrained, trainer.guard)
        return model

    def _finetune_arguments(self) -> OFBTrainingArguments:
        wanted = self.finetune_args
        if wanted is None:
            return self.phase_arguments("finetune")
        return self.phase_arguments(
            "finetune",
            num_train_epochs=wanted.finetune_epochs,
            max_steps=wanted.finetune_max_steps,
            learning_rate=wanted.finetune_learning_rate,
            distillation_weight=wanted.finetune_distillation_weight,
        )

    def finetune_searched(self, searched: PreTrainedModel) -> PreTrainedModel:
        """Finetune a copy of a searched model; the teacher is the dense model if none was named."""
        # Not a deep copy: what a trainer attached to the searched model stays there.
        model = type(searched)(searched.config)
        model.load_state_dict(searched.state_dict())
        return self.finetune(model, self.teacher or self.dense)


def _is_whole(result: Path) -> bool:
    """Return whether a phase has left its result; warn if that is damaged."""
    if not result.is_dir():
        return False
    damaged = damaged_file(result)
    if damaged is not None:
        logger.warning(
            f"the file {damaged} in {result} is damaged; the phase goes on from its last "
            "checkpoint."
        )
    return damaged is None


def require_start(model_args: ModelArguments, args: OFBTrainingArguments) -> str:
    """Return the name of the model to search, after the checks that need neither model nor data.

    Raises:
        ValueError: if there is no name, or for training arguments that a search cannot work with.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError(
            "--model_name_or_path is missing; give a Hub name, a folder, or one of "
            f"{sorted(SHAPES)}."
        )
    require_findable(name)
    require_possible_teacher(model_args.teacher_name_or_path)
    # The finished output folder is pushed, not the search.
    check_search_arguments(changed(args, push_to_hub=False))
    require_runnable(args)
    return name


def require_runnable(args: OFBTrainingArguments) -> None:
    """Raise for training arguments with which no run could train, evaluate or push at its end.

    Raises:
        ValueError: for a training without a step, and a metric that no evaluation gives.
        PublishError: as `require_push`.
    """
    require_steps(args)
    require_metric(args, METRICS["compute_metrics"])
    require_push(args)


def require_push(args: OFBTrainingArguments) -> None:
    """Raise PublishError if the result is to be pushed and could not be; nothing has started."""
    if args.push_to_hub:
        decided_by_rank_0(lambda: require_write_access(args.hub_model_id, args.hub_token))


def search_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: BiMaskConfig | TokenSearchConfig,
    args: OFBTrainingArguments,
    *others: Any,
) -> dict[str, Any]:
    """Return what decides the result of a search; a resumed run has to agree with it.

    Args:
        others: further argument classes, of which every field counts.
    """
    # Names of fields are different in all of these classes, as they are all flags of one command.
    settings = asdict(data_args) | config.to_dict()
    # The other fields of ModelArguments are about the output folder.
    for name in (
        "model_name_or_path",
        "teacher_name_or_path",
        "new_classifier",
        "guard_images",
        "dense_epochs",
        "dense_learning_rate",
    ):
        settings[name] = getattr(model_args, name)
    settings |= training_settings(args, data_args)
    for arguments in others:
        settings |= asdict(arguments)
    return settings
