"""Measure whole searches with and without torch.compile: steps per second, memory, compilations.

Images and weights are random and all candidates are active at first. One graph should be compiled
after each shrink and none between two shrinks. The first step after a shrink, which includes the
compilation, is reported separately.

    python benchmarks/compiled_search.py --shape deit_small --batch 64 --bf16      # on a GPU
    python benchmarks/compiled_search.py --shape digits_vit --batch 32 --steps 60 --cpu
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from ofb_hf import OFBTrainer, OFBTrainingArguments
from ofb_hf.models.shapes import SHAPES
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.inputs import load_classifier
from ofb_hf.workflow.report import markdown_table

# Shrinks are spread over the search instead of its first sixth, so that there are steps to measure
# between them.
PHASES = {
    "importance_hold": 0.05,
    "retire_begin": 0.2,
    "one_hot_begin": 0.2,
    "one_hot_end": 0.6,
    "settle_at": 0.75,
}
HEAD = ("steps", "GMACs", "graphs compiled", "first step s", "steps/s after it", "peak MiB")
LABELS = 10


class RandomImages(Dataset):
    """Random images: 64 are generated once and repeated as often as the run needs them."""

    def __init__(self, config: Any, count: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(
            64, config.num_channels, config.image_size, config.image_size, generator=generator
        )
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index % len(self.images)], "labels": index % LABELS}


class Watch(TrainerCallback):
    """Record after each step the time, the number of compiled graphs and the peak memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else 0
        self.rows.append(
            {
                "time": time.perf_counter(),
                "graphs": counters["stats"]["unique_graphs"],
                "peak": peak,
            }
        )
        if peak:
            torch.cuda.reset_peak_memory_stats()


def search(wanted: argparse.Namespace, compiled: bool) -> list[list[str]]:
    """Run one search and return a row for each stretch between two shrinks."""
    counters.clear()
    torch.compiler.reset()
    model = load_classifier(wanted.shape, [str(label) for label in range(LABELS)], seed=0).train()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "use_cpu": wanted.cpu or not torch.cuda.is_available(),
            "bf16": wanted.bf16,
            "report_to": [],
        }
        settings |= {
            "torch_compile": compiled,
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
        }
        args = OFBTrainingArguments(
            folder,
            max_steps=wanted.steps,
            per_device_train_batch_size=wanted.batch,
            learning_rate=1e-4,
            **settings,
        )
        config = default_config(
            model.config,
            preset="bi_mask",
            target_macs=wanted.share,
            retire_events=wanted.shrinks,
            **PHASES,
        )
        images = RandomImages(model.config, wanted.steps * wanted.batch)
        trainer = OFBTrainer(model, args, config, train_dataset=images, callbacks=[watch])
        trainer.train()
    sizes = [row["macs"] for row in trainer.state.log_history if "macs" in row]
    # A step is logged after its shrink: the network that computed it is on the line before.
    sizes = [sizes[0], *sizes[:-1]]
    # Nothing is compiled while gradients are observed.
    hold = round(config.importance_hold * wanted.steps)
    starts = [
        hold,
        *(step for step in range(hold + 1, wanted.steps) if sizes[step] != sizes[step - 1]),
    ]
    rows = []
    for first, last in pairwise([*starts, wanted.steps]):
        took = [
            watch.rows[step]["time"] - watch.rows[step - 1]["time"]
            for step in range(max(first, 1), last)
        ]
        graphs = watch.rows[last - 1]["graphs"] - (watch.rows[first - 1]["graphs"] if first else 0)
        speed = f"{1 / statistics.median(took[1:]):.2f}" if len(took) > 1 else "-"
        peak = max(watch.rows[step]["peak"] for step in range(first, last)) / 2**20
        rows.append([f"{first + 1} to {last}", f"{sizes[first] / 1e9:.4g}", str(graphs)])
        rows[-1] += [f"{took[0]:.2f}", speed, f"{peak:,.0f}" if peak else "-"]
    return rows


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="deit_small")
    parser.add_argument(
        "--share", type=float, default=0.5, help="fraction of the dense MACs: the budget"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--shrinks",
        type=int,
        default=8,
        help="how often candidates would be retired if retiring went on until the last step",
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    wanted = parser.parse_args()
    logging.set_verbosity_error()
    for compiled in (False, True):
        sys.stdout.write(f"\n{'with' if compiled else 'without'} torch.compile\n\n")
        sys.stdout.write(markdown_table([list(HEAD), *search(wanted, compiled)]) + "\n")


if __name__ == "__main__":
    main()
