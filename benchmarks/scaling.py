"""Measure how time and memory of a search step grow with depth, width, batch size and ranks.

The benchmark starts from one ViT (224 pixels, patches of 16, heads of 64 channels, 1,000 labels)
and changes one thing at a time. Every row runs in its own process, or in two for two ranks (DDP
over gloo), so that its memory peak is its own: the most that the process holds in addition to the
memory before the model was built. Seconds are CPU time of a process, without the time it waits for
others; the table gives medians of a few steps before and after the choice.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace

import torch
from transformers import ViTConfig, ViTForImageClassification

from ofb_hf import OFBTrainingArguments, ViTBiMaskConfig, count_macs
from ofb_hf.workflow.measure import peak_bytes
from ofb_hf.workflow.report import text_table
from ofb_hf.workflow.trial import TrialSearch

STEPS = 3


@dataclass(frozen=True)
class Case:
    """One row: depth and width of a ViT, images per rank, number of ranks."""

    depth: int = 12
    width: int = 192
    batch: int = 8
    ranks: int = 1


CHANGES: dict[str, tuple[int, ...]] = {
    "depth": (6, 24),
    "width": (384, 768),
    "batch": (2, 32),
    "ranks": (2,),
}


def cases() -> list[Case]:
    """Return the first case and the cases that differ from it in one value."""
    first = Case()
    return [first] + [
        replace(first, **{name: value}) for name, values in CHANGES.items() for value in values
    ]


def measure(case: Case) -> dict[str, float]:
    """Measure steps in this process, which is one rank of the case."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": case.width,
        "intermediate_size": 4 * case.width,
        "num_hidden_layers": case.depth,
    }
    config = ViTConfig(
        **sizes, num_attention_heads=case.width // 64, image_size=224, num_labels=1000
    )
    with tempfile.TemporaryDirectory() as folder:
        args = OFBTrainingArguments(
            folder, per_device_train_batch_size=case.batch, use_cpu=True, report_to=[]
        )
        held = peak_bytes(args.device)
        trial = TrialSearch(
            ViTForImageClassification(config).train(),
            args,
            ViTBiMaskConfig(preset="bi_mask", target_macs=0.5),
        )
        batch = trial.batch(case.batch)
        before = median_seconds(trial, batch)
        peak = peak_bytes(args.device) - held
        trial.settle()
        return {
            "macs": count_macs(config),
            "before": before,
            "after": median_seconds(trial, batch),
            "bytes": peak,
        }


def median_seconds(trial: TrialSearch, batch: dict[str, torch.Tensor]) -> float:
    """Return the median CPU time of a step of this process, without the first step."""
    times = []
    for _ in range(STEPS + 1):
        began = time.process_time()
        trial.step(batch)
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def run(case: Case) -> dict[str, float]:
    """Measure a case in separate processes; of several ranks, return the first one's result."""
    command = [sys.executable]
    if case.ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(case.ranks),
            "--standalone",
        ]
    output = subprocess.run(
        [*command, __file__, "--case", json.dumps(asdict(case))],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    """Print the table, or measure one case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", help="measure this one, as JSON, in this process")
    wanted = parser.parse_args()
    if wanted.case:
        measured = measure(Case(**json.loads(wanted.case)))
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stdout.write(json.dumps(measured) + "\n")
        return
    results = {case: run(case) for case in cases()}
    first = results[Case()]
    rows = [
        [
            "depth",
            "width",
            "images",
            "ranks",
            "GMACs",
            "s / step",
            "of the first",
            "then",
            "MiB",
            "of the first",
        ]
    ]
    for case, row in results.items():
        sizes = [str(value) for value in asdict(case).values()]
        times = [
            f"{row['before']:.2f}",
            f"{row['before'] / first['before']:.2f}",
            f"{row['after'] / row['before']:.2f}",
        ]
        memory = [f"{row['bytes'] / 2**20:,.0f}", f"{row['bytes'] / first['bytes']:.2f}"]
        rows.append([*sizes, f"{row['macs'] / 1e9:.2f}", *times, *memory])
    sys.stdout.write(text_table(rows) + "\n")


if __name__ == "__main__":
    main()
