"""Finetune and evaluate a classifier that is already there, compressed or not."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..data import AugmentationArguments, DataArguments
from ..training.arguments import OFBTrainingArguments
from ..training.distillation import DistillationTrainer
from ..training.ranks import decided_by_rank_0
from . import output
from .arguments import ModelArguments
from .inputs import Inputs, load, load_teacher
from .measure import METRICS, measure, provenance
from .report import results_rows, text_table
from .settings import training_settings

logger = logging.get_logger(__name__)


@dataclass
class Finetuning:
    """A classifier, its data and its teacher, checked and ready to train."""

    args: OFBTrainingArguments
    settings: dict[str, Any]
    before: PreTrainedModel
    model: PreTrainedModel
    teacher: PreTrainedModel | None
    inputs: Inputs

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)


def prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    args: OFBTrainingArguments,
) -> Finetuning:
    """Loads and checks everything. Touches nothing; raises ValueError for whatever cannot work."""
    name = _required(model_args)
    settings = {"model_name_or_path": name, "teacher_name_or_path": model_args.teacher_name_or_path}
    settings |= asdict(data_args) | asdict(augmentation_args) | training_settings(args, data_args)
    output.check_free(args, settings, model_args.overwrite_output_dir, phases=("",))
    model, inputs = load(name, data_args, args.seed, augmentation_args)
    teacher = load_teacher(model_args.teacher_name_or_path, inputs)
    return Finetuning(args, settings, copy.deepcopy(model), model, teacher, inputs)


def run(job: Finetuning) -> dict[str, Any]:
    """Trains and writes the output folder.

    Returns:
        Content of `eval_results.json`: the model before (`dense`) and after (`finetuned`).
    """
    is_main = job.args.should_save
    # all ranks have looked at the folder before one of them writes to it
    PartialState().wait_for_everyone()
    if is_main:
        output.begin(job.args, job.settings)
    with output.marked_if_failed(job.folder, is_main):
        set_seed(job.args.seed)
        datasets = {"train_dataset": job.inputs.train, "eval_dataset": job.inputs.eval, **METRICS}
        augmented = {"batch_augmentation": job.inputs.batch_augmentation}
        done, resuming = job.folder / output.RESULT, job.args.resume_from_checkpoint is not None
        if resuming and decided_by_rank_0(done.is_dir):
            job.model = type(job.model).from_pretrained(done)
        else:
            trainer = DistillationTrainer(
                job.model, job.args, teacher=job.teacher, **augmented, **datasets
            )
            trainer.train(resume_from_checkpoint=job.args.resume_from_checkpoint)
            if is_main:
                output.write_aside(done, job.model.save_pretrained)
        models = {"dense": job.before, "finetuned": job.model}
        results, _ = measure(models, job.inputs.eval, job.args)
        results |= provenance(job.args.seed, job.args.device)
        if is_main:
            job.model.save_pretrained(job.folder)
            job.inputs.processor.save_pretrained(job.folder)
            output.write_json(job.folder / "eval_results.json", results)
            output.remove(done)
            logger.warning("\n%s\n\nwritten to %s", text_table(results_rows(results)), job.folder)
    return results


def run_evaluate(
    model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments
) -> dict[str, Any]:
    """Measures a classifier on the evaluation split: accuracy, cost, size, speed. Writes
    nothing."""
    name = _required(model_args)
    model, inputs = load(name, data_args, args.seed)
    results, _ = measure({"model": model}, inputs.eval, args)
    return results["model"]


def _required(model_args: ModelArguments) -> str:
    if model_args.model_name_or_path is None:
        raise ValueError(
            "--model_name_or_path is missing; give a Hub name or a folder with an image classifier."
        )
    return model_args.model_name_or_path
