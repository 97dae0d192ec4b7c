"""Check whether networks that were chosen under a budget in milliseconds meet it on this machine.

Weights are random, because speed does not depend on them; units are chosen by magnitude
(`baselines.pruned_subnet`, which makes the same choice as the search). All networks, including the
dense one, take turns; the table gives medians of single passes.

    ofb-hf latency-table deit_tiny --num_threads 1 --output deit_tiny.json
    python benchmarks/latency_target.py --shape deit_tiny --latency_table deit_tiny.json
"""

import argparse
import sys
from pathlib import Path

from onnx_export import dense_model
from transformers import PreTrainedModel

from ofb_hf import count_macs
from ofb_hf.choice import baselines
from ofb_hf.cost.latency import LatencyTable, count_latency, milliseconds
from ofb_hf.models.shapes import SHAPES
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.latency_table import measured_latency
from ofb_hf.workflow.report import markdown_table

HEAD = ["budget", "fraction of MACs", "predicted ms", "measured ms", "measured / predicted"]


def pruned(dense: PreTrainedModel, **budget: object) -> PreTrainedModel:
    """Return the network that the search space offers under a budget."""
    subnet = baselines.pruned_subnet(
        dense, default_config(dense.config, **budget), baselines.magnitude_scores(dense)
    )
    return slice_model(dense, subnet).eval()


def main() -> None:
    """Print one table per repetition."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="deit_tiny")
    parser.add_argument("--latency_table", type=Path, required=True)
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=[0.6, 0.4],
        help="budgets: fractions of the dense model's milliseconds",
    )
    parser.add_argument(
        "--macs", nargs="+", type=float, default=[0.5], help="budgets in MACs to compare with"
    )
    parser.add_argument("--repeat", type=int, default=2)
    wanted = parser.parse_args()
    table = LatencyTable.load(wanted.latency_table)
    dense = dense_model(wanted.shape)
    targets = [
        round(fraction * milliseconds(count_latency(dense, table)), 1) for fraction in wanted.shares
    ]
    models = {"dense": dense}
    for target in targets:
        budget = {"target_latency_ms": target, "latency_table": str(wanted.latency_table)}
        models[f"target_latency_ms={target}"] = pruned(dense, **budget)
    models |= {
        f"target_macs={fraction}": pruned(dense, target_macs=fraction) for fraction in wanted.macs
    }
    for _ in range(wanted.repeat):
        rows, measured = [HEAD], measured_latency(models, table)
        for name, model in models.items():
            predicted = milliseconds(count_latency(model, table))
            fraction = count_macs(model) / count_macs(dense)
            rows.append([name, f"{fraction:.3f}", f"{predicted:.2f}", f"{measured[name]:.2f}"])
            rows[-1].append(f"{measured[name] / predicted:.3f}")
        sys.stdout.write(markdown_table(rows) + "\n\n")


if __name__ == "__main__":
    main()
