"""A search that writes down what it sees: `hub_search_process.py RECORDS STOP_AFTER FLAGS...`, also
under torchrun.

Runs recipes/search_deit.py with FLAGS. Every rank appends one line of JSON per batch of the search
to RECORDS/RANK.jsonl: numbers, read from the pixels, and labels of its images. STOP_AFTER, if not
0, is a step of the search during which rank 0 sends itself SIGTERM.
"""

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ofb_hf.training.distillation import DistillationTrainer
from ofb_hf.workflow import measure

RECIPE = Path(__file__).parent.parent / "recipes" / "search_deit.py"


def read_numbers(levels: Tensor) -> list[int]:
    """The numbers of images (B, 3, 16, 16) in uint8 levels: red and green hold them, all over the
    image."""
    digits = levels[:, :2].flatten(2).long()
    assert (digits == digits[:, :, :1]).all(), "an image's number was changed on the way"
    return (256 * digits[:, 0, 0] + digits[:, 1, 0]).tolist()


def watch(records: Path, stop_after: int) -> None:
    """Lets every trainer of this process write down the batches of the search."""
    original = DistillationTrainer.compute_loss

    def compute_loss(
        self: DistillationTrainer, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ):
        if model.training and self.args.output_dir.endswith("search"):
            line = {
                "numbers": read_numbers(inputs["pixel_values"]),
                "labels": inputs["labels"].tolist(),
            }
            with (records / f"{self.args.process_index}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.state.global_step == stop_after - 1 and self.args.process_index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, inputs, *args, **kwargs)

    DistillationTrainer.compute_loss = compute_loss


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
    # The client and the stream wait seconds before they ask a busy server again; what they do then
    # does not change.
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
    measure.SECONDS_PER_ROUND = 0.0  # images per second are of no interest here
    sys.argv = [str(RECIPE), *sys.argv[3:]]
    runpy.run_path(str(RECIPE), run_name="__main__")
