"""Measure images per second of DeiT shapes with and without published token schedules.

Weights are random, because speed does not depend on them. Models take turns; compare ratios only.

    python benchmarks/token_throughput.py --shapes deit_tiny deit_small --batch 8
"""

import argparse
import sys

import torch
from transformers import ViTForImageClassification

from ofb_hf import OFBViTForImageClassification, count_macs
from ofb_hf.models.shapes import SHAPES
from ofb_hf.tokens.published import PUBLISHED, published_schedule
from ofb_hf.workflow.measure import hardware, images_per_second
from ofb_hf.workflow.report import markdown_table


def rows(shape: str, batch: int, device: torch.device) -> list[list[str]]:
    """Return rows for the dense model of a shape and for each of its published schedules."""
    torch.manual_seed(0)
    config = SHAPES[shape].config([str(label) for label in range(1000)])
    dense = ViTForImageClassification(config).to(device).eval()
    models = {f"{shape}, dense": dense}
    for gmacs in PUBLISHED[config.hidden_size]:
        schedule = published_schedule(config, gmacs)
        models[f"{shape}, {gmacs}"] = OFBViTForImageClassification.from_dense(dense, schedule)
    speed = images_per_second(models, torch.randn(batch, 3, config.image_size, config.image_size))
    first = f"{shape}, dense"
    return [
        [
            name,
            f"{count_macs(model) / 1e9:.3f}",
            f"{count_macs(dense) / count_macs(model):.2f}",
            f"{speed[name] / speed[first]:.2f}",
            f"{speed[name]:,.1f}",
        ]
        for name, model in models.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["deit_tiny", "deit_small"],
        choices=["deit_tiny", "deit_small", "deit_base"],
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    table = [["model, published schedule", "GMACs", "fewer by", "faster by", "images/s"]]
    for shape in options.shapes:
        table += rows(shape, options.batch, device)
    sys.stdout.write(f"{hardware(device)}, batches of {options.batch}\n\n{markdown_table(table)}\n")


if __name__ == "__main__":
    main()
