"""The settings under recipes/configs: known, reachable, complete, and run as they are written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer, Repository
from pictures import parquet, picture
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from ofb_hf import install_bi_masks
from ofb_hf.cli import SEARCH
from ofb_hf.models.shapes import SHAPES
from ofb_hf.search.rewriting import as_bi_masks
from ofb_hf.space.configuration import default_config
from ofb_hf.training.history import read_history
from ofb_hf.workflow.command_line import parse

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
SHAPE_OF = {
    "facebook/deit-small-patch16-224": "deit_small",
    "facebook/deit-base-patch16-224": "deit_base",
}
SHAPE_OF |= {"microsoft/swin-tiny-patch4-window7-224": "swin_tiny"}
IMAGENET = [f"class {number}" for number in range(1000)]


def test_there_is_a_file_and_a_twin_for_every_published_budget():
    names = {path.stem for path in CONFIGS}
    wanted = {"deit_small_1.1g", "deit_base_8.7g", "swin_tiny_2.6g"}
    assert names == wanted | {f"{name}_paper" for name in wanted}
    for name in wanted:
        default, paper = (
            yaml.safe_load((RECIPES / "configs" / f"{n}.yaml").read_text())
            for n in (name, f"{name}_paper")
        )
        assert (default["preset"], paper["preset"]) == ("default", "paper")
        same = (
            "model_name_or_path",
            "dataset_name",
            "streaming",
            "target_macs",
            "per_device_train_batch_size",
            "bf16",
        )
        assert {key: default[key] for key in same} == {key: paper[key] for key in same}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_are_known_and_their_budget_is_within_reach(path):
    words = ["--config", str(path), "--bf16", "false", "--use_cpu"]
    model_args, data_args, augmentation, config, finetuning, args = parse(SEARCH, words)
    assert (data_args.dataset_name, data_args.streaming) == ("ILSVRC/imagenet-1k", True)
    assert (data_args.augmentation, augmentation.repeated_augmentation) == ("deit", 3)
    assert finetuning.is_wanted
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 1024
    comment = path.read_text()
    assert "8 processes x 128 images = 1024" in comment
    assert f"--config recipes/configs/{path.name}" in comment
    with torch.device("meta"):
        shape = SHAPES[SHAPE_OF[model_args.model_name_or_path]].config(IMAGENET)
    model = AutoModelForImageClassification.from_config(shape)
    config = default_config(model.config, **config.to_dict())
    supernet = install_bi_masks(model, as_bi_masks(config, model.config))
    recipe = "search_swin.py" if model.config.model_type == "swin" else "search_deit.py"
    assert f"recipes/{recipe} " in comment
    assert supernet.target == config.target_macs
    assert 0.98 * supernet.target <= supernet.decisions.best_choice().cost <= supernet.target


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    # the error curves of a network of this size take minutes on a CPU
    [pytest.param("default", marks=pytest.mark.thorough), "bi_mask"],
)
def test_the_command_in_the_file_runs(preset, tmp_path):
    """DeiT-Small and 1,000 classes, from a Hub, in trial sizes."""
    torch.manual_seed(0)
    source = tmp_path / "deit"
    AutoModelForImageClassification.from_config(
        SHAPES["deit_small"].config(IMAGENET)
    ).save_pretrained(source)
    ViTImageProcessorPil().save_pretrained(source)
    train, test = (
        parquet([picture(n) for n in range(first, first + 12)], first, IMAGENET)
        for first in (0, 500)
    )
    data = {
        "data/train-00000-of-00001.parquet": train,
        "data/validation-00000-of-00001.parquet": test,
    }
    repositories = {
        "lab/imagenet": Repository(data),
        "facebook/deit-small-patch16-224": Repository(
            {file.name: file.read_bytes() for file in source.iterdir()}
        ),
    }
    output = tmp_path / "out"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [
        "--config_file",
        str(RECIPES / "accelerate" / "cpu.yaml"),
        str(RECIPES / "search_deit.py"),
    ]
    command += [
        "--config",
        str(RECIPES / "configs" / "deit_small_1.1g.yaml"),
        "--dataset_name",
        "lab/imagenet",
    ]
    command += [
        "--preset",
        preset,
        "--max_steps",
        "4",
        "--use_cpu",
        "--per_device_train_batch_size",
        "2",
        "--finetune_max_steps",
        "1",
    ]
    command += ["--max_eval_samples", "2", "--logging_steps", "1", "--dataloader_num_workers", "0"]
    with HubServer(repositories) as hub:
        process = subprocess.run(
            [*command, "--output_dir", str(output)],
            env=hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert process.returncode == 0, process.stderr[-5000:]
    results = json.loads((output / "eval_results.json").read_text())
    assert 0.98 * 1.1e9 <= results["finetuned"]["macs"] <= 1.1e9
    assert [row["phase"] for row in read_history(output / "search_history.jsonl")] == [
        "search"
    ] * 4 + ["finetune"]


def yaml_settings(folder, **settings):
    """Return the words that read these settings from a file."""
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path), "--model_name_or_path", "deit_tiny", "--data_dir", "photos"]


def test_the_command_line_may_turn_off_what_a_file_sets(tmp_path):
    words = yaml_settings(
        tmp_path, preset="bi_mask", pmim_weight=2.0, pmim_window=5, keep_ratio_end=0.6
    )
    _, _, _, config, _, _ = parse(SEARCH, [*words, "--pmim", "false", "--use_cpu"])
    assert not config.pmim
    assert config.pmim_window is None
    _, _, _, config, _, _ = parse(SEARCH, [*words, "--use_cpu"])
    assert config.pmim_window == 5


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    words = yaml_settings(tmp_path, pmim=False, pmim_window=5)
    with pytest.raises(ValueError, match="pmim_window is 5, but pmim is False"):
        parse(SEARCH, [*words, "--use_cpu"])
    words = yaml_settings(tmp_path, preset="bi_mask", pmim_weight=2.0)
    with pytest.raises(ValueError, match="pmim_window is 5, but pmim is False"):
        parse(SEARCH, [*words, "--pmim", "false", "--pmim_window", "5", "--use_cpu"])
