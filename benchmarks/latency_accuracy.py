"""Compare budgets in milliseconds with budgets in MACs: accuracy right after the cut, and latency.

A classifier is pruned in one shot by first-order scores (`baselines.pruned_subnet`, which makes the
same choice as the search) to several fractions of its MACs. It is then pruned to a fraction of the
milliseconds predicted for each of these networks, without depth and with it. Nothing is trained
afterwards. All networks take turns while their latency is measured; the table gives medians of
single passes.

    ofb-hf latency-table vit-cifar10 --num_threads 1 --output table.json
    python benchmarks/latency_accuracy.py --model vit-cifar10 --data_dir cifar10 \\
        --latency_table table.json
"""

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ofb_hf import OFBTrainingArguments, count_macs
from ofb_hf.choice import baselines
from ofb_hf.cost.latency import LatencyTable, count_latency, milliseconds
from ofb_hf.data import DataArguments
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.inputs import load
from ofb_hf.workflow.latency_table import measured_latency
from ofb_hf.workflow.measure import evaluate_classifier
from ofb_hf.workflow.report import markdown_table

OBSERVED_BATCHES, OBSERVED_TOGETHER = 256, 8
HEAD = ["budget", "MACs", "predicted ms", "measured ms", "top-1 %"]


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint of a classifier")
    parser.add_argument("--data_dir", required=True, help="class folders with its images")
    parser.add_argument("--latency_table", type=Path, required=True)
    parser.add_argument(
        "--shares",
        nargs="+",
        type=float,
        default=[0.6, 0.5, 0.4, 0.3],
        help="fractions of the MACs",
    )
    parser.add_argument(
        "--of_milliseconds",
        type=float,
        default=0.95,
        help="fraction of the milliseconds of each such network",
    )
    parser.add_argument("--max_eval_samples", type=int)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = OFBTrainingArguments(
            folder, per_device_eval_batch_size=250, use_cpu=True, report_to=[], disable_tqdm=True
        )
        data = DataArguments(
            data_dir=wanted.data_dir, augmentation="light", max_eval_samples=wanted.max_eval_samples
        )
        dense, inputs = load(wanted.model, data, args.seed)
        dense, table = dense.eval(), LatencyTable.load(wanted.latency_table)
        torch.manual_seed(0)
        batches = DataLoader(inputs.train, OBSERVED_TOGETHER, shuffle=True)
        scores = baselines.taylor_scores(dense, islice(batches, OBSERVED_BATCHES))

        def pruned(**budget: object) -> PreTrainedModel:
            config = default_config(dense.config, search_embedding=False, **budget)
            return slice_model(dense, baselines.pruned_subnet(dense, config, scores)).eval()

        models = {"dense": dense}
        for fraction in wanted.shares:
            models[f"MACs {fraction}"] = small = pruned(target_macs=fraction)
            target = wanted.of_milliseconds * milliseconds(count_latency(small, table))
            for depth in (False, True):
                suffix = ", with depth" if depth else ""
                name = f"{wanted.of_milliseconds} of the ms of MACs {fraction}{suffix}"
                models[name] = pruned(
                    target_latency_ms=target,
                    latency_table=str(wanted.latency_table),
                    search_depth=depth,
                )
        measured, rows = measured_latency(models, table), [HEAD]
        for name, model in models.items():
            top1 = evaluate_classifier(model, inputs.eval, args)[0]["top1"]
            predicted = milliseconds(count_latency(model, table))
            fraction = count_macs(model) / count_macs(dense)
            rows.append(
                [
                    name,
                    f"{fraction:.3f}",
                    f"{predicted:.3f}",
                    f"{measured[name]:.3f}",
                    f"{top1:.2f}",
                ]
            )
    sys.stdout.write(markdown_table(rows) + "\n")


if __name__ == "__main__":
    main()
