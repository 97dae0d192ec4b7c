"""Measure a classifier: accuracy, cost, size on disk, speed; and say what measured it."""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .._version import __version__
from ..cost.counting import count_macs, count_params
from ..cost.latency import threads_text
from ..families.description import image_sides
from ..families.evaluation import evaluating
from ..metrics import compute_topk, top5_indices
from ..training.arguments import OFBTrainingArguments
from ..training.classifier import ClassifierTrainer
from .arguments import changed
from .command_line import command_line

# What a Trainer needs to report top-1 and top-5.
METRICS = {"compute_metrics": compute_topk, "preprocess_logits_for_metrics": top5_indices}
# Training arguments that say how a metrics function of the user's own gets its inputs, and which
# columns a model takes. A command has its own function and data: these are the values for them.
OWN_METRICS: dict[str, Any] = {
    "batch_eval_metrics": False,
    "eval_do_concat_batches": True,
    "eval_use_gather_object": False,
    "include_for_metrics": [],
    "label_names": ["labels"],
    "remove_unused_columns": False,
}
# An evaluation within a training is not rounded by them, and what a run leaves shall not be.
NOT_ROUNDED: dict[str, Any] = {"bf16_full_eval": False, "fp16_full_eval": False}
# Points of top-1 that a class may lose before it is named.
LOST = 10.0
# Of each model in the comparison of speed; the median is reported.
SPEED_ROUNDS = 7
SECONDS_PER_ROUND = 0.3
SPEED_BATCH = 32


def measure(
    models: dict[str, PreTrainedModel], dataset: Any, args: OFBTrainingArguments
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Measure accuracy, cost, size and speed of several models in one run.

    Args:
        models: by name.
        dataset: rows of {"pixel_values" (3, H, W), "labels"}.
        args: for the device and the batch size of the evaluation.

    Returns:
        Two dicts by name: what `eval_results.json` says of the model, and top-1 of every class in
        percent (NaN for a class without images).
    """
    results = {}
    by_class = {}
    for name, model in models.items():
        accuracy, by_class[name] = evaluate_classifier(model, dataset, args)
        results[name] = accuracy | describe_size(model)
    count = min(SPEED_BATCH, len(dataset))
    # (count, 3, H, W)
    batch = torch.stack([dataset[index]["pixel_values"] for index in range(count)])
    for name, speed in images_per_second(models, batch).items():
        results[name]["images_per_second"] = speed
    return results, by_class


def lost_classes(
    before: list[float], after: list[float], names: list[str]
) -> dict[str, list[float]]:
    """Return the classes whose top-1 fell by more than `LOST` points, the worst first.

    Args:
        before, after: top-1 of every class in percent.
        names: of the classes.

    Returns:
        Name -> [before, after] in percent.
    """
    losses = {}
    for name, was, now in zip(names, before, after, strict=True):
        if was - now > LOST:  # not so for NaN
            losses[name] = [was, now]
    return dict(sorted(losses.items(), key=lambda item: item[1][1] - item[1][0]))


def provenance(seed: int, device: torch.device) -> dict[str, Any]:
    """Return what produced the numbers: {"seed", "versions", "command", "commit", "hardware"}."""
    return {
        "seed": seed,
        "versions": library_versions(),
        "command": command_line(),
        "commit": _commit(),
        "hardware": hardware(device),
    }


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of its main requirements, by name."""
    versions = {"python": platform.python_version(), "ofb-hf": __version__}
    for name in ("torch", "transformers", "accelerate", "datasets"):
        versions[name] = version(name)
    return versions


def _commit() -> str | None:
    """Return the commit of this package's source, with "-dirty" if it was changed since.

    None where the source is not checked out from its repository.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    is_tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        # An installed package may lie in a virtual environment inside another repository.
        subprocess.run(is_tracked, capture_output=True, check=True)
        described = subprocess.run(describe, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def hardware(device: torch.device) -> str:
    """Return what speed is measured on, for people to read."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {threads_text(torch.get_num_threads())}"


def processor(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = f"{platform.machine()} CPU"
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{name} {line.partition(':')[2].strip()}"
    return name


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with this number of threads for the time of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_images(config: PreTrainedConfig, count: int) -> Tensor:
    """Return random images (count, C, H, W) as a model takes them, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.num_channels, *image_sides(config), generator=generator)


def peak_bytes(device: torch.device) -> int:
    """Return the peak of memory in bytes.

    On a GPU that of tensors since the last reset, on a CPU that of the whole process so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system, and only this function needs it

    # in bytes on macOS, in KiB on Linux
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluate_classifier(
    model: nn.Module, dataset: Any, args: OFBTrainingArguments
) -> tuple[dict[str, float], list[float]]:
    """Measure accuracy on a dataset, over all processes.

    Args:
        model: stays as it is.
        dataset: rows of {"pixel_values" (3, H, W), "labels"}.
        args: of the training, of which only is read where and how to compute.

    Returns:
        {"top1", "top5", "num_examples"}, and top-1 of every class (NaN without images); accuracy
        in percent.
    """
    with tempfile.TemporaryDirectory() as folder:
        # what is about training would ask for more than an evaluation has, or give less back
        plain = changed(
            args,
            output_dir=folder,
            distillation_weight=None,
            ema_decay=None,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            prediction_loss_only=False,
            **OWN_METRICS,
        )
        trainer = ClassifierTrainer(model, plain, **METRICS)
        output = trainer.predict(dataset, metric_key_prefix="eval")
    labels = torch.as_tensor(output.label_ids)  # (N,)
    best = torch.as_tensor(output.predictions[:, 0])  # (N,), the first of the top five
    classes = model.config.num_labels
    count = torch.bincount(labels, minlength=classes).double()
    right = torch.bincount(labels[best == labels], minlength=classes).double()
    accuracy = {
        "top1": round(output.metrics["eval_top1"], 4),
        "top5": round(output.metrics["eval_top5"], 4),
        # those that came back, which is what was measured
        "num_examples": len(labels),
    }
    return accuracy, (100 * right / count).round(decimals=4).tolist()


def describe_size(model: PreTrainedModel) -> dict[str, int]:
    """Return the exact cost of a classifier: {"macs", "params", "bytes" of its weights' file}."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"macs": count_macs(model), "params": count_params(model), "bytes": size}


def images_per_second(models: dict[str, PreTrainedModel], pixel_values: Tensor) -> dict[str, float]:
    """Measure the median throughput of several models in one run.

    They take turns, so that other work on the machine slows all of them down.

    Args:
        models: by name, on the device to measure.
        pixel_values: one batch (B, C, H, W).

    Returns:
        Images per second by name.
    """
    rates: dict[str, list[float]] = {name: [] for name in models}
    with evaluating(*models.values()), torch.inference_mode():
        for round_ in range(SPEED_ROUNDS + 1):
            for name, model in models.items():
                rate = _rate(model, pixel_values.to(model.device))
                if round_ > 0:  # the first round warms up
                    rates[name].append(rate)
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def _rate(model: nn.Module, pixel_values: Tensor) -> float:
    """Return images per second over `SECONDS_PER_ROUND`, and over one batch at least."""
    images = 0
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS_PER_ROUND or not images:
        model(pixel_values=pixel_values)
        images += len(pixel_values)
        if pixel_values.is_cuda:
            torch.cuda.synchronize()
    return images / (time.perf_counter() - began)
