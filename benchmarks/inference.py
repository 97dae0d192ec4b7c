"""Measure how much faster compressed models are, by engine, batch size, threads, budget and
`multiple_of`.

Weights are random, because speed does not depend on them: a compressed model is the choice that
the search space offers under a budget in MACs. All models of one engine, thread count and batch
size take turns; the table gives medians over the rounds and ratios within a round. "Of the fastest"
is the ratio between the fastest turns, which other load on the machine disturbs least. The last
column, speed-up times fraction of the MACs, is 1 where time is proportional to MACs; `--profile`
shows which operations take the rest.

    python benchmarks/inference.py --shapes deit_tiny --engines onnxruntime --batch 1 8 \\
        --multiple_of 8 16
    python benchmarks/inference.py --shapes deit_tiny --budgets 0.5 --batch 8 --threads 1 --profile
    python benchmarks/inference.py --shapes deit_small --engines eager compile --device cuda \\
        --dtype bfloat16
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from onnx_export import compressed_model, dense_model, onnx_session, rate
from torch import Tensor, nn

from ofb_hf import count_macs
from ofb_hf.models.shapes import SHAPES
from ofb_hf.workflow.measure import processor, random_images, threads

ENGINES = ("eager", "compile", "onnxruntime")
HEAD = [
    "model",
    "engine",
    "threads",
    "batch",
    "of the MACs",
    "ms",
    "images/s",
    "speed-up",
    "(lowest, highest)",
]
HEAD += ["of the fastest", "speed-up x MACs"]
OPERATIONS = 12  # rows of the profile: the most expensive ones


def contestants(shape: str, budgets: list[float], multiples: list[int]) -> dict[str, nn.Module]:
    """Return the dense model and a compressed one for every budget and `multiple_of`."""
    dense = dense_model(shape)
    rows: dict[str, nn.Module] = {f"{shape}, dense": dense}
    for fraction in budgets:
        for multiple in multiples:
            rows[f"{shape}, {fraction} by {multiple}"] = compressed_model(dense, fraction, multiple)
    return rows


def runner(engine: str, model: nn.Module, stack: ExitStack) -> Callable[[Tensor], object]:
    """Return a function that computes a batch in an engine with torch's number of threads."""
    if engine == "onnxruntime":
        session, _ = stack.enter_context(onnx_session(model))
        return lambda images: session.run(None, {"pixel_values": images.numpy()})
    compute = torch.compile(model, dynamic=False) if engine == "compile" else model

    def run(images: Tensor) -> None:
        compute(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def measured(
    models: dict[str, nn.Module], engine: str, batch: int, wanted: argparse.Namespace
) -> Iterator[dict]:
    """Yield one row for every model."""
    first = next(iter(models.values()))
    place = torch.device(wanted.device), getattr(torch, wanted.dtype)
    images = random_images(first.config, batch).to(*place)
    with ExitStack() as stack:
        runs = {name: runner(engine, model.to(*place), stack) for name, model in models.items()}
        stack.enter_context(torch.inference_mode())
        turns = []
        for number in range(wanted.rounds + 1):  # the first warms up, and compiles
            length = wanted.seconds if number else 0
            turns.append({name: rate(run, images, length) for name, run in runs.items()})
    dense_name, *_ = models
    for name, model in models.items():
        ratios = [turn[name] / turn[dense_name] for turn in turns[1:]]
        fraction, speed_up = count_macs(model) / count_macs(first), statistics.median(ratios)
        images_per_second = statistics.median(turn[name] for turn in turns[1:])
        fastest = max(turn[name] for turn in turns[1:])
        fastest_dense = max(turn[dense_name] for turn in turns[1:])
        yield {
            "model": name,
            "engine": engine,
            "threads": torch.get_num_threads(),
            "batch": batch,
            "device": wanted.device,
            "dtype": wanted.dtype,
            "hardware": processor(place[0]),
            "macs_share": fraction,
            "ms": 1e3 * batch / images_per_second,
            "images_per_second": images_per_second,
            "speed_up": speed_up,
            "lowest": min(ratios),
            "highest": max(ratios),
            "efficiency": speed_up * fraction,
            "of_the_fastest": fastest / fastest_dense,
        }


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    return [
        *(str(row[name]) for name in ("model", "engine", "threads", "batch")),
        f"{row['macs_share']:.3f}",
        f"{row['ms']:.2f}",
        f"{row['images_per_second']:.1f}",
        f"{row['speed_up']:.2f}",
        f"({row['lowest']:.2f}, {row['highest']:.2f})",
        f"{row['of_the_fastest']:.2f}",
        f"{row['efficiency']:.2f}",
    ]


def operations(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the milliseconds of one forward pass by kernel, without the kernels it calls."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, *([activity.CUDA] if images.is_cuda else [])]
    with torch.inference_mode():
        model(images)
        with torch.profiler.profile(activities=kinds) as profile:
            model(images)
    name = "self_device_time_total" if images.is_cuda else "self_cpu_time_total"
    return {event.key: getattr(event, name) / 1e3 for event in profile.key_averages()}


def profile_table(models: dict[str, nn.Module], batch: int, wanted: argparse.Namespace) -> None:
    """Print the time of an eager forward pass by operation, the dense model's longest first."""
    place = torch.device(wanted.device), getattr(torch, wanted.dtype)
    first = next(iter(models.values()))
    images = random_images(first.config, batch).to(*place)
    turns = [
        {n: operations(m.to(*place), images) for n, m in models.items()}
        for _ in range(wanted.rounds + 1)
    ][1:]
    names = {operation for turn in turns for found in turn.values() for operation in found}
    times = {
        model: {
            name: statistics.median(turn[model].get(name, 0.0) for turn in turns) for name in names
        }
        for model in models
    }
    dense, *others = times
    write(
        [
            "operation",
            f"{dense}: ms",
            "fraction",
            *(
                head
                for name in others
                for head in (f"{name}: ms", "fraction", "compressed / dense")
            ),
        ]
    )
    for operation in sorted(times[dense], key=times[dense].get, reverse=True)[:OPERATIONS]:
        row = [operation]
        for name, found in times.items():
            elapsed = found.get(operation, 0.0)
            row += [f"{elapsed:.2f}", f"{100 * elapsed / sum(found.values()):.1f} %"]
            row += [] if name == dense else [f"{elapsed / times[dense][operation]:.2f}"]
        write(row)
    totals = [f"{count_macs(model) / count_macs(first):.3f}" for model in models.values()]
    write(["MACs", "", totals[0], *(cell for total in totals[1:] for cell in ("", "", total))])


def write(row: list[str], head: bool = False) -> None:
    """Print a line of a Markdown table, and the rule below its head."""
    sys.stdout.write(f"| {' | '.join(row)} |\n")
    if head or row[0] == "operation":
        sys.stdout.write(f"| --- {'| ---: ' * (len(row) - 1)}|\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["deit_tiny"])
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=[0.5, 0.3, 0.25], help="fractions of the MACs"
    )
    parser.add_argument(
        "--multiple_of",
        nargs="+",
        type=int,
        default=[16],
        help="channel counts are multiples of these",
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["eager", "onnxruntime"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--profile", action="store_true", help="time by operation, eager, instead of speed"
    )
    parser.add_argument("--output", type=Path, help="also append rows to this file, as JSON lines")
    wanted = parser.parse_args()
    if (
        "onnxruntime" in wanted.engines
        and not wanted.profile
        and (wanted.device, wanted.dtype) != ("cpu", "float32")
    ):
        parser.error("onnxruntime runs on the cpu in float32 here; leave it out of --engines.")
    return wanted


def main() -> None:
    """Print one table, or one profile per shape and batch size."""
    wanted = arguments()
    if not wanted.profile:
        write(HEAD, head=True)
    for shape in wanted.shapes:
        models = contestants(shape, wanted.budgets, wanted.multiple_of)
        for count in wanted.threads:
            # The number of threads is part of compiled code.
            torch.compiler.reset()
            with threads(count):
                for batch in wanted.batch:
                    if wanted.profile:
                        profile_table(models, batch, wanted)
                        continue
                    for engine in wanted.engines:
                        for row in measured(models, engine, batch, wanted):
                            write(cells(row))
                            if wanted.output is not None:
                                with wanted.output.open("a", encoding="utf-8") as file:
                                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
