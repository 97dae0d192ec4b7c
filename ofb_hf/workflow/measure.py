"""Measured facts about a classifier: accuracy, cost, size on disk, speed."""

import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._version import __version__
from ..distillation import DistillationTrainer
from ..flops import count_macs, count_params
from ..metrics import compute_topk, top5_indices
from ..training_args import OFBTrainingArguments
from .arguments import changed, command_line

# What a Trainer needs to report top-1 and top-5.
METRICS = {"compute_metrics": compute_topk, "preprocess_logits_for_metrics": top5_indices}
SPEED_ROUNDS = 7
SECONDS_PER_ROUND = 0.3


def measure(models: dict[str, PreTrainedModel], dataset: Any, args: OFBTrainingArguments) -> dict[str, dict]:
    """Everything there is to know about each model: accuracy, size, and speed side by side in one run."""
    results = {name: evaluate_classifier(model, dataset, args) | describe_size(model) for name, model in models.items()}
    batch = torch.stack([dataset[index]["pixel_values"] for index in range(min(32, len(dataset)))])
    for name, speed in images_per_second(models, batch).items():
        results[name]["images_per_second"] = speed
    return results


def provenance(seed: int) -> dict[str, Any]:
    """What produced the numbers: {"seed", "versions", "command"}."""
    versions = {"python": platform.python_version(), "ofb-hf": __version__}
    versions |= {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"seed": seed, "versions": versions, "command": command_line()}


def hardware() -> str:
    """What speed is measured on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def evaluate_classifier(model: nn.Module, dataset: Any, args: OFBTrainingArguments) -> dict[str, float]:
    """Top-1 and top-5 in percent on a dataset, over all processes: {"top1", "top5", "num_examples"}."""
    with tempfile.TemporaryDirectory() as folder:
        args = changed(args, output_dir=folder, distillation_weight=None, ema_decay=None, eval_strategy="no")
        metrics = DistillationTrainer(model, args, eval_dataset=dataset, **METRICS).evaluate()
    return {
        "top1": round(metrics["eval_top1"], 4),
        "top5": round(metrics["eval_top5"], 4),
        "num_examples": len(dataset),
    }


def describe_size(model: PreTrainedModel) -> dict[str, int]:
    """Exact cost of a classifier: {"macs", "params", "bytes"}, bytes of its safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"macs": count_macs(model), "params": count_params(model), "bytes": size}


def images_per_second(models: dict[str, PreTrainedModel], pixel_values: Tensor) -> dict[str, float]:
    """Median throughput of several models in one run, taken in turn so that a noisy machine is fair to all.

    Args:
        models: by name, on the device to measure.
        pixel_values: one batch (B, C, H, W).
    """
    timings: dict[str, list[float]] = {name: [] for name in models}
    was_training = {name: model.training for name, model in models.items()}
    with torch.inference_mode():
        for round_ in range(SPEED_ROUNDS + 1):  # the first round warms up
            for name, model in models.items():
                rate = _rate(model.eval(), pixel_values.to(model.device))
                if round_:
                    timings[name].append(rate)
    for name, model in models.items():
        model.train(was_training[name])
    return {name: round(statistics.median(rates), 1) for name, rates in timings.items()}


def _rate(model: nn.Module, pixel_values: Tensor) -> float:
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS_PER_ROUND or not images:
        model(pixel_values=pixel_values)
        images += len(pixel_values)
        if pixel_values.is_cuda:
            torch.cuda.synchronize()
    return images / (time.perf_counter() - began)
