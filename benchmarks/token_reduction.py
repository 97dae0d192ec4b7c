"""Compare ways to use fewer tokens without finetuning: learned counts, fixed rates, random tokens.

    dense             all tokens, all widths
    learned           counts learned by TokenTrainer (ofb-hf search-tokens), weights unchanged
    fixed merging     the same reduction in every layer, by merging (ToMe's schedule, our ranking)
    fixed dropping    the same by dropping the patches with the least attention
    ranked dropping   counts of `learned`; the patches with least attention are dropped
    random dropping   counts of `learned`; random patches are dropped
    widths            one-shot first-order pruning of heads and MLP channels, all tokens
    both              `widths` first, then learned counts
    search            the choice of a search for widths (ofb-hf search), weights unchanged
    joint search      the same with --search_tokens: widths and tokens in one choice

All models have the same budgets (`both` has its own) and are evaluated on the same images. They
take turns when speed is measured, so compare ratios to dense only. With a table of
`ofb-hf latency-table`, budgets are fractions of the milliseconds that the table predicts for the
dense model, and the result lists predicted and measured latency under the table's settings.

    python benchmarks/token_reduction.py --model vit-cifar10 --data_dir cifar10 \\
        --output_dir runs/tokens --steps 100
    ofb-hf latency-table vit-cifar10 --batch_size 32 --num_threads 1 --clock cpu --output table.json
    python benchmarks/token_reduction.py --model vit-cifar10 --data_dir cifar10 \\
        --output_dir runs/ms --steps 100 --latency_table table.json \\
        --only learned "fixed merging" "joint search"
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, set_seed

from ofb_hf import OFBTrainer, OFBTrainingArguments, OFBViTForImageClassification, count_macs
from ofb_hf.choice import baselines
from ofb_hf.cost.latency import LatencyTable, count_latency, milliseconds
from ofb_hf.data import DataArguments
from ofb_hf.models.modeling_ofb_vit import TokenReduction
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import default_config
from ofb_hf.token_search.learned_counts import TokenSearchConfig
from ofb_hf.token_search.trainer import TokenTrainer
from ofb_hf.tokens.schedules import fixed_rate_schedule
from ofb_hf.workflow.inputs import Inputs, load
from ofb_hf.workflow.latency_table import measured_latency
from ofb_hf.workflow.measure import images_per_second, provenance
from ofb_hf.workflow.report import markdown_table

TAYLOR_BATCHES, OBSERVED_IMAGES = 8, 512
WIDTH_FRACTION = 0.7  # fraction that `both` leaves to widths; tokens do the rest


class RandomReduction(TokenReduction):
    """Keep random patches."""

    def forward(
        self, tokens: Tensor, sizes: Tensor | None, importance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Reduce tokens as `TokenReduction.forward` does, with random importance."""
        return super().forward(tokens, sizes, torch.rand_like(importance))


