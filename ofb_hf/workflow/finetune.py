"""Finetune and evaluate a classifier that is already there, compressed or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..data import DataArguments, build_transform, load_image_data, with_image_transform
from ..distillation import DistillationTrainer
from ..training_args import OFBTrainingArguments
from . import output
from .arguments import ModelArguments
from .checkpoints import load_classifier, load_image_processor, load_teacher
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
    processor: Any
    train: Any
    eval: Any

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output_dir)


def prepare(model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments) -> Finetuning:
    """Loads and checks everything. Touches nothing; raises ValueError for whatever cannot work."""
    name = _required(model_args)
    output.check_free(Path(args.output_dir), model_args.overwrite_output_dir, args.resume_from_checkpoint is not None)
    processor, data = load_image_processor(name), load_image_data(data_args)
    before, model = (load_classifier(name, data.label_names, args.seed) for _ in range(2))
    teacher = None
    if model_args.teacher_name_or_path is not None:
        teacher = load_teacher(model_args.teacher_name_or_path, len(data.label_names))
    columns = (data.image_column, data.label_column)
    train = with_image_transform(data.train, build_transform(processor, data_args.augmentation, train=True), *columns)
    evaluation = with_image_transform(data.eval, build_transform(processor, "none", train=False), *columns)
    return Finetuning(args, before, model, teacher, processor, train, evaluation)


def run(job: Finetuning) -> dict[str, Any]:
    """Trains and writes the output folder.

    Returns:
        Content of `eval_results.json`: the model before (`dense`) and after (`finetuned`).
    """
    with output.marked_if_failed(job.folder):
        set_seed(job.args.seed)
        trainer = DistillationTrainer(job.model, job.args, teacher=job.teacher, train_dataset=job.train)
        wanted = job.args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=output.newest_checkpoint(job.folder) if wanted == "auto" else wanted)
        models = {"dense": job.before, "finetuned": job.model}
        results = measure(models, job.eval, job.args) | provenance(job.args.seed)
        if job.args.process_index == 0:
            job.model.save_pretrained(job.folder)
            job.processor.save_pretrained(job.folder)
            output.write_json(job.folder / "eval_results.json", results)
            logger.warning("\n%s\n\nwritten to %s", text_table(results_rows(results)), job.folder)
    return results


def run_evaluate(model_args: ModelArguments, data_args: DataArguments, args: OFBTrainingArguments) -> dict[str, Any]:
    """Measures a classifier on the evaluation split: accuracy, cost, size, speed. Writes nothing."""
    name = _required(model_args)
    processor, data = load_image_processor(name), load_image_data(data_args)
    model = load_classifier(name, data.label_names, args.seed)
    transform = build_transform(processor, "none", train=False)
    evaluation = with_image_transform(data.eval, transform, data.image_column, data.label_column)
    return measure({"model": model}, evaluation, args)["model"]


def _required(model_args: ModelArguments) -> str:
    if model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing; give a Hub name or a folder with an image classifier.")
    return model_args.model_name_or_path
