"""Measure what `ofb-hf compress` takes: in forward passes over its images, and in memory.

The whole command (loading, decoding, measuring, fitting, measuring the result, writing) is timed
against forward passes of the dense model over the same number of images, in one process and in
turns: passes before and after the command. Memory is the peak of two processes of their own, one
that runs the command and one that runs a pass in batches of 32.

    python benchmarks/frozen_speed.py --model deit-tiny --data_dir imagenet-sample --num_images 512
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ofb_hf import cli
from ofb_hf.data import DataArguments
from ofb_hf.workflow.inputs import load
from ofb_hf.workflow.report import markdown_table

BATCH = 32
# Of the command's images, those that are in memory for the passes that it is compared with.
IN_MEMORY = 128


def seconds_of_pass(model: torch.nn.Module, images: torch.Tensor, num_images: int) -> float:
    """Return the seconds of a forward pass over so many images, in batches of 32."""
    began = time.perf_counter()
    with torch.no_grad():
        for some in images.split(BATCH):
            model(pixel_values=some)
    return (time.perf_counter() - began) * num_images / len(images)


def loaded(wanted: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the dense model, and images for its passes."""
    dense, inputs = load(wanted.model, DataArguments(data_dir=wanted.data_dir), 0)
    count = min(IN_MEMORY, len(inputs.train))
    images = torch.stack([inputs.train[index]["pixel_values"] for index in range(count)])
    return dense.eval(), images


def command(wanted: argparse.Namespace, folder: str) -> None:
    """Run the command."""
    words = [wanted.model, wanted.data_dir, "--target_macs", str(wanted.target_macs)]
    words += ["--num_images", str(wanted.num_images), "--output_dir", f"{folder}/small"]
    cli.main(["compress", *words, "--disable_tqdm", "true"])


def part(wanted: argparse.Namespace) -> dict[str, float]:
    """Do one part in this process and return what it took."""
    with tempfile.TemporaryDirectory() as folder:
        if wanted.part == "pass":
            model, images = loaded(wanted)
            seconds_of_pass(model, images[:BATCH], BATCH)
            result = {}
        elif wanted.part == "command":
            command(wanted, folder)
            result = {}
        else:
            model, images = loaded(wanted)
            seconds_of_pass(model, images, wanted.num_images)
            before = seconds_of_pass(model, images, wanted.num_images)
            began = time.perf_counter()
            command(wanted, folder)
            took = time.perf_counter() - began
            after = seconds_of_pass(model, images, wanted.num_images)
            result = {"command": took, "before": before, "after": after}
            timings = json.loads(Path(folder, "small", "eval_results.json").read_text())["timings"]
            result |= {f"{name} (s)": seconds for name, seconds in timings.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return result | {"peak_mib": peak / 1024}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint of a classifier")
    parser.add_argument("--data_dir", required=True, help="folder with its images")
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--target_macs", type=float, default=0.5)
    parser.add_argument("--part", choices=("time", "pass", "command"), help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.part:
        sys.stdout.write(json.dumps(part(wanted)) + "\n")
        return
    measured = {}
    for name in ("time", "pass", "command"):
        again = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        output = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[name] = json.loads(output.splitlines()[-1])
    times = measured["time"]
    one = (times["before"] + times["after"]) / 2
    rows = [["what", "figure"]]
    rows.append(
        [
            "forward pass over the images, before and after (s)",
            f"{times['before']:.1f}, {times['after']:.1f}",
        ]
    )
    rows.append(["whole command (s)", f"{times['command']:.1f}"])
    rows.append(["whole command (forward passes)", f"{times['command'] / one:.2f}"])
    for name, seconds in times.items():
        if name.endswith("(s)"):
            rows.append([name.replace("(s)", "(forward passes)"), f"{seconds / one:.2f}"])
    peaks = {name: measured[name]["peak_mib"] for name in ("pass", "command")}
    rows.append(["peak memory of a pass in batches of 32 (MiB)", f"{peaks['pass']:.0f}"])
    rows.append(["peak memory of the command (MiB)", f"{peaks['command']:.0f}"])
    rows.append(["ratio of the peaks", f"{peaks['command'] / peaks['pass']:.2f}"])
    sys.stdout.write(markdown_table(rows) + "\n")


if __name__ == "__main__":
    main()
