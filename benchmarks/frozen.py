"""Compare ways to compress a classifier without training: one checkpoint, same images and budgets.

    dense           the given classifier
    compress        `ofb_hf.frozen.compression`: basis, error curves, tokens, fit
    widths          the same without tokens
    one_shot        first-order scores and a fit of the layers that write into the residual stream
                    (`baselines.taylor_scores`, `compensate_`), in the given basis
    corp            the recipe of CORP (github.com/BOX-LEO/CORP): the same fraction of every MLP and
                    of all query and key channels, what is left fitted by ridge regression
    torch_pruning   torch-pruning's importance and pruner, if it is installed (ViT only)
    published       the token schedules of DiffRate, where there are some for the shape
    fixed_merging   the same number of tokens merged in every layer

No contestant sees a true label: labels are drawn from the network itself. Every finished row is a
line of a results file; run the command again to continue after an interruption.

    python benchmarks/frozen.py --model vit-cifar10 --data_dir cifar10 --output_dir runs/frozen \\
        --fractions 0.3 0.2 0.12 0.08 --seeds 0 1 2
"""

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ofb_hf import count_macs
from ofb_hf.choice import baselines
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.data import DataArguments
from ofb_hf.families.registry import describe, family_of
from ofb_hf.frozen.compression import FrozenCompressor, frozen_config
from ofb_hf.pruning.compensation import compensate_
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import default_config
from ofb_hf.tokens.published import PUBLISHED, published_schedule
from ofb_hf.tokens.schedules import fixed_rate_schedule
from ofb_hf.workflow.inputs import load
from ofb_hf.workflow.report import markdown_table

RESULTS = "results.jsonl"
CONTESTANTS = (
    "dense",
    "compress",
    "widths",
    "one_shot",
    "corp",
    "torch_pruning",
    "published",
    "fixed_merging",
)
BATCH = 16
EVALUATED_TOGETHER = 50
# Images whose gradients are added up before they are squared, and images of a one-shot fit.
OBSERVED_TOGETHER = 8
FITTED_IMAGES = 256


class Comparison:
    """What all contestants share: the checkpoint, calibration images, and what is measured.

    Args:
        model: name or folder of a classifier.
        data_dir: folder with its images.
        num_images: calibration images.
        seed: of their draw from the training split.
        max_eval_samples: images of the evaluation split, None = all.
        eval_crop_pct: as for `DataArguments`.
    """

    def __init__(
        self,
        model: str,
        data_dir: str,
        num_images: int,
        seed: int,
        max_eval_samples: int | None,
        eval_crop_pct: float | None,
    ):
        data = DataArguments(
            data_dir=data_dir,
            max_eval_samples=max_eval_samples,
            eval_crop_pct=eval_crop_pct,
        )
        self.dense, self.inputs = load(model, data, 0)
        self.dense.eval()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.inputs.train), generator=generator)[:num_images]
        # As the evaluated ones are prepared, not augmented.
        rows = self.inputs.train_plain
        chosen = [rows[int(index)]["pixel_values"] for index in order]
        self.images = torch.stack(chosen)
        self.batches = self.images.split(BATCH)
        self.seed = seed
        self._compressors: dict[bool, FrozenCompressor] = {}

    def compressor(self, tokens: bool) -> FrozenCompressor:
        """Return the compressor with or without a choice of tokens; it measures only once."""
        if tokens not in self._compressors:
            changes = {} if tokens else {"search_tokens": False}
            space = frozen_config(self.dense.config, **changes)
            self._compressors[tokens] = FrozenCompressor(
                self.dense, self.batches, space=space, seed=self.seed
            )
        return self._compressors[tokens]

    @torch.no_grad()
    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Return top-1 accuracy and agreement with the dense model in percent."""
        correct = same = images = 0
        for first in range(0, len(self.inputs.eval), EVALUATED_TOGETHER):
            last = min(first + EVALUATED_TOGETHER, len(self.inputs.eval))
            rows = [self.inputs.eval[index] for index in range(first, last)]
            pixels = torch.stack([row["pixel_values"] for row in rows])
            labels = torch.tensor([row["labels"] for row in rows])
            found = model.eval()(pixel_values=pixels).logits.argmax(-1)
            wanted = self.dense(pixel_values=pixels).logits.argmax(-1)
            correct += int((found == labels).sum())
            same += int((found == wanted).sum())
            images += len(rows)
        return {"top1": 100 * correct / images, "agreement": 100 * same / images}


def compressed(comparison: Comparison, fraction: float, tokens: bool) -> PreTrainedModel:
    """Return the network of this package's compression."""
    compressor = comparison.compressor(tokens)
    changes = {} if tokens else {"search_tokens": False}
    config = frozen_config(comparison.dense.config, target_macs=fraction, **changes)
    return compressor.compress(config).model


