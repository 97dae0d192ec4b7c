"""Compare one search for several budgets with one search per budget: accuracy and cost.

A search takes the same number of steps in both cases; the search for several budgets divides them
equally among its budgets. Every model is evaluated right after its search, and again after
finetuning if there is any.

    python benchmarks/family.py --model vit-cifar10 --data_dir cifar10 \\
        --output_dir runs/families --budgets 0.7 0.5 0.35
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ofb_hf import cli
from ofb_hf.training.history import read_history
from ofb_hf.workflow.report import markdown_table

SETTINGS = {
    "lr_scheduler_type": "cosine",
    "learning_rate": "5e-4",
    "warmup_steps": "5",
    "weight_decay": "0.05",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": "true",
    "logging_steps": "1",
    "per_device_train_batch_size": "128",
    "finetune_learning_rate": "5e-4",
}
HEAD = [
    "budget",
    "several, searched",
    "several, finetuned",
    "single, searched",
    "single, finetuned",
]


def search(wanted: argparse.Namespace, folder: Path, budgets: list[float]) -> dict[str, Any]:
    """Return the results of one search command by budget, read from its folder if it has run."""
    done = folder / "bench.json"
    settings = {name: str(value) for name, value in vars(wanted).items() if name != "output_dir"}
    settings["budgets"] = budgets
    if done.is_file():
        content = json.loads(done.read_text())
        if content["settings"] == settings:
            return content
    began = time.time()
    flags = {
        "model_name_or_path": wanted.model,
        "data_dir": wanted.data_dir,
        "output_dir": str(folder),
        "target_macs": ",".join(map(str, budgets)),
        "max_steps": str(wanted.steps),
        "finetune_max_steps": str(wanted.finetune_steps),
        "seed": str(wanted.seed),
        **SETTINGS,
    }
    if wanted.max_eval_samples:
        flags["max_eval_samples"] = str(wanted.max_eval_samples)
    arguments = ["--overwrite_output_dir"]
    for name, value in flags.items():
        arguments += [f"--{name}", value]
    results = cli.search(arguments)
    if len(budgets) == 1:
        results = {f"target_macs-{budgets[0]:g}": results}
    costs = {name: sum(_macs(folder if len(budgets) == 1 else folder / name)) for name in results}
    models = {
        name: {"searched": row.get("searched"), "finetuned": row.get("finetuned")}
        for name, row in results.items()
    }
    content = {
        "settings": settings,
        "seconds": round(time.time() - began),
        "results": models,
        "search_macs": costs,
    }
    done.write_text(json.dumps(content, indent=2))
    return content


def _macs(folder: Path) -> list[int]:
    """Return the MACs of the network at every step of a search, a cost that no machine changes."""
    return [
        row["macs"]
        for row in read_history(folder / "search_history.jsonl")
        if row["phase"] == "search"
    ]


def main() -> None:
    """Run the missing searches and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument(
        "--steps", type=int, default=120, help="steps of a search, for one budget or several"
    )
    parser.add_argument("--finetune_steps", type=int, default=40, help="steps per model; 0 = none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_eval_samples", type=int)
    wanted = parser.parse_args()
    logging.set_verbosity_error()
    several = search(wanted, wanted.output_dir / "several", wanted.budgets)
    rows = [HEAD]
    costs = []
    for budget in wanted.budgets:
        name = f"target_macs-{budget:g}"
        single = search(wanted, wanted.output_dir / name, [budget])
        costs.append(single["search_macs"][name])
        cells = [f"{budget:g}"]
        for way in (several, single):
            for phase in ("searched", "finetuned"):
                model = way["results"][name][phase]
                cells.append(f"{model['top1']:.2f}" if model else "-")
        rows.append(cells)
    together = sum(several["search_macs"].values())
    summary = (
        "MACs of the network summed over the steps of the search for several budgets: "
        f"{together / max(costs):.2f} x those of the most expensive single search, "
        f"{together / sum(costs):.2f} x those of all single searches"
    )
    sys.stdout.write(f"{markdown_table(rows)}\n\n{summary}\n")


if __name__ == "__main__":
    main()
