"""Run small searches: in this process, or in processes that can be watched, stopped and killed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from factories import search_config, tiny_model

from ofb_hf import OFBTrainer, OFBTrainingArguments, cli

TESTS = Path(__file__).parent
STEPS = 24
# What a finished run leaves in its output folder.
PRODUCT = {
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "subnet.json",
    "search_history.jsonl",
    "search.png",
    "README.md",
    "eval_results.json",
}
QUICK = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true"]
QUICK += ["--logging_steps", "1", "--per_device_train_batch_size", "8"]


def rows(count: int = 32, seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """Return random images of 16 x 16 pixels with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return [
        {"pixel_values": image, "labels": index % classes} for index, image in enumerate(images)
    ]


def arguments(folder: str | Path, **changes: Any) -> OFBTrainingArguments:
    """Return training arguments of a short search on the CPU."""
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return OFBTrainingArguments(str(folder), **(settings | changes))


def searcher(
    folder, config=None, model=None, callbacks=None, family="vit", **changes
) -> OFBTrainer:
    """Return a trainer for a tiny model and a budget of 0.6; changes are training arguments."""
    return OFBTrainer(
        model if model is not None else tiny_model(family).train(),
        arguments(folder, **changes),
        config or search_config(family, target_macs=0.6),
        train_dataset=rows(),
        eval_dataset=rows(8, seed=5),
        callbacks=callbacks,
    )


def start_search(folder: Path, options: dict[str, Any], ranks: int = 1) -> warm.Process:
    """Start search_process.py on one or two ranks; lines and errors come through `stdout`."""
    return start("search_process.py", str(folder), json.dumps(options), ranks=ranks)


def start(script: str, *words: str, ranks: int = 1) -> warm.Process:
    """Start a script of this folder on one or two ranks."""
    return warm.start(TESTS / script, *words, ranks=ranks)


def run_fresh(
    script: Path, *words: str, environment: dict[str, str] | None = None, ranks: int = 1
) -> tuple[int, str]:
    """Run a script that has imported neither transformers nor this package yet, as a new
    interpreter would, but without waiting for torch; return its exit status and everything it
    said."""
    return finish(warm.start(script, *words, ranks=ranks, environment=environment, fresh=True))


def run_code(
    folder: Path, code: str, *words: str, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run code as `run_fresh` does, from a file that is written to a folder."""
    script = folder / "code.py"
    script.write_text(code, encoding="utf-8")
    return run_fresh(script, *words, environment=environment)


def finish(process: warm.Process, timeout: float = 300) -> tuple[int, str]:
    """Wait for a process and return its exit status and everything it said."""
    said, _ = process.communicate(timeout=timeout)
    return process.returncode, said


def results(folder: Path, ranks: int = 1) -> list[dict[str, Any]]:
    """Return what every rank of a finished search_process.py wrote down."""
    return [
        json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8"))
        for rank in range(ranks)
    ]


def places(model: str | Path, images: Path, output: Path) -> list[str]:
    """Return the flags of a command for a model, a folder of images and an output folder."""
    flags = ["--model_name_or_path", str(model), "--data_dir", str(images)]
    return [*flags, "--output_dir", str(output)]


def run_search(checkpoint: Path, images: Path, output: Path, *flags: str) -> dict[str, Any]:
    """Run the search command on a checkpoint and images: 16 steps, and 3 of finetuning."""
    settings = places(checkpoint, images, output)
    return cli.search([*settings, *QUICK, "--max_steps", "16", "--finetune_max_steps", "3", *flags])


def refused(capsys, *arguments: Any) -> str:
    """Return the last line of what `run_search` says when it refuses to start."""
    with pytest.raises(SystemExit) as stop:
        run_search(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message