def budget(dense: PreTrainedModel, fraction: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return the config fields of a budget: a fraction of the cost of the dense model."""
    if options.latency_table is None:
        return {"target_macs": int(fraction * count_macs(dense))}
    table = LatencyTable.load(options.latency_table)
    target = fraction * milliseconds(count_latency(dense, table))
    return {"target_latency_ms": target, "latency_table": options.latency_table}


def learned(
    model: PreTrainedModel, inputs: Inputs, target: dict[str, Any], options: argparse.Namespace
) -> PreTrainedModel:
    """Return the model with learned counts; `target` comes from `budget`."""
    settings = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": options.cpu,
    }
    settings |= {
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    args = OFBTrainingArguments(str(options.output_dir), seed=options.seed, **settings)
    trainer = TokenTrainer(model, args, TokenSearchConfig(**target), train_dataset=inputs.train)
    trainer.train()
    return trainer.scheduled().eval()


def narrowed(
    model: PreTrainedModel, inputs: Inputs, target: dict[str, Any], options: argparse.Namespace
) -> PreTrainedModel:
    """Return the model with fewer heads and MLP channels, pruned in one shot."""
    rows = torch.randperm(len(inputs.train), generator=torch.Generator().manual_seed(options.seed))
    loader = DataLoader(
        inputs.train,
        options.batch_size,
        sampler=rows[: TAYLOR_BATCHES * options.batch_size].tolist(),
    )
    config = default_config(model.config, **target, search_embedding=False)
    subnet = baselines.pruned_subnet(model, config, baselines.taylor_scores(model, loader))
    return slice_model(OFBViTForImageClassification.from_dense(model), subnet).eval()


def searched(
    model: PreTrainedModel,
    inputs: Inputs,
    target: dict[str, Any],
    tokens: bool,
    options: argparse.Namespace,
) -> PreTrainedModel:
    """Return the choice of a search after its importance phase; nothing is trained."""
    steps = -(-OBSERVED_IMAGES // options.batch_size)
    settings = {
        "max_steps": steps + 2,
        "per_device_train_batch_size": options.batch_size,
        "use_cpu": options.cpu,
    }
    settings |= {"learning_rate": 0.0, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    args = OFBTrainingArguments(str(options.output_dir), seed=options.seed, **settings)
    phases = {
        "importance_hold": steps / (steps + 2),
        "settle_at": (steps + 1) / (steps + 2),
        "retire_begin": 1.0,
    }
    unchanged = {"preset": "bi_mask", "architecture_learning_rate": 0.0, "pmim": False}
    config = default_config(
        model.config, **target, search_embedding=False, search_tokens=tokens, **phases, **unchanged
    )
    trainer = OFBTrainer(model, args, config, train_dataset=inputs.train)
    trainer.train()
    return trainer.compress().eval()


def at_fixed_rate(model: PreTrainedModel, target: dict[str, Any], merge: bool) -> PreTrainedModel:
    """Return the model with the same reduction in every layer."""
    config = TokenSearchConfig(**target)
    schedule = fixed_rate_schedule(
        model.config, config.target_for(model.config), merge, config.terms_of
    )
    return OFBViTForImageClassification.from_dense(model, schedule)


def dropping(model: PreTrainedModel, by_chance: bool) -> PreTrainedModel:
    """Return the model with the same counts, by dropping tokens only."""
    schedule = [[merged, merged] for _, merged in model.config.token_schedule]
    model = OFBViTForImageClassification.from_dense(model, schedule)
    for layer in model.vit.layers:
        if by_chance and layer.reduction is not None:
            layer.reduction = RandomReduction(layer.reduction.kept, layer.reduction.merged)
    return model


@torch.inference_mode()
def top1(model: PreTrainedModel, images: DataLoader) -> float:
    """Return top-1 accuracy in percent."""
    hits = [
        model(batch["pixel_values"].to(model.device)).logits.argmax(-1).cpu() == batch["labels"]
        for batch in images
    ]
    return 100 * torch.cat(hits).float().mean().item()


def contestants(
    dense: PreTrainedModel, inputs: Inputs, options: argparse.Namespace
) -> dict[str, Any]:
    """Return name -> (model, seconds that it took to make)."""
    models: dict[str, Any] = {"dense": (dense, 0.0)}

    def add(name: str, make: Any) -> None:
        if options.only and name.split(",")[0] not in options.only:
            return
        set_seed(options.seed)
        began = time.perf_counter()
        models[name] = make().eval(), time.perf_counter() - began

    for fraction in options.shares:
        target = budget(dense, fraction, options)
        add(f"learned, {fraction}", lambda target=target: learned(dense, inputs, target, options))
        for name, merge in (("fixed merging", True), ("fixed dropping", False)):
            add(
                f"{name}, {fraction}",
                lambda target=target, merge=merge: at_fixed_rate(dense, target, merge),
            )
        if f"learned, {fraction}" in models:
            found = models[f"learned, {fraction}"][0]
            add(
                f"ranked dropping, {fraction}", lambda found=found: dropping(found, by_chance=False)
            )
            add(f"random dropping, {fraction}", lambda found=found: dropping(found, by_chance=True))
        add(f"widths, {fraction}", lambda target=target: narrowed(dense, inputs, target, options))
        add(
            f"search, {fraction}",
            lambda target=target: searched(dense, inputs, target, False, options),
        )
        add(
            f"joint search, {fraction}",
            lambda target=target: searched(dense, inputs, target, True, options),
        )
    both, width = (budget(dense, fraction, options) for fraction in (options.both, WIDTH_FRACTION))
    add(
        f"both, {options.both}",
        lambda: learned(narrowed(dense, inputs, width, options), inputs, both, options),
    )
    for name, tokens in (("search", False), ("joint search", True)):
        add(
            f"{name}, {options.both}",
            lambda tokens=tokens: searched(dense, inputs, both, tokens, options),
        )
    return models


def add_latency(rows: list[dict[str, Any]], models: dict[str, PreTrainedModel], file: str) -> None:
    """Add predicted and measured latency to every row; the models take turns."""
    table = LatencyTable.load(file)
    taken = measured_latency(models, table)
    for row in rows:
        row["predicted_latency_ms"] = milliseconds(count_latency(models[row["name"]], table))
        row["latency_ms"] = taken[row["name"]]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy over MACs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    dense = rows[0]
    for name in dict.fromkeys(row["name"].split(",")[0] for row in rows[1:]):
        points = [dense, *(row for row in rows if row["name"].split(",")[0] == name)]
        fraction = [row["macs"] / dense["macs"] for row in points]
        axes.plot(fraction, [row["top1"] for row in points], marker="o", label=name)
    axes.set(
        xlabel="MACs, fraction of dense", ylabel="top-1 % without finetuning", title="Fewer tokens"
    )
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--both", type=float, default=0.35)
    parser.add_argument(
        "--only", nargs="+", help="Names of models, e.g. 'joint search'; default: all."
    )
    parser.add_argument(
        "--latency_table",
        help="File of `ofb-hf latency-table`; budgets are then fractions of milliseconds.",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="Do not use an accelerator.")
    return parser.parse_args()


def main() -> None:
    """Make, evaluate and time all models; write results.json, table.md and plot.png."""
    options = parse()
    data = DataArguments(data_dir=options.data_dir, augmentation="light")
    dense, inputs = load(options.model, data, options.seed)
    device = torch.device("cpu" if options.cpu or not torch.cuda.is_available() else "cuda")
    models = contestants(dense.to(device).eval(), inputs, options)
    step = max(1, len(inputs.eval) // (options.max_eval_samples or len(inputs.eval)))
    images = DataLoader(Subset(inputs.eval, range(0, len(inputs.eval), step)), 250)
    count = 128 if device.type == "cuda" else 32
    batch = torch.stack(
        [inputs.eval[row]["pixel_values"] for row in range(min(count, len(inputs.eval)))]
    )
    speed = images_per_second({name: model for name, (model, _) in models.items()}, batch)
    rows = [
        {
            "name": name,
            "top1": top1(model, images),
            "macs": count_macs(model),
            "images_per_second": speed[name],
            "seconds": round(seconds),
            "token_schedule": getattr(model.config, "token_schedule", None),
        }
        for name, (model, seconds) in models.items()
    ]
    if options.latency_table is not None:
        add_latency(
            rows, {name: model for name, (model, _) in models.items()}, options.latency_table
        )
    table = [
        [
            "model, fraction of the budget",
            "top-1 %",
            "MMACs",
            "of dense",
            "speed, of dense",
            "made in s",
        ]
    ]
    table[0] += ["predicted ms", "ms", "of dense"] if options.latency_table else []
    for row in rows:
        fraction, ratio = (row[key] / rows[0][key] for key in ("macs", "images_per_second"))
        cells = [
            f"{row['top1']:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{fraction:.3f}",
            f"{ratio:.2f}",
            f"{row['seconds']}",
        ]
        if options.latency_table is not None:
            cells += [f"{row[key]:.2f}" for key in ("predicted_latency_ms", "latency_ms")]
            cells.append(f"{row['latency_ms'] / rows[0]['latency_ms']:.3f}")
        table.append([row["name"], *cells])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = {"rows": rows, "num_examples": len(images.dataset)} | provenance(options.seed, device)
    (options.output_dir / "results.json").write_text(
        json.dumps(results, indent=2) + "\n", encoding="utf-8"
    )
    (options.output_dir / "table.md").write_text(markdown_table(table) + "\n", encoding="utf-8")
    draw(rows, options.output_dir / "plot.png")


if __name__ == "__main__":
    main()
