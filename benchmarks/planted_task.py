"""Check whether the search finds useless units: a ViT on digits with planted useless units.

In some attentions and MLPs only a random subset of the units is useful; the others are cut off from
the network during dense training (their output weights are held at zero), so a search that follows
the data must remove exactly these. The budget is slightly above the cost of the useful units.

    python benchmarks/planted_task.py --seeds 0 1 2 --presets default paper

With `--task blocks` two whole blocks of six add nothing, and the search may leave attentions and
MLPs out (`search_depth`): it must leave out both halves of these two blocks and no others.

    python benchmarks/planted_task.py --task blocks --seeds 0 1 2 3 4 --presets default
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from ofb_hf.cost.counting import count_macs
from ofb_hf.families.subnet import SubnetSpec
from ofb_hf.search.trainer import OFBTrainer
from ofb_hf.space.configuration import ViTBiMaskConfig
from ofb_hf.training.arguments import OFBTrainingArguments
from ofb_hf.training.distillation import DistillationTrainer

HEADS, HEAD_DIM, MLP, LAYERS, HIDDEN = 4, 16, 32, 4, 64
# Useful units of the planted submodules: (heads, channels per head) or MLP channels; 25 to 50 % of
# each.
PLANTED = {
    "layers.0.mlp": 16,
    "layers.1.attention": (2, 8),
    "layers.2.mlp": 8,
    "layers.3.attention": (2, 8),
}
# The task with useless blocks: of how many, and which; counted from 0.
BLOCKS, USELESS_BLOCKS = 6, (3, 5)
# The budget as a multiple of the cost of the useful units. Useless units that have any effect fill
# the rest of it.
SLACK = 1.02
FIGURES = ("useless_removed", "useful_kept", "dense_top1", "top1_after_cut")
LEARNING_RATE = 5e-4
PAPER_LEARNING_RATE = 1e-3


def digits(train: bool) -> list[dict]:
    """Return handwritten digits, one in five held out: {"pixel_values": (1, 8, 8), "labels"}."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    chosen = [i for i in range(len(labels)) if (i % 5 != 0) == train]
    return [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in chosen]


def plant(seed: int) -> SubnetSpec:
    """Choose the useful units of the planted submodules."""
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int, total: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    kept = {}
    for name, size in PLANTED.items():
        if isinstance(size, tuple):
            kept[name] = {head: pick(size[1], HEAD_DIM) for head in pick(size[0], HEADS)}
        else:
            kept[name] = pick(size, MLP)
    return SubnetSpec(kept)


def plant_blocks() -> SubnetSpec:
    """Return a subnet without any unit in attention and MLP of the useless blocks."""
    halves = {"attention": {}, "mlp": ()}
    return SubnetSpec(
        {
            f"layers.{block}.{half}": kept
            for block in USELESS_BLOCKS
            for half, kept in halves.items()
        }
    )


def useful_units(planted: SubnetSpec, name: str) -> set[int]:
    """Return the flat indices of the useful units of one planted submodule."""
    kept = planted.kept[name]
    if isinstance(kept, dict):
        return {
            head * HEAD_DIM + channel for head, channels in kept.items() for channel in channels
        }
    return set(kept)


class CutOff(TrainerCallback):
    """Keep useless units without effect while the dense model trains.

    MLP channels: their output weights are zero. Attention channels: output and query weights are
    zero, so they reach neither the output nor the attention map. The other weights stay random, so
    a search could make a unit useful again. If all units are useless, the output bias is zero, too.
    """

    def __init__(self, model: ViTForImageClassification, planted: SubnetSpec):
        self.model, self.planted = model, planted
        self.on_step_end()

    @torch.no_grad()
    def on_step_end(self, *args, **kwargs):
        """Set the weights back to zero."""
        self.disturb_(0.0)

    @torch.no_grad()
    def disturb_(self, fraction: float):
        """Replace the weights by noise, `fraction` times as strong as useful weights (0: zeros)."""
        # A generator of its own, so that training draws the same numbers with and without noise.
        noise = torch.Generator().manual_seed(0)
        for name in self.planted.kept:
            _, layer, kind = name.split(".")
            block = self.model.vit.layers[int(layer)]
            out = block.attention.o_proj if kind == "attention" else block.mlp.fc2
            useless = sorted(set(range(out.in_features)) - useful_units(self.planted, name))
            out.weight[:, useless] = (
                fraction
                * out.weight.std()
                * torch.randn(len(out.weight), len(useless), generator=noise)
            )
            if not self.planted.kept[name]:
                out.bias[:] = 0
            if kind == "attention":
                query = block.attention.q_proj
                query.weight[useless] = (
                    fraction
                    * query.weight.std()
                    * torch.randn(len(useless), query.in_features, generator=noise)
                )
                query.bias[useless] = 0


