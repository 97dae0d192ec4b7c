"""A search in a process of its own: `search_process.py FOLDER OPTIONS`, also under torchrun or
accelerate launch.

OPTIONS is JSON: `family`, `config` (fields of the search config), `arguments` (training arguments),
`compare_ranks` (hash everything after every step), `leave_rebuild_out` (a DDP wrapper that is not
rebuilt), `shrink_at` (steps at which submodules lose their largest candidate), `loss_scale` (fp16
under this scale, as accelerate sets it up on a GPU). It resumes from the newest checkpoint in
FOLDER if there is one, says `step N` and `shrunk N` as it goes, and writes `result-RANK.json`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from factories import search_config, tiny_model
from runs import searcher
from torch import Tensor
from transformers import TrainerCallback

import ofb_hf.search.trainer
from ofb_hf import OFBTrainer, count_macs


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """sha256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(
            tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def everything(trainer: OFBTrainer) -> dict[str, Tensor]:
    """Parameters, buffers and optimizer state, by name."""
    tensors = dict(trainer.supernet.state_dict())
    for name, parameter in trainer.supernet.named_parameters():
        tensors |= {
            f"{name}/{key}": value
            for key, value in trainer.optimizer.state.get(parameter, {}).items()
        }
    return tensors


class Shrinks(TrainerCallback):
    """At each of its steps, the largest size of some submodule retires and goes, whatever the
    search thinks of it."""

    def __init__(self, steps: list[int]):
        self.steps, self.trainer = steps, None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        """Runs after the search's own callback."""
        if state.global_step in self.steps:
            masks = [
                mask for mask in self.trainer.supernet.bi_masks if mask.active_candidates[:-1].any()
            ]
            weak = torch.zeros_like(masks[-1].active_candidates)
            weak[-1] = True
            masks[-1].retire_(weak)
            self.trainer.shrink()


class Report(TrainerCallback):
    """Says where the search is, and compares the ranks if asked to."""

    def __init__(self, compare_ranks: bool):
        self.compare_ranks, self.trainer, self.steps = compare_ranks, None, []
        self.losses, self.random, self._macs = [], "", None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        """Runs after the search's own callback: shrinks of this step are done."""
        macs = count_macs(self.trainer.supernet.config)
        step = {"step": state.global_step, "macs": macs}
        if self.compare_ranks:
            everyone: list[Any] = [None] * args.world_size
            dist.all_gather_object(everyone, digest(everything(self.trainer)))
            names = sorted(set().union(*everyone))
            step["different"] = [
                n for n in names if any(rank.get(n) != everyone[0].get(n) for rank in everyone)
            ]
        self.steps.append(step)
        self.random = digest({"state": torch.get_rng_state()})["state"]
        if args.process_index == 0:
            sys.stdout.write(f"{'step' if macs == self._macs else 'shrunk'} {state.global_step}\n")
            sys.stdout.flush()
        self._macs = macs

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any):
        """Keeps the losses."""
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])


def main(folder: Path, options: dict[str, Any]) -> None:
    """Searches, and writes down what came out."""
    family = options.get("family", "vit")
    if options.get("leave_rebuild_out"):
        ofb_hf.search.trainer.rebuild_ddp_ = lambda wrapped: None
    report = Report(options.get("compare_ranks", False))
    config = search_config(family, **({"target_macs": 0.6} | options.get("config", {})))
    model = tiny_model(family, **options.get("model", {})).train()
    trainer = report.trainer = searcher(folder, config, model, **options.get("arguments", {}))
    if "loss_scale" in options:
        trainer.accelerator.native_amp, trainer.accelerator.state._mixed_precision = True, "fp16"
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=options["loss_scale"])
    hide = trainer.hidden_patches._draw
    hidden: list[str] = []

    def noted(batch_size: int, keep_ratio: float) -> tuple[Tensor, Tensor]:
        masked, repainted = hide(batch_size, keep_ratio)
        hidden.append(digest({"masked": masked})["masked"])
        return masked, repainted

    trainer.hidden_patches._draw = noted
    shrinks = Shrinks(options.get("shrink_at", []))
    shrinks.trainer = trainer
    trainer.add_callback(shrinks)
    trainer.add_callback(report)
    trainer.train(resume_from_checkpoint="auto")
    result = {
        "world_size": trainer.args.world_size,
        "subnet": json.loads(trainer.read_subnet().to_json()),
        "weights": hashlib.sha256(
            repr(digest(trainer.compress().state_dict())).encode()
        ).hexdigest(),
        "steps": report.steps,
        "losses": report.losses,
        "random": report.random,
        "hidden": hidden,
    }
    (folder / f"result-{trainer.args.process_index}.json").write_text(
        json.dumps(result), encoding="utf-8"
    )
    # Everything is said. Gloo's threads now and then abort an interpreter that shuts down, so this
    # one does not.
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
