"""Measured facts about a classifier: accuracy, cost, size on disk, speed."""

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
from ..families.description import image_sides
from ..metrics import compute_topk, top5_indices
from ..training.arguments import OFBTrainingArguments
from ..training.distillation import DistillationTrainer
from .arguments import changed
from .command_line import command_line

# What a Trainer needs to report top-1 and top-5.
METRICS = {"compute_metrics": compute_topk, "preprocess_logits_for_metrics": top5_indices}
LOST = 10.0  # points of top-1 that a class may lose before it is named
SPEED_ROUNDS = 7
SECONDS_PER_ROUND = 0.3


def measure(
    models: dict[str, PreTrainedModel], dataset: Any, args: OFBTrainingArguments
) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Everything there is to know about each model: accuracy, size, and speed side by side in one
    run.

    Returns:
        By model: the content of `eval_results.json`, and top-1 in percent of every class (NaN
        without images of it).
    """
    results, by_class = {}, {}
    for name, model in models.items():
        accuracy, by_class[name] = evaluate_classifier(model, dataset, args)
        results[name] = accuracy | describe_size(model)
    batch = torch.stack([dataset[index]["pixel_values"] for index in range(min(32, len(dataset)))])
    for name, speed in images_per_second(models, batch).items():
        results[name]["images_per_second"] = speed
    return results, by_class


def lost_classes(
    before: list[float], after: list[float], names: list[str]
) -> dict[str, list[float]]:
    """Classes whose top-1 fell by more than `LOST` points: name -> [before, after] in percent,
    worst first."""
    losses = {
        name: [was, now]
        for name, was, now in zip(names, before, after, strict=True)
        if was - now > LOST
    }
    return dict(sorted(losses.items(), key=lambda item: item[1][1] - item[1][0]))


def provenance(seed: int, device: torch.device) -> dict[str, Any]:
    """What produced the numbers: {"seed", "versions", "command", "commit", "hardware"}."""
    return {
        "seed": seed,
        "versions": library_versions(),
        "command": command_line(),
        "commit": _commit(),
        "hardware": hardware(device),
    }


def library_versions() -> dict[str, str]:
    """Of Python, of this package, and of what speed and accuracy depend on."""
    versions = {"python": platform.python_version(), "ofb-hf": __version__}
    return versions | {
        name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")
    }


def _commit() -> str | None:
    """The commit of this package's source, "-dirty" if it was changed since; None where it is not
    checked out."""
    git = ["git", "-C", str(Path(__file__).parent)]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        # A virtual environment may lie in somebody else's repository.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            check=True,
        )
        return subprocess.run(
            [*git, *describe], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: torch.device) -> str:
    """What speed is measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join([platform.machine(), "CPU", *names[:1]])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads inside the block, and as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_images(config: PreTrainedConfig, count: int) -> Tensor:
    """Images (B, C, H, W) as a model takes them, always the same."""
    return torch.randn(
        count, config.num_channels, *image_sides(config), generator=torch.Generator().manual_seed(0)
    )


def peak_bytes(device: torch.device) -> int:
    """The most memory so far, in bytes: of tensors on a GPU (since the last reset), of the whole
    process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system, and nothing else needs it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluate_classifier(
    model: nn.Module, dataset: Any, args: OFBTrainingArguments
) -> tuple[dict[str, float], list[float]]:
    """Accuracy on a dataset, over all processes.

    Returns:
        {"top1", "top5", "num_examples"}, and top-1 of every class; all in percent.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = changed(
            args, output_dir=folder, distillation_weight=None, ema_decay=None, eval_strategy="no"
        )
        output = DistillationTrainer(model, args, **METRICS).predict(
            dataset, metric_key_prefix="eval"
        )
    labels, hits = (
        torch.as_tensor(output.label_ids),
        torch.as_tensor(output.predictions[:, 0] == output.label_ids),
    )
    count, right = (
        torch.bincount(x, minlength=model.config.num_labels).double()
        for x in (labels, labels[hits])
    )
    accuracy = {
        "top1": round(output.metrics["eval_top1"], 4),
        "top5": round(output.metrics["eval_top5"], 4),
        "num_examples": len(dataset),
    }
    return accuracy, (100 * right / count).round(decimals=4).tolist()


def describe_size(model: PreTrainedModel) -> dict[str, int]:
    """Exact cost of a classifier: {"macs", "params", "bytes"}, bytes of its safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {"macs": count_macs(model), "params": count_params(model), "bytes": size}


def images_per_second(models: dict[str, PreTrainedModel], pixel_values: Tensor) -> dict[str, float]:
    """Median throughput of several models in one run, taken in turn so that a noisy machine is fair
    to all.

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
