"""Stream in processes of their own: from the Hub that HF_ENDPOINT names, or on several ranks.

`stream_process.py epochs NAME:WORKERS ...` prints a line of JSON for each data set: its images, or
the error. `stream_process.py train SHARDS OUTPUT`, started on every rank, writes which images a
Trainer saw in a run without interruption and in a resumed one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pictures import noisy_number_of, number_of
from torch import nn
from transformers import Trainer, TrainingArguments

from ofb_hf.data import DataArguments, ImageStream, load_image_data
from ofb_hf.training.callbacks import EpochCallback

BATCH_SIZE = 5


class Recorder(Trainer):
    """A stock Trainer with the one method that streams need; it records its images."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Tensor] = []
        self.add_callback(EpochCallback(self.train_dataset))

    def get_train_dataloader(self):
        """Return the stream's loader, which accelerate must not prepare."""
        args = self.args
        return self.train_dataset.loader(
            self._train_batch_size,
            rank=args.process_index,
            world_size=args.world_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Record the images, and return any loss that depends on the model."""
        self.seen.append(inputs["pixel_values"].clone())
        loss = model(inputs["pixel_values"].float()).square().mean()
        return (loss, {}) if return_outputs else loss


def train(
    folder: Path, shards: Path, resume: str | None = None, **changes: Any
) -> list[torch.Tensor]:
    """Return the images of three epochs: two batches a step, a checkpoint every five steps."""
    data = load_image_data(DataArguments(data_dir=str(shards), streaming=True, shuffle_buffer=8))
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 2,
    }
    settings |= {"save_steps": 5, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(folder), **(settings | changes))
    trainer = Recorder(
        nn.Linear(2, 1), args, train_dataset=ImageStream(data.train, noisy_number_of, seed=1)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.seen


def epoch(name: str, workers: int) -> dict[str, Any]:
    """Return the numbers of the images of one epoch, or the error."""
    try:
        data = load_image_data(DataArguments(dataset_name=name, streaming=True, shuffle_buffer=8))
        stream = ImageStream(data.train, number_of, seed=1)
        numbers = [
            batch["pixel_values"].tolist()
            for batch in stream.loader(BATCH_SIZE, num_workers=workers)
        ]
        return {"numbers": numbers, "labels": data.label_names, "eval": len(data.eval)}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "train":
        shards, output = map(Path, arguments)
        straight = train(output, shards)
        resumed = train(output, shards, str(output / "checkpoint-5"))
        rank = torch.distributed.get_rank()
        torch.save({"straight": straight, "resumed": resumed}, output / f"seen-{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    else:
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, 0.01))
        for argument in arguments:
            repository, _, count = argument.partition(":")
            print(json.dumps({"name": repository} | epoch(repository, int(count or 0))), flush=True)
