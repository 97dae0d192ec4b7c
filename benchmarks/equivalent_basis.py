"""Measure what an equivalent basis is worth: accuracy of a one-shot cut, with nothing trained.

A classifier is pruned in one shot by first-order scores (`baselines.pruned_subnet`) in the basis it
was given and in equivalent ones: of its heads, of its residual stream, of both. Labels of the
calibration images are drawn from the network itself, so no true label is used. The layers that
write into the residual stream are then fitted by least squares (`pruning/compensation.py`).

    python benchmarks/equivalent_basis.py --model vit-cifar10 --data_dir cifar10
"""

import argparse
import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ofb_hf import count_macs
from ofb_hf.choice import baselines
from ofb_hf.data import DataArguments
from ofb_hf.families.registry import family_of
from ofb_hf.pruning.compensation import compensate_
from ofb_hf.pruning.equivalent_basis import equivalent_basis
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.configuration import default_config
from ofb_hf.workflow.inputs import load
from ofb_hf.workflow.report import markdown_table

HEAD = ["basis", "fraction of the MACs", "top-1 % cut", "top-1 % fitted"]
# Images whose gradients are added up before they are squared.
OBSERVED_TOGETHER = 8
EVALUATED_TOGETHER = 250


@torch.no_grad()
def accuracy(model: PreTrainedModel, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent."""
    model.eval()
    correct = 0
    for some, wanted in zip(
        images.split(EVALUATED_TOGETHER), labels.split(EVALUATED_TOGETHER), strict=True
    ):
        correct += int((model(pixel_values=some).logits.argmax(-1) == wanted).sum())
    return 100 * correct / len(labels)


@torch.no_grad()
def drawn_labels(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Return one label for each image, drawn from what the model predicts."""
    predicted = [model(pixel_values=some).logits.softmax(-1) for some in images.split(64)]
    generator = torch.Generator().manual_seed(1)
    return torch.multinomial(torch.cat(predicted), 1, generator=generator)[:, 0]


def rows_of(
    name: str,
    model: PreTrainedModel,
    calibration: Tensor,
    labels: Tensor,
    images: Tensor,
    answers: Tensor,
    fractions: list[float],
) -> list[list[str]]:
    """Return the rows of one basis: each budget after the cut and after the fit."""
    batches = []
    for some, drawn in zip(
        calibration.split(OBSERVED_TOGETHER), labels.split(OBSERVED_TOGETHER), strict=True
    ):
        batches.append({"pixel_values": some, "labels": drawn})
    scores = baselines.taylor_scores(model, batches)
    rows = []
    for fraction in fractions:
        config = default_config(model.config, target_macs=fraction)
        subnet = baselines.pruned_subnet(model, config, scores)
        small = slice_model(model, subnet)
        cut = accuracy(small, images, answers)
        compensate_(small, model, subnet, calibration[:256])
        fitted = accuracy(small, images, answers)
        macs = count_macs(small) / count_macs(model)
        rows.append([name, f"{macs:.3f}", f"{cut:.2f}", f"{fitted:.2f}"])
    return rows


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint of a classifier")
    parser.add_argument("--data_dir", required=True, help="class folders with its images")
    parser.add_argument(
        "--fractions",
        nargs="+",
        type=float,
        default=[0.5, 0.3, 0.2, 0.12],
        help="budgets as fractions of the MACs",
    )
    parser.add_argument("--num_images", type=int, default=512, help="calibration images")
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration images")
    wanted = parser.parse_args()
    data = DataArguments(data_dir=wanted.data_dir, max_eval_samples=wanted.max_eval_samples)
    dense, inputs = load(wanted.model, data, 0)
    order = torch.randperm(len(inputs.train), generator=torch.Generator().manual_seed(wanted.seed))
    chosen = [inputs.train[int(index)] for index in order[: wanted.num_images]]
    calibration = torch.stack([row["pixel_values"] for row in chosen])
    evaluated = [inputs.eval[index] for index in range(len(inputs.eval))]
    images = torch.stack([row["pixel_values"] for row in evaluated])
    answers = torch.tensor([row["labels"] for row in evaluated])
    labels = drawn_labels(dense.eval(), calibration)
    batches = calibration.split(64)
    models = {
        "given": family_of(dense.config).from_dense(dense),
        "heads": equivalent_basis(dense, batches, streams=False),
        "residual stream": equivalent_basis(dense, batches, heads=False),
        "heads and residual stream": equivalent_basis(dense, batches),
    }
    rows = []
    for name, model in models.items():
        rows.append([name, "1.000", "", f"{accuracy(model, images, answers):.2f}"])
        rows += rows_of(name, model, calibration, labels, images, answers, wanted.fractions)
    sys.stdout.write(markdown_table([HEAD, *rows]) + "\n")


if __name__ == "__main__":
    main()