def one_shot(comparison: Comparison, fraction: float) -> PreTrainedModel:
    """Return the network that first-order scores choose, fitted."""
    dense = family_of(comparison.dense.config).from_dense(comparison.dense)
    generator = torch.Generator().manual_seed(comparison.seed)
    batches = []
    for images in comparison.images.split(OBSERVED_TOGETHER):
        with torch.no_grad():
            predicted = dense(pixel_values=images).logits.softmax(-1)
        labels = torch.multinomial(predicted, 1, generator=generator)[:, 0]
        batches.append({"pixel_values": images, "labels": labels})
    scores = baselines.taylor_scores(dense, batches)
    subnet = baselines.pruned_subnet(
        dense, default_config(dense.config, target_macs=fraction), scores
    )
    small = slice_model(dense, subnet)
    compensate_(small, dense, subnet, comparison.images[:FITTED_IMAGES])
    return small


def corp(comparison: Comparison, fraction: float) -> tuple[PreTrainedModel, float]:
    """Return the network of CORP's recipe, and its fraction of the MACs.

    Every MLP keeps the same fraction of its units, those whose contributions are largest, and its
    output layer is fitted by ridge regression. Queries and keys keep the same fraction of their
    channels, and the queries take the least-squares map that makes up for the others; values keep
    all. No class has such sizes, so what is cut is set to 0 and counted by hand.
    """
    model = family_of(comparison.dense.config).from_dense(comparison.dense).eval()
    architecture = describe(model.config)
    heads = family_of(model.config).bases(model.config).heads
    mlps = [each for each in architecture.submodules if each.kind == "mlp"]
    tokens = architecture.patch_grid[0] * architecture.patch_grid[1] + 1
    (width,) = architecture.sizes[architecture.first_width]
    dense = count_macs(model)

    def cost(share: float) -> float:
        left = dense
        for mlp in mlps:
            left -= 2 * tokens * width * (mlp.shape[0] - _kept(mlp.shape[0], share))
        for head in heads:
            cut = head.num_heads * (head.head_dim - _kept(head.head_dim, share))
            left -= 2 * tokens * width * cut + tokens**2 * cut
        return left / dense

    shares = [step / 128 for step in range(1, 129) if cost(step / 128) <= fraction]
    if not shares:
        raise UnreachableBudgetError(f"CORP's recipe ends at {cost(1 / 128):.3f}", 0)
    _cut_like_corp_(model, shares[-1], heads, mlps, comparison)
    return model, cost(shares[-1])


def _kept(units: int, share: float) -> int:
    return max(1, round(units * share))


@torch.no_grad()
def _cut_like_corp_(model: PreTrainedModel, share: float, heads, mlps, comparison) -> None:
    seen: dict[str, Tensor] = {}

    def remember(path: str, before: bool) -> Any:
        layer = model.get_submodule(path)
        if before:
            return layer.register_forward_pre_hook(lambda _, args: seen.update({path: args[0]}))
        return layer.register_forward_hook(lambda _, args, output: seen.update({path: output}))

    hooks = [remember(mlp.output, before=True) for mlp in mlps]
    hooks += [remember(path, before=False) for head in heads for path in (head.queries, head.keys)]
    sums: dict[Any, Tensor] = {}
    for images in comparison.batches:
        model(pixel_values=images)
        for mlp in mlps:
            rows = seen[mlp.output].flatten(0, -2).double()
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            sums[mlp.output] = sums.get(mlp.output, 0) + rows.mT @ rows
        for head in heads:
            for path in (head.queries, head.keys):
                rows = seen[path].unflatten(-1, (head.num_heads, head.head_dim)).double()
                if path == head.keys:
                    rows = rows - rows.mean(-3, keepdim=True)
                rows = rows.flatten(0, -3).transpose(0, 1)  # (H, rows, D)
                sums[path] = sums.get(path, 0) + rows.mT @ rows
    for hook in hooks:
        hook.remove()
    for mlp in mlps:
        layer, gram = model.get_submodule(mlp.output), sums[mlp.output]
        energy = gram.diagonal()[:-1] * layer.weight.double().square().sum(0)
        kept = energy.topk(_kept(mlp.shape[0], share)).indices.sort().values
        chosen = torch.cat([kept, torch.tensor([len(gram) - 1])])
        inner = gram[chosen][:, chosen]
        ridge = 1e-2 * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
        weight = torch.cat([layer.weight, layer.bias[:, None]], 1).double()
        # The change that makes up for the removed units, with the present weights as the start.
        missing = weight @ gram[:, chosen] - weight[:, chosen] @ inner
        fitted = weight[:, chosen] + torch.linalg.solve(inner + ridge, missing.mT).mT
        layer.weight.zero_()
        layer.weight[:, kept] = fitted[:, :-1].float()
        layer.bias.copy_(fitted[:, -1])
    for head in heads:
        queries, keys = model.get_submodule(head.queries), model.get_submodule(head.keys)
        of_queries, of_keys = sums[head.queries], sums[head.keys]
        energy = of_queries.diagonal(dim1=1, dim2=2) * of_keys.diagonal(dim1=1, dim2=2)
        for number in range(head.num_heads):
            kept = energy[number].topk(_kept(head.head_dim, share)).indices.sort().values
            first, second = of_queries[number], of_keys[number]
            level = 1e-6 * torch.eye(len(kept), dtype=first.dtype)
            first_inner = first[kept][:, kept]
            second_inner = second[kept][:, kept]
            left = torch.linalg.solve(first_inner + level * first_inner.trace(), first[kept])
            right = torch.linalg.solve(second_inner + level * second_inner.trace(), second[kept])
            between = left @ right.mT  # q k' is nearly q_S M k_S'
            rows = number * head.head_dim + torch.arange(head.head_dim)
            for layer, map_to in ((queries, between.mT), (keys, None)):
                for tensor in (layer.weight, layer.bias):
                    if tensor is None:
                        continue
                    part = tensor[rows[kept]].double()
                    tensor[rows] = 0
                    tensor[rows[kept]] = (part if map_to is None else map_to @ part).float()


