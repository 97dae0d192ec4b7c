"""Run by test_distributed.py under torchrun: a search that compares all ranks bit for bit after every step."""

import hashlib
import json
import os
import sys

import torch.distributed as dist
from test_trainer import searcher
from transformers import TrainerCallback

from ofb_hf import count_macs


class CompareRanks(TrainerCallback):
    """Collects, per step, the tensors that differ between ranks, and the size of the network."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        def digest(tensor):
            return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()

        tensors = kwargs["model"].state_dict()
        group = {id(p): name for name, p in kwargs["model"].named_parameters()}
        for parameter, moments in trainer.optimizer.state.items():
            tensors |= {f"{group[id(parameter)]}/{key}": value for key, value in moments.items()}
        everyone = [None] * args.world_size
        dist.all_gather_object(everyone, {name: digest(tensor) for name, tensor in tensors.items()})
        different = [name for name in everyone[0] if any(rank.get(name) != everyone[0][name] for rank in everyone)]
        self.steps.append({"different": different, "macs": count_macs(kwargs["model"].config)})


compare = CompareRanks()
trainer = searcher(sys.argv[1], gradient_accumulation_steps=2, max_steps=20)
trainer.add_callback(compare)
trainer.train()
if trainer.args.process_index == 0:
    sys.stdout.write(json.dumps({"world_size": trainer.args.world_size, "steps": compare.steps}) + "\n")
    sys.stdout.flush()
# Everything is said. Gloo's threads now and then abort an interpreter that shuts down, so this one does not.
dist.barrier()
dist.destroy_process_group()
os._exit(0)
