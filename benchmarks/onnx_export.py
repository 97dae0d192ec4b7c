"""Compare ONNX Runtime with PyTorch on dense and compressed models: agreement, size, speed.

Shapes get random weights, because neither speed nor agreement depends on training; a compressed
model is the choice that the search space offers at half of the MACs. Both runtimes take turns; the
table gives medians over the rounds and ratios within a round.

    python benchmarks/onnx_export.py --shapes deit_tiny swin_tiny --batch 8
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnxruntime
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, PreTrainedModel

from ofb_hf import compress, count_macs, install_bi_masks
from ofb_hf.models.shapes import SHAPES
from ofb_hf.release.export import Exported, export_onnx
from ofb_hf.space.configuration import default_config

HEAD = (
    "model",
    "GMACs",
    "difference",
    "ONNX MiB",
    "torch img/s",
    "onnxruntime img/s",
    "ratio",
    "(lowest, highest)",
)


def dense_model(shape: str) -> PreTrainedModel:
    """Return a shape with random weights and 1,000 labels."""
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(
        SHAPES[shape].config(list(map(str, range(1000))))
    ).eval()


def compressed_model(
    dense: PreTrainedModel, fraction: float, multiple_of: int = 16
) -> PreTrainedModel:
    """Return the network that the search space offers at a fraction of the MACs."""
    config = default_config(
        dense.config, preset="bi_mask", target_macs=fraction, multiple_of=multiple_of
    )
    return compress(install_bi_masks(dense, config)).eval()


def contestants(shape: str, fraction: float) -> dict[str, torch.nn.Module]:
    """Return the dense model of a shape and a compressed one at a fraction of its MACs."""
    dense = dense_model(shape)
    return {
        f"{shape}, dense": dense,
        f"{shape}, {fraction} of the MACs": compressed_model(dense, fraction),
    }


@contextmanager
def onnx_session(model: torch.nn.Module) -> Iterator[tuple[onnxruntime.InferenceSession, Exported]]:
    """Yield a session of ONNX Runtime with torch's number of threads, and the export's report."""
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(model, folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        yield (
            onnxruntime.InferenceSession(done.path, options, providers=["CPUExecutionProvider"]),
            done,
        )


def rate(run: Callable[[Tensor], object], images: Tensor, seconds: float) -> float:
    """Return the images per second of one turn."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not count:
        run(images)
        count += len(images)
    return count / (time.perf_counter() - began)


def measure(
    name: str, model: torch.nn.Module, batch: int, rounds: int, seconds: float
) -> list[str]:
    """Return a row of the table."""
    size = model.config.image_size
    images = torch.randn(batch, 3, size, size)
    with onnx_session(model) as (session, done), torch.inference_mode():
        turns = []
        for _ in range(rounds + 1):  # the first warms up
            in_torch = rate(model, images, seconds)
            in_onnx = rate(
                lambda x: session.run(None, {"pixel_values": x.numpy()}), images, seconds
            )
            turns.append((in_torch, in_onnx))
    pytorch, onnx = zip(*turns[1:], strict=True)
    ratios = [b / a for a, b in turns[1:]]
    return [
        name,
        f"{count_macs(model) / 1e9:.3f}",
        f"{done.difference:.1e}",
        f"{done.size / 2**20:.1f}",
        f"{statistics.median(pytorch):.1f}",
        f"{statistics.median(onnx):.1f}",
        f"{statistics.median(ratios):.2f}",
        f"({min(ratios):.2f}, {max(ratios):.2f})",
    ]


def main() -> None:
    """Print one table for all shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["deit_tiny", "swin_tiny"])
    parser.add_argument(
        "--share", type=float, default=0.5, help="fraction of the MACs of the compressed models"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn")
    wanted = parser.parse_args()
    sys.stdout.write(f"| {' | '.join(HEAD)} |\n| --- {'| ---: ' * (len(HEAD) - 1)}|\n")
    for shape in wanted.shapes:
        for name, model in contestants(shape, wanted.share).items():
            row = measure(name, model, wanted.batch, wanted.rounds, wanted.seconds)
            sys.stdout.write(f"| {' | '.join(row)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
