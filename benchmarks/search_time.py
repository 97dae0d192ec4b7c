"""Measure what a search takes besides training: choosing, cutting and fitting, and whole runs.

The choice (basis, error curves, fit) is made once on random images. Then steps take turns: of the
dense network, of the dense network with a teacher of its size, and of what the search trains, with
the dense network as its teacher. A run of --epochs over --num_images images is computed from the
medians.

    python benchmarks/search_time.py --model deit_tiny --epochs 20 --num_images 10000
"""

import argparse
import statistics
import sys
import time

import torch
from transformers import ViTForImageClassification

from ofb_hf import OFBTrainingArguments, count_macs
from ofb_hf.models.shapes import SHAPES
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.trial import TrialSearch


def dense_step(model, optimizer, batch, teacher=None) -> None:
    """Take a step of a dense training, learning from labels or from a teacher."""
    logits = model(batch["pixel_values"]).logits
    if teacher is None:
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
    else:
        with torch.no_grad():
            wanted = teacher(batch["pixel_values"]).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(
            logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny", choices=sorted(SHAPES), help="named shape")
    parser.add_argument("--target_macs", type=float, default=0.5, help="budget of the search")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns of one step each")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--num_images", type=int, default=10_000, help="training images")
    wanted = parser.parse_args()
    config = SHAPES[wanted.model].config([str(number) for number in range(10)])
    torch.manual_seed(0)
    dense = ViTForImageClassification._from_config(config).train()
    args = OFBTrainingArguments(
        "unused",
        per_device_train_batch_size=wanted.batch_size,
        learning_rate=1e-5,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    search = default_config(config, target_macs=wanted.target_macs)
    trial = TrialSearch(dense, args, search, fits=True)
    dense.to(args.device)
    batch = trial.batch(wanted.batch_size)
    began = time.perf_counter()
    trial.settle()
    choice = time.perf_counter() - began
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-5)
    teacher = ViTForImageClassification._from_config(config).eval().to(args.device)
    steps = {
        "dense": lambda: dense_step(dense, optimizer, batch),
        "dense with teacher": lambda: dense_step(dense, optimizer, batch, teacher),
        "search": lambda: float(trial.step(batch)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(wanted.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    # the first turn warms up
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    count = wanted.epochs * wanted.num_images / wanted.batch_size
    run = choice + count * medians["search"]
    small = count_macs(trial.trainer.supernet.model) / count_macs(dense)
    lines = [
        f"{wanted.model}, {small:.3f} of the MACs, batches of {wanted.batch_size}, "
        f"{torch.get_num_threads()} threads",
        f"choice, cut and fit: {choice:.1f} s = {choice / medians['dense']:.0f} dense steps",
        f"its part of a search over {wanted.epochs:g} epochs of {wanted.num_images:,} images: "
        f"{choice / run:.3f}",
        f"search / as many dense steps: {run / (count * medians['dense']):.3f}",
        "search / as many dense steps with a teacher: "
        f"{run / (count * medians['dense with teacher']):.3f}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