def published(comparison: Comparison, fraction: float) -> PreTrainedModel:
    """Return the model under the largest published token schedule within the budget."""
    dense = comparison.dense
    family = family_of(dense.config)
    for gmacs in sorted(PUBLISHED.get(dense.config.hidden_size, {}), reverse=True):
        try:
            schedule = published_schedule(dense.config, gmacs)
        except ValueError as error:
            raise UnreachableBudgetError(str(error), 0) from error
        small = family.from_dense(dense, token_schedule=schedule)
        if count_macs(small) <= fraction * count_macs(dense):
            return small
    raise UnreachableBudgetError("no published schedule is small enough", 0)


def fixed_merging(comparison: Comparison, fraction: float) -> PreTrainedModel:
    """Return the model with the same number of tokens merged in every layer."""
    dense = comparison.dense
    schedule = fixed_rate_schedule(dense.config, int(fraction * count_macs(dense)))
    return family_of(dense.config).from_dense(dense, token_schedule=schedule)


def made_by(contestant: str, comparison: Comparison, fraction: float) -> tuple[Any, float | None]:
    """Return a contestant's network, and its MACs where they cannot be counted from it."""
    if contestant == "dense":
        return comparison.dense, None
    if contestant == "compress":
        return compressed(comparison, fraction, tokens=True), None
    if contestant == "widths":
        return compressed(comparison, fraction, tokens=False), None
    if contestant == "torch_pruning":
        from torch_pruning_contestant import prune

        config = default_config(comparison.dense.config, target_macs=fraction)
        return prune(comparison.dense, config), None
    if contestant == "corp":
        return corp(comparison, fraction)
    functions = {"one_shot": one_shot, "published": published, "fixed_merging": fixed_merging}
    return functions[contestant](comparison, fraction), None


def run(wanted: argparse.Namespace, results: Path) -> None:
    """Measure every row that the results file does not have yet."""
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    )
    for seed in wanted.seeds:
        comparison = None
        for contestant in wanted.contestants:
            for fraction in wanted.fractions:
                key = {"contestant": contestant, "fraction": fraction, "seed": seed}
                if any(key.items() <= row.items() for row in done):
                    continue
                comparison = comparison or Comparison(
                    wanted.model,
                    wanted.data_dir,
                    wanted.num_images,
                    seed,
                    wanted.max_eval_samples,
                    wanted.eval_crop_pct,
                )
                began = time.monotonic()
                try:
                    model, cost = made_by(contestant, comparison, fraction)
                except (UnreachableBudgetError, TypeError) as error:
                    row = key | {"refused": str(error)}
                else:
                    seconds = time.monotonic() - began
                    cost = cost or count_macs(model) / count_macs(comparison.dense)
                    row = key | {"macs": cost, "seconds": seconds} | comparison.evaluate(model)
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def table(results: Path) -> str:
    """Return the mean over seeds of each contestant at each budget, as Markdown."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    fractions = sorted({row["fraction"] for row in rows}, reverse=True)
    lines = [["top-1 % (agreement %) at", *(f"{fraction:g}" for fraction in fractions)]]
    for contestant in CONTESTANTS:
        cells = []
        for fraction in fractions:
            same = [
                row
                for row in rows
                if (row["contestant"], row["fraction"]) == (contestant, fraction) and "top1" in row
            ]
            if not same:
                cells.append("-")
                continue
            top1 = [row["top1"] for row in same]
            agreement = sum(row["agreement"] for row in same) / len(same)
            spread = f" to {max(top1):.2f}" if len(same) > 1 else ""
            cells.append(f"{min(top1):.2f}{spread} ({agreement:.1f})")
        if set(cells) != {"-"}:
            lines.append([contestant, *cells])
    return markdown_table(lines)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint of a classifier")
    parser.add_argument("--data_dir", required=True, help="folder with its images")
    parser.add_argument("--output_dir", required=True, help="folder of results.jsonl")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5], help="of the MACs")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--num_images", type=int, default=512, help="calibration images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="draws of these images")
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--eval_crop_pct", type=float, help="0.875: resize to 256, crop 224")
    wanted = parser.parse_args()
    if wanted.contestants is None:
        missing = set() if find_spec("torch_pruning") else {"torch_pruning"}
        wanted.contestants = [name for name in CONTESTANTS if name not in missing]
    folder = Path(wanted.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run(wanted, folder / RESULTS)
    sys.stdout.write(table(folder / RESULTS) + "\n")


if __name__ == "__main__":
    main()
