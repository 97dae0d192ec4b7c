"""Compress a tiny ViT on one or two ranks; write the result of each rank (see runs.start)."""

import sys
from pathlib import Path

import safetensors.torch
import torch
from accelerate import PartialState
from factories import tiny_images, tiny_model

from ofb_hf.frozen.compression import FrozenCompressor, frozen_config


def main(folder: str, family: str) -> None:
    """Write rank_N.safetensors and rank_N.json into the folder."""
    torch.use_deterministic_algorithms(True)
    state = PartialState(cpu=True)
    model = tiny_model(family)
    batches = tiny_images(40).split(8)
    compressor = FrozenCompressor(model, batches)
    result = compressor.compress(frozen_config(model.config, target_macs=0.4))
    name = Path(folder) / f"rank_{state.process_index}"
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in result.model.state_dict().items()},
        f"{name}.safetensors",
    )
    Path(f"{name}.json").write_text(result.subnet.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
