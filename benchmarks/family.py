"""A family of budgets from one search against one search per budget: accuracy, and what the
searches cost together.

Both ways have the same steps per search: the family shares those of one search out over its
budgets. Every model is evaluated right after its search, and after finetuning where that is asked
for.

    python benchmarks/family.py --model vit-cifar10 --data_dir cifar10 --output_dir runs/families
    --budgets 0.7 0.5 0.35
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

SETTINGS = "--lr_scheduler_type cosine --learning_rate 5e-4 --warmup_steps 5 --weight_decay 0.05 --save_strategy no"
SETTINGS += (
    " --report_to none --disable_tqdm true --logging_steps 1 --per_device_train_batch_size 128"
)


def search(wanted: argparse.Namespace, folder: Path, budgets: list[float]) -> dict[str, Any]:
    """Results by budget of one command; those of an earlier call with the same folder are read
    instead."""
    done, settings = (
        folder / "bench.json",
        {k: str(v) for k, v in vars(wanted).items() if k != "output_dir"},
    )
    settings["budgets"] = budgets
    if done.is_file() and (content := json.loads(done.read_text()))["settings"] == settings:
        return content
    began = time.time()
    targets = ",".join(map(str, budgets))
    words = [
        "--model_name_or_path",
        wanted.model,
        "--data_dir",
        wanted.data_dir,
        "--output_dir",
        str(folder),
    ]
    words += [
        "--target_macs",
        targets,
        "--max_steps",
        str(wanted.steps),
        "--overwrite_output_dir",
        *SETTINGS.split(),
    ]
    words += ["--seed", str(wanted.seed)]
    words += [
        "--finetune_max_steps",
        str(wanted.finetune_steps),
        "--finetune_learning_rate",
        "5e-4",
    ]
    words += ["--max_eval_samples", str(wanted.max_eval_samples)] if wanted.max_eval_samples else []
    results = cli.search(words)
    if len(budgets) == 1:
        results = {f"target_macs-{budgets[0]:g}": results}
    costs = {name: sum(_macs(folder if len(budgets) == 1 else folder / name)) for name in results}
    stages = {
        name: {stage: row.get(stage) for stage in ("searched", "finetuned")}
        for name, row in results.items()
    }
    content = {
        "settings": settings,
        "seconds": round(time.time() - began),
        "results": stages,
        "search_macs": costs,
    }
    done.write_text(json.dumps(content, indent=2))
    return content


def _macs(folder: Path) -> list[int]:
    """MACs of the network in every step of a search: what a step costs, whatever the machine does
    meanwhile."""
    return [
        row["macs"]
        for row in read_history(folder / "search_history.jsonl")
        if row["phase"] == "search"
    ]


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument(
        "--steps", type=int, default=120, help="of one search, and of the whole family's"
    )
    parser.add_argument("--finetune_steps", type=int, default=40, help="of every model; 0 = none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_eval_samples", type=int)
    wanted = parser.parse_args()
    logging.set_verbosity_error()
    family = search(wanted, wanted.output_dir / "family", wanted.budgets)
    rows, costs = (
        [
            [
                "budget",
                "family, searched",
                "family, finetuned",
                "single, searched",
                "single, finetuned",
            ]
        ],
        [],
    )
    for budget in wanted.budgets:
        name = f"target_macs-{budget:g}"
        single = search(wanted, wanted.output_dir / name, [budget])
        costs.append(single["search_macs"][name])
        models = [
            way["results"][name][stage]
            for way in (family, single)
            for stage in ("searched", "finetuned")
        ]
        rows.append(
            [f"{budget:g}", *(f"{model['top1']:.2f}" if model else "-" for model in models)]
        )
    together = sum(family["search_macs"].values())
    said = f"MACs of the network, summed over the steps of the search: the family has {together / max(costs):.2f} x "
    said += (
        f"those of the dearest single search, {together / sum(costs):.2f} x those of all of them"
    )
    sys.stdout.write(f"{markdown_table(rows)}\n\n{said}\n")


if __name__ == "__main__":
    main()
