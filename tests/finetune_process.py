"""Finetune a stock model twice on every rank of torchrun.

`finetune_process.py FOLDER` writes `result-RANK.json`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from factories import tiny_vit
from runs import arguments, rows
from search_process import digest

from ofb_hf import ClassifierTrainer

SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "ema_decay": 0.5,
    "learning_rate": 0.05,
}
SETTINGS |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
SETTINGS |= {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


class Watching(ClassifierTrainer):
    """Record which images it trains on: each has a value of its own in its corner."""

    seen: list[int]

    def training_losses(self, model: Any, pixel_values: torch.Tensor, labels: torch.Tensor):
        """Record the images of a micro-batch."""
        self.seen += pixel_values[:, 0, 0, 0].round().int().tolist()
        return super().training_losses(model, pixel_values, labels)


def main(folder: Path) -> None:
    """Train, and write which images this rank saw and which weights it has."""
    data = rows()
    for number, row in enumerate(data):
        row["pixel_values"][0, 0, 0] = number
    args = arguments(folder, **SETTINGS)
    trainer = Watching(tiny_vit().train(), args, train_dataset=data, eval_dataset=rows(8, seed=5))
    trainings = []
    for _ in range(2):
        trainer.seen = []
        trainer.train()
        best = trainer.state.best_model_checkpoint
        trainings.append(
            {"seen": trainer.seen, "best": best, "weights": digest(trainer.model.state_dict())}
        )
    result = {"world_size": args.world_size, "trainings": trainings}
    (folder / f"result-{args.process_index}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
