"""Compare a step of the search with a step of dense training: time, calls, saved bytes, memory.

A step is forward, backward and optimizer, as the Trainer runs them, on random images with random
weights. `dense` is the stock model with sdpa, trained on labels; `search` is the supernet with all
candidates active, hidden patches and all losses, without a teacher. The other rows are `search`
with one change. All steps take turns; the table gives medians over the rounds and ratios within a
round.

    python benchmarks/search_step.py --shape deit_small --batch 8
    python benchmarks/search_step.py --shape swin_tiny --batch 64 --bf16 --compile    # on a GPU
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ofb_hf import OFBTrainingArguments
from ofb_hf.models.shapes import SHAPES
from ofb_hf.search.supernet import Supernet
from ofb_hf.space.configuration import default_config
from ofb_hf.training.distillation import DistillationTrainer
from ofb_hf.workflow.inputs import load_classifier
from ofb_hf.workflow.trial import TrialSearch

HEAD = (
    "step",
    "seconds",
    "of dense",
    "(lowest, highest)",
    "aten calls",
    "MiB kept for backward",
    "MiB at the peak",
)


class Unread(dict):
    """Gate values that the losses read and the gated modules do not."""

    def __contains__(self, name: object) -> bool:
        return False

    def get(self, name: object, default: object = None) -> object:
        """Return the default for every name."""
        return default


class CountedCalls(TorchDispatchMode):
    """Count the operations that reach the kernels."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class DenseStep:
    """One step of training the stock model on labels."""

    def __init__(self, model: PreTrainedModel, args: OFBTrainingArguments):
        trainer = self.trainer = DistillationTrainer(model, args)
        trainer.create_optimizer()
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
        trainer.current_gradient_accumulation_steps = 1

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """Take a step and return its loss, as `TrialSearch.step` does."""
        loss = self.trainer.training_step(self.trainer.model_wrapped, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return loss


def silence(*names: str) -> Callable[[Supernet], None]:
    """Return a patch that makes methods of a supernet return zero."""

    def patch(supernet: Supernet) -> None:
        for name in names:
            owner = supernet.decisions if hasattr(supernet.decisions, name) else supernet
            patched = getattr(owner, name)
            if isinstance(patched, nn.Module):
                patched.forward = lambda *args: supernet.lam.new_zeros(())
            else:
                setattr(owner, name, lambda *args: supernet.lam.new_zeros(()))

    return patch


def fix_masks(supernet: Supernet) -> None:
    """Compute the bi-masks once and keep their values."""
    supernet.refresh_gates()
    values = {name: value.detach() for name, value in supernet._gate_store.values.items()}
    supernet.refresh_gates = lambda: supernet._gate_store.values.update(values)


def ignore_masks(supernet: Supernet) -> None:
    """Compute the bi-masks without multiplying any weight by them."""
    refresh = supernet.refresh_gates

    def refresh_unread() -> None:
        refresh()
        supernet._gate_store.values = Unread(supernet._gate_store.values)

    supernet.refresh_gates = refresh_unread


def go_back(trial: TrialSearch) -> None:
    """Return to the importance phase, in which gradients are only observed."""
    trial.trainer.state.global_step = 0
    trial.trainer.supernet.importance_known.fill_(False)
    trial.trainer.begin_search()


# Row -> change of the supernet.
WITHOUT: dict[str, Callable[[Supernet], None]] = {
    "without the one-hot loss": silence("one_hot_loss"),
    "without the expected costs": silence("sizes", "expected_cost", "expected_macs"),
    "without the importance penalty": silence("importance_penalty"),
    "with constant masks": fix_masks,
    "with unread masks": ignore_masks,
}


def contestants(
    shape: str, fraction: float, args: OFBTrainingArguments
) -> dict[str, DenseStep | TrialSearch]:
    """Build every row of the table."""

    def dense() -> PreTrainedModel:
        return load_classifier(shape, [str(label) for label in range(1000)], seed=0).train()

    def searching(**changes: object) -> TrialSearch:
        model = dense()
        changes = {"preset": "bi_mask"} | changes
        return TrialSearch(
            model, args, default_config(model.config, target_macs=fraction, **changes)
        )

    rows: dict[str, DenseStep | TrialSearch] = {
        "dense": DenseStep(dense(), args),
        "search": searching(),
    }
    rows["search, observing"] = searching()
    go_back(rows["search, observing"])
    rows["search, shrunk"] = searching()
    rows["search, shrunk"].settle()
    rows["without PMIM"] = searching(pmim=False)
    for name, patch in WITHOUT.items():
        rows[name] = searching()
        patch(rows[name].trainer.supernet)
    return rows


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors in a step, in addition to those at its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def saved_bytes(step: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward pass.

    Parameters and buffers do not count, and each storage counts once.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def calls(step: Callable[[], object]) -> int:
    """Return the number of operations of a step that reach the kernels."""
    with CountedCalls() as counted:
        step()
    return counted.calls


def seconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of one step until the device is done; on a CPU, CPU time."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    float(step())
    return clock() - began


def table(
    rows: dict[str, DenseStep | TrialSearch], batch: dict[str, Tensor], rounds: int, compiled: bool
) -> None:
    """Measure all steps and print the table."""
    steps = {name: lambda row=row: row.step(batch) for name, row in rows.items()}
    device = batch["labels"].device
    turns = [
        {name: seconds(step, device) for name, step in steps.items()} for _ in range(rounds + 1)
    ][1:]  # the first warms up
    sys.stdout.write(f"| {' | '.join(HEAD)} |\n| --- {'| ---: ' * (len(HEAD) - 1)}|\n")
    for name, step in steps.items():
        ratios = [turn[name] / turn["dense"] for turn in turns]
        cells = [
            name,
            f"{statistics.median(turn[name] for turn in turns):.3f}",
            f"{statistics.median(ratios):.3f}",
        ]
        cells.append(f"({min(ratios):.2f}, {max(ratios):.2f})")
        # Modes and hooks would compile everything again.
        cells.append("-" if compiled else f"{calls(step):,}")
        cells.append(
            "-" if compiled else f"{saved_bytes(step, rows[name].trainer.model) / 2**20:,.1f}"
        )
        cells.append(f"{peak(step, device) / 2**20:,.1f}")
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="deit_small")
    parser.add_argument(
        "--share", type=float, default=0.5, help="fraction of the MACs of the shrunk model"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "use_cpu": wanted.cpu or not torch.cuda.is_available(),
            "bf16": wanted.bf16,
            "report_to": [],
        }
        settings |= {"torch_compile": wanted.compile, "distillation_weight": 0.0}
        args = OFBTrainingArguments(
            folder, per_device_train_batch_size=wanted.batch, max_steps=1, **settings
        )
        rows = contestants(wanted.shape, wanted.share, args)
    table(rows, rows["search"].batch(wanted.batch), wanted.rounds, wanted.compile)


if __name__ == "__main__":
    main()