def augment(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Collate a batch; each image is slightly rotated, scaled, shifted and made noisy."""
    batch = plain(rows)
    pixels = batch["pixel_values"]
    jitter = 0.1 * torch.randn(len(pixels), 2, 3)
    theta = torch.eye(2, 3) + jitter
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels + 1, grid, align_corners=False) - 1
    batch["pixel_values"] = moved + 0.1 * torch.randn_like(moved)
    return batch


def plain(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Collate a batch without augmentation."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, rows: list[dict]) -> float:
    """Return top-1 accuracy in percent."""
    batch = plain(rows)
    predicted = model.eval()(batch["pixel_values"]).logits.argmax(-1)  # (B,)
    return 100 * (predicted == batch["labels"]).float().mean().item()


def arguments(folder: str, steps: int, seed: int, learning_rate: float) -> OFBTrainingArguments:
    """Return the training arguments of dense training and search."""
    return OFBTrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=100,
        label_smoothing_factor=0.1,
    )


def train_dense(
    planted: SubnetSpec, seed: int, steps: int, layers: int = LAYERS, noise: float = 0.0
) -> ViTForImageClassification:
    """Train the dense model; with `noise` its useless units have a small random effect."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        cut_off = CutOff(model, planted)
        trainer = DistillationTrainer(
            model,
            arguments(folder, steps, seed, 2e-3),
            train_dataset=digits(train=True),
            data_collator=augment,
            callbacks=[cut_off],
        )
        trainer.train()
    cut_off.disturb_(noise)
    return model


def run(
    preset: str,
    planted: SubnetSpec,
    model: ViTForImageClassification,
    seed: int,
    steps: int = 900,
    slack: float = SLACK,
    **overrides,
) -> dict:
    """Run one search and return its report: percentages of units, top-1 before and after."""
    needed = count_macs(model, planted)
    settings = {
        "search_embedding": False,
        "pmim": False,
        "target_macs": slack * needed / count_macs(model),
    }
    config = ViTBiMaskConfig(**({"preset": preset} | settings | overrides))
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        rate = PAPER_LEARNING_RATE if preset == "paper" else LEARNING_RATE
        args = arguments(folder, steps, seed, rate)
        trainer = OFBTrainer(
            model, args, config, train_dataset=digits(train=True), data_collator=augment
        )
        trainer.train()
    result = report(trainer, model, planted, digits(train=False))
    return result | {
        "preset": preset,
        "seed": seed,
        "target": config.target_macs,
        "seconds": round(time.time() - began),
    }


def in_given_order(kept: set[int], useful: set[int]) -> set[int]:
    """Return units of a rewritten attention as if its channels were still those of the given one.

    A rewritten head has mixed its channels: as many of them carry something as were useful, and
    these come first. So the first ones count as its useful ones.
    """
    units: set[int] = set()
    for head in range(HEADS):
        own = range(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        order = sorted(own, key=lambda unit: unit not in useful)
        units |= {order[unit - own.start] for unit in kept if unit in own}
    return units


def report(
    trainer: OFBTrainer, model: torch.nn.Module, planted: SubnetSpec, test: list[dict]
) -> dict:
    """Count the useful and useless units that a search kept and measure the compressed model."""
    kept_useful = 0
    kept_useless = 0
    useful_total = 0
    useless_total = 0
    sizes = {}
    masks = trainer.supernet.named_masks
    for name in planted.kept:
        useful = useful_units(planted, name)
        kept = set(masks[name].unit_ids.flatten().tolist())
        if name.endswith("attention") and trainer.bi_mask_config.basis != "given":
            kept = in_given_order(kept, useful)
        total = HEADS * HEAD_DIM if name.endswith("attention") else MLP
        kept_useful += len(kept & useful)
        kept_useless += len(kept - useful)
        useful_total += len(useful)
        useless_total += total - len(useful)
    for name, mask in masks.items():
        sizes[name] = tuple(mask.alive.shape)
    small = trainer.compress()
    return {
        "useless_removed": round(100 * (1 - kept_useless / useless_total), 1),
        "useful_kept": round(100 * kept_useful / useful_total, 1) if useful_total else 100.0,
        "left_out": [name for name, mask in masks.items() if not mask.alive.any()],
        "dense_top1": round(accuracy(model, test), 1),
        "top1_after_cut": round(accuracy(small, test), 1),
        "macs_share": round(count_macs(small) / count_macs(model), 4),
        "sizes": {name: list(size) for name, size in sizes.items()},
    }


def main() -> None:
    """Run all searches; print one line per search and one line of means per preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=["units", "blocks"], default="units")
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--dense_steps", type=int, default=1800)
    parser.add_argument("--search_steps", type=int, default=900)
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="strength of useless units relative to useful weights",
    )
    parser.add_argument(
        "--slack", type=float, default=SLACK, help="budget divided by the cost of the useful units"
    )
    args = parser.parse_args()
    logging.set_verbosity_error()
    rows = []
    for seed in args.seeds:
        blocks = args.task == "blocks"
        planted = plant_blocks() if blocks else plant(seed)
        with contextlib.redirect_stdout(io.StringIO()):
            model = train_dense(
                planted, seed, args.dense_steps, BLOCKS if blocks else LAYERS, args.noise
            )
        for preset in args.presets:
            with contextlib.redirect_stdout(io.StringIO()):
                rows.append(
                    run(
                        preset,
                        planted,
                        model,
                        seed,
                        args.search_steps,
                        args.slack,
                        search_depth=blocks,
                    )
                )
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    for preset in args.presets:
        mine = [row for row in rows if row["preset"] == preset]
        means = {key: sum(row[key] for row in mine) / len(mine) for key in FIGURES}
        sys.stdout.write(
            f"{preset}: " + ", ".join(f"{key} {value:.1f}" for key, value in means.items()) + "\n"
        )


if __name__ == "__main__":
    main()
