"""Finetune and evaluate a classifier that is already there, compressed or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..data import DataArguments
from ..distillation import DistillationTrainer
from ..training_args import OFBTrainingArguments
from . import output
from .arguments import ModelArguments
from .inputs import Inputs, load_classifier, load_inputs, load_teacher
from .measure import measure, provenance
from .report import results_rows, text_table

logger = logging.get_logger(__name__)


@dataclass
class Finetuning:
    """A classifier, its data and its teacher, checked and ready to train."""

    args: OFBTrainingArguments
    before: PreTrainedModel
    model: PreTrainedModel
    teacher: PreTrainedModel | None
    inputs: Inputs

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)


def prepare(model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments) -> Finetuning:
    """Loads and checks everything. Touches nothing; raises ValueError for whatever cannot work."""
    name = _required(model_args)
    output.check_free(Path(args.output_dir), model_args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    inputs = load_inputs(name, data_args)
    before, model = (load_classifier(name, inputs.data.label_names, args.seed) for _ in range(2))
    return Finetuning(args, before, model, load_teacher(model_args.teacher_name_or_path, inputs), inputs)


def run(job: Finetuning) -> dict[str, Any]:
    """Trains and writes the output folder.

    Returns:
        Content of `eval_results.json`: the model before (`dense`) and after (`finetuned`).
    """
    with output.marked_if_failed(job.folder):
        set_seed(job.args.seed)
        trainer = DistillationTrainer(job.model, job.args, teacher=job.teacher, train_dataset=job.inputs.train)
        wanted = job.args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=output.newest_checkpoint(job.folder) if wanted == "auto" else wanted)
        models = {"dense": job.before, "finetuned": job.model}
        results = measure(models, job.inputs.eval, job.args) | provenance(job.args.seed)
        if job.args.process_index == 0:
            job.model.save_pretrained(job.folder)
            job.inputs.processor.save_pretrained(job.folder)
            output.write_json(job.folder / "eval_results.json", results)
            logger.warning("\n%s\n\nwritten to %s", text_table(results_rows(results)), job.folder)
    return results


def run_evaluate(model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments) -> dict[str, Any]:
    """Measures a classifier on the evaluation split: accuracy, cost, size, speed. Writes nothing."""
    name = _required(model_args)
    inputs = load_inputs(name, data_args)
    model = load_classifier(name, inputs.data.label_names, args.seed)
    return measure({"model": model}, inputs.eval, args)["model"]


def _required(model_args: ModelArguments) -> str:
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing; give a Hub name or a folder with an image classifier.")
    return model_args.model_name_or_path
