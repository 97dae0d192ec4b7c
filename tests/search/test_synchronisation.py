"""A step of the search never waits for the device: no value of a tensor there is read, and nothing
is copied to it while the host stands still.

The step runs on the meta device, which holds no data, and everything that would have to wait on a
GPU is written down.
"""

from contextlib import nullcontext

import pytest
import torch
from factories import search_config, settle_randomly_, tiny_model
from runs import arguments
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ofb_hf import OFBTrainingArguments
from ofb_hf.workflow.trial import TrialSearch

# Whole runs: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

META = torch.device("meta")
# Operations whose result, or whose shape of it, depends on values.
READING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "bincount",
    "_unique2",
    "unique_dim",
}
READING |= {"unique_consecutive", "multinomial", "_linalg_check_errors"}


class Waits(TorchDispatchMode):
    """Writes down which operations would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device == META for tensor in tensors):
            indices = (
                tree_leaves(args[1])
                if name.startswith(("index", "_index", "_unsafe_index"))
                else []
            )
            indices = [index for index in indices if isinstance(index, Tensor)]
            by_host_or_truth = any(
                index.device != META or index.dtype == torch.bool for index in indices
            )
            if name in READING or by_host_or_truth or str(func) == "aten.repeat_interleave.Tensor":
                self.found.append(name)
        if name in ("_to_copy", "copy_"):
            source, target = tensors[-1].device, kwargs.get("device") or tensors[0].device
            # To the device a copy may be queued; what comes from there is read sooner or later.
            queued = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            if (source == META) != (target == META) and not (queued and target == META):
                self.found.append(f"{name} {source} -> {target}")
        return func(*args, **kwargs)


class Uploads(TorchFunctionMode):
    """Writes down numbers of the host that become a tensor on the device, which is a copy that
    waits."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self.found.append("index from a list")
        elif func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and made.device == META:
            self.found.append(func.__name__)
        return made


def waits_of(trial, batch):
    """What would wait during a step, in order; the device being without data, the step may end at
    the first."""
    waits = Waits()
    with waits, Uploads(waits.found):
        try:
            trial.step(batch)
        except (RuntimeError, NotImplementedError):
            if not waits.found:
                raise
    return waits.found


def on_meta(trial, monkeypatch):
    """Moves a trial to the meta device. Returns a batch that is there as well."""
    trainer, batch = trial.trainer, trial.batch(3)
    trainer.supernet.refresh_gates()
    gates = trainer.supernet._gate_store
    trainer.supernet.to(META)
    if trainer.teacher is not None:
        trainer.teacher.to(META)
    gates.alive = {
        name: alive if alive is None else alive.to(META) for name, alive in gates.alive.items()
    }
    # Liveness is read when candidates retire, and known since.
    masks = trainer.supernet.bi_masks
    gates._versions = {mask.name: (id(mask.alive), mask.alive._version) for mask in masks}
    trainer.hidden_patches._sums = trainer.hidden_patches._sums.to(META)
    trainer.optimizer = None
    trainer.create_optimizer()
    monkeypatch.setattr(OFBTrainingArguments, "device", META)
    # On a CPU every loss is looked at; on other devices the first one, and those that are logged.
    monkeypatch.setattr(trainer, "_require_finite", lambda: None)
    # knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    return {name: tensor.to(META) for name, tensor in batch.items()}


def trial_of(family, tmp_path, **changes):
    """A trial of a tiny model; the fused optimizer knows no meta device."""
    args = arguments(tmp_path, optim="adamw_torch")
    return TrialSearch(tiny_model(family), args, search_config(family, target_macs=0.6, **changes))


def go_back(trial):
    """To the importance phase, in which gradients are only observed, where a search has one."""
    trial.trainer.state.global_step = 0
    trial.trainer.supernet.importance_known.fill_(False)
    trial.trainer.begin_search()


STAGES = {
    "importance is being found out": go_back,
    "everything in the race": lambda trial: None,
    "some units gone, but still there": lambda trial: settle_randomly_(
        trial.trainer.supernet, seed=1
    ),
    "settled and shrunk": lambda trial: trial.settle(),
}


SEARCHES = {
    "ours": {},
    "paper": {"preset": "paper"},
    "not all kinds": {"preset": "paper", "search_embedding": False, "search_mlp": False},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_step_waits_for_nothing(family, stage, search, tmp_path, monkeypatch):
    """Nor does the next one, because of what the first has forgotten."""
    trial = trial_of(family, tmp_path, **SEARCHES[search])
    STAGES[stage](trial)
    batch = on_meta(trial, monkeypatch)
    assert [waits_of(trial, batch), waits_of(trial, batch)] == [[], []]


INTRUDERS = {
    "_local_scalar_dense": [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x.sum()),
    ],
    "nonzero": [lambda x: (x > 0).nonzero()],
    "index": [
        lambda x: x[torch.tensor([0])],
        lambda x: x[x > 0],
        lambda x: x.flatten()[(x > 0).flatten()],
    ],
    "index from a list": [
        lambda x: x[[0, 1]],
        lambda x: x[..., [0]],
        lambda x: x.clone().__setitem__([0], 0.0),
    ],
    "index_put_": [
        lambda x: x.clone().index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.clone().index_put_((torch.tensor([0]),), x.new_zeros(())),
    ],
    "masked_select": [lambda x: x.masked_select(x > 0)],
    "equal": [lambda x: torch.equal(x, x)],
    "multinomial": [lambda x: torch.multinomial(x.flatten(), 1)],
    "_to_copy meta -> cpu": [lambda x: x.tolist(), lambda x: x.cpu()],
    "_to_copy cpu -> meta": [lambda x: torch.zeros(3).to(x.device)],
    "copy_ cpu -> meta": [lambda x: x.clone().copy_(torch.zeros(x.shape))],
    "new_tensor": [lambda x: x.new_tensor(1.0)],
    "tensor": [lambda x: torch.tensor([1.0], device=x.device)],
}
PLACES = {
    "forward": lambda trainer: (trainer.supernet, "refresh_gates"),
    "losses": lambda trainer: (trainer.supernet, "one_hot_loss"),
    "schedule": lambda trainer: (trainer, "begin_search_step"),
    "end of the step": lambda trainer: (trainer, "end_search_step"),
}


@pytest.mark.parametrize("name", INTRUDERS)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_waits_is_found(place, name, tmp_path, monkeypatch):
    for intruder in INTRUDERS[name]:
        with monkeypatch.context() as patch:
            trial = trial_of("vit", tmp_path)
            batch, (owner, method) = on_meta(trial, patch), PLACES[place](trial.trainer)
            original, alpha = getattr(owner, method), trial.trainer.supernet.bi_masks[0].alpha

            def intruded(*args, original=original, alpha=alpha, intruder=intruder):
                intruder(alpha.detach())
                return original(*args)

            patch.setattr(owner, method, intruded)
            assert name in waits_of(trial, batch)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the same where there is something to wait for"
)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_step_on_a_gpu_waits_for_nothing(family, tmp_path):
    args = arguments(tmp_path, use_cpu=False)
    trial = TrialSearch(tiny_model(family), args, search_config(family, target_macs=0.6))
    batch = trial.batch(3)
    trial.step(batch)  # libraries are set up, and the optimizer's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = trial.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)
