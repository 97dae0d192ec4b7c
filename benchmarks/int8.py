"""Compare ways to quantize an exported model to int8, on the processor that this runs on.

A model is exported to ONNX as `ofb-hf export` does, and the file is quantized by
`onnxruntime.quantization.quantize_dynamic`: weights in advance, activations while it runs. Two of
its settings are tried in all combinations:

per_channel   each output channel of a weight has a scale of its own, instead of one per tensor.
              It rounds weights less.
reduce_range  weights get 7 bits instead of 8. Processors without VNNI instructions add products of
              8 bits in 16 bits, which saturate; 7 bits do not. It rounds weights more.

So which setting is the most accurate depends on the processor. The table compares each file with
the one in float32, on the same images: the relative L2 distance of the logits, the fraction of
images with the same first class, and the ratio of images per second, as the median over rounds in
which all files take turns. Labels are not read. Afterwards quantize the file like this:

    from onnxruntime.quantization import quantize_dynamic
    quantize_dynamic("out/model.onnx", "out/int8.onnx", per_channel=..., reduce_range=...)

    python benchmarks/int8.py --models runs/small --data_dir PHOTOS
"""

import argparse
import itertools
import logging
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx_export import rate
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor

from ofb_hf.data import ImageTransform
from ofb_hf.data.drawing import ImageBatches, draw
from ofb_hf.data.unlabeled import ImageArguments, find_images
from ofb_hf.families.loading import load_complete_classifier
from ofb_hf.release.export import export_onnx
from ofb_hf.workflow.inputs import load_image_processor

HEAD = ("file", "MiB", "relative L2", "same first class", "speed ratio", "(lowest, highest)")
FLOAT = "float32"
# Name -> settings of `quantize_dynamic`.
SETTINGS = {
    f"int8, per {unit}, {7 if reduced else 8} bits": {
        "per_channel": unit == "channel",
        "reduce_range": reduced,
    }
    for unit, reduced in itertools.product(("tensor", "channel"), (False, True))
}
# Instructions that integer products are made of, as Linux calls them.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def instruction_sets() -> str:
    """Return which of these instructions the processor has."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text(encoding="utf-8").split()) if info.is_file() else set()
    known = [name for name in INSTRUCTIONS if name in words]
    return f"{platform.machine()}, {', '.join(known) or 'unknown instructions'}"


def prepared_images(model: str, wanted: argparse.Namespace) -> list[Tensor]:
    """Return batches (B, 3, H, W) of images as the image processor of a model makes them."""
    transform = ImageTransform(load_image_processor(model))
    found = find_images(ImageArguments(data_dir=wanted.data_dir))
    images = found.pool if found.measured is None else found.measured
    drawn = draw(images, wanted.num_images, transform, seed=0)
    return list(ImageBatches(drawn.levels, transform, wanted.batch))


def session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session with torch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(runner: onnxruntime.InferenceSession, batches: list[Tensor]) -> np.ndarray:
    """Return the logits of all images, (N, labels)."""
    return np.concatenate([runner.run(None, {"pixel_values": x.numpy()})[0] for x in batches])


def speed_ratios(
    runners: dict[str, onnxruntime.InferenceSession], images: Tensor, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return images per second as ratios to those of the file in float32, one per round."""
    ratios: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):  # the first warms up
        rates = {}
        for name, runner in runners.items():
            rates[name] = rate(
                lambda x, runner=runner: runner.run(None, {"pixel_values": x.numpy()}),
                images,
                seconds,
            )
        for name in runners if turn else ():
            ratios[name].append(rates[name] / rates[FLOAT])
    return ratios


def compare(model: str, wanted: argparse.Namespace) -> tuple[list[list[str]], str]:
    """Return the rows of a model's table, and which settings are the best ones here."""
    batches = prepared_images(model, wanted)
    with tempfile.TemporaryDirectory() as folder:
        paths = {FLOAT: Path(export_onnx(load_complete_classifier(model).eval(), folder).path)}
        for number, (name, settings) in enumerate(SETTINGS.items()):
            paths[name] = Path(folder) / f"int8_{number}.onnx"
            quantize_dynamic(paths[FLOAT], paths[name], **settings)
        runners = {name: session(path) for name, path in paths.items()}
        found = {name: logits(runner, batches) for name, runner in runners.items()}
        ratios = speed_ratios(runners, batches[0], wanted.rounds, wanted.seconds)
        sizes = {name: path.stat().st_size / 2**20 for name, path in paths.items()}
    reference = found[FLOAT]
    distances = {}
    rows = []
    for name, values in found.items():
        distances[name] = np.linalg.norm(values - reference) / np.linalg.norm(reference)
        same = np.mean(values.argmax(1) == reference.argmax(1))
        rows.append(
            [
                name,
                f"{sizes[name]:.1f}",
                f"{distances[name]:.3f}",
                f"{same:.1%}",
                f"{statistics.median(ratios[name]):.2f}",
                f"({min(ratios[name]):.2f}, {max(ratios[name]):.2f})",
            ]
        )
    best = min(SETTINGS, key=distances.get)
    given = ", ".join(f"{key}={value}" for key, value in SETTINGS[best].items())
    return rows, f"Nearest to float32 on this processor: quantize_dynamic(..., {given})"


def main() -> None:
    """Print one table per model, with the best setting below it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help="Hub names or folders of trained classifiers"
    )
    parser.add_argument(
        "--data_dir",
        required=True,
        help="images that the models are for, in any layout; a test split is preferred",
    )
    parser.add_argument(
        "--num_images", type=int, default=512, help="how many of them, drawn at random"
    )
    parser.add_argument("--batch", type=int, default=8, help="images per call")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each file")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    wanted = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer's advice to preprocess the file
    sys.stdout.write(f"{instruction_sets()}; onnxruntime {onnxruntime.__version__}\n")
    for model in wanted.models:
        rows, best = compare(model, wanted)
        sys.stdout.write(f"\n{Path(model).name}\n\n")
        sys.stdout.write(f"| {' | '.join(HEAD)} |\n| --- {'| ---: ' * (len(HEAD) - 1)}|\n")
        for row in rows:
            sys.stdout.write(f"| {' | '.join(row)} |\n")
        sys.stdout.write(f"\n{best}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
