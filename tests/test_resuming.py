"""A whole run that is cut short and continued: in the search, in finetuning, by a failure, a kill or a signal."""

import os
import signal
import subprocess
import sys

import pytest
from runs import QUICK, walk
from transformers import TrainerCallback

from ofb_hf import cli
from ofb_hf.callbacks import read_history
from ofb_hf.distillation import DistillationTrainer
from ofb_hf.interruption import TrainingInterrupted
from ofb_hf.workflow import search as workflow


def test_failed_run_is_marked_and_can_be_resumed(checkpoint, images, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def interrupted(*args):
        raise RuntimeError("the power went")

    flags = ["--save_strategy", "steps", "--save_steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "finetune", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            walk(checkpoint, images, output, *flags)
    assert "the power went" in (output / "FAILED.txt").read_text()
    assert not (output / "model.safetensors").exists()

    searched = (output / "search" / "model" / "model.safetensors").read_bytes()
    results = walk(checkpoint, images, output, *flags, "--resume_from_checkpoint", "auto")
    assert not (output / "FAILED.txt").exists()
    assert (output / "search" / "model" / "model.safetensors").read_bytes() == searched
    assert [row["phase"] for row in read_history(output / "search_history.jsonl")] == ["search"] * 16 + ["finetune"] * 3
    assert results["finetuned"]["macs"] <= results["target_macs"]


def test_killed_search_resumes_to_the_same_weights_with_random_augmentation(checkpoint, images, tmp_path):
    """Killed for real, in the middle of an epoch, while the loader has fetched ahead."""
    flags = ["--save_strategy", "steps", "--save_steps", "5", "--per_device_train_batch_size", "4"]
    walk(checkpoint, images, tmp_path / "straight", *flags)
    script = (
        "import os, sys; from transformers import TrainerCallback; from ofb_hf import cli, callbacks\n"
        "class Kill(callbacks.SearchCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        super().on_step_begin(args, state, control, **kwargs)\n"
        "        if state.global_step == 8: os._exit(9)\n"
        "import ofb_hf.trainer; ofb_hf.trainer.SearchCallback = Kill; import torch; torch.set_num_threads(1)\n"
        "cli.search(sys.argv[1:])"
    )
    cut = tmp_path / "cut"
    settings = ["--model_name_or_path", str(checkpoint), "--data_dir", str(images), "--output_dir", str(cut), *QUICK]
    settings += ["--max_steps", "16", "--finetune_max_steps", "3", *flags]
    killed = subprocess.run([sys.executable, "-c", script, *settings], capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert "killed" in (cut / "FAILED.txt").read_text()
    cli.search([*settings, "--resume_from_checkpoint", "auto"])
    for name in ("subnet.json", "search/model/model.safetensors", "model.safetensors"):
        assert (cut / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


class Terminates(TrainerCallback):
    """Sends SIGTERM to its own process in the middle of a step of one phase."""

    def __init__(self, phase, step):
        self.phase, self.step = phase, step

    def on_step_begin(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.phase) and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("phase", "step"), [("search", 13), ("finetune", 2)])
def test_a_terminated_run_goes_on_in_the_phase_it_was_in(swin_checkpoint, images, tmp_path, monkeypatch, phase, step):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    walk(swin_checkpoint, images, straight, "--save_strategy", "no")
    original = DistillationTrainer.__init__

    def with_a_signal(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Terminates(phase, step))

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "__init__", with_a_signal)
        with pytest.raises(TrainingInterrupted) as stopped:
            walk(swin_checkpoint, images, cut, "--save_strategy", "no")
    assert stopped.value.code == 143
    assert (cut / phase / f"checkpoint-{step}").is_dir()
    assert "has not finished" in (cut / "FAILED.txt").read_text()
    walk(swin_checkpoint, images, cut, "--save_strategy", "no", "--resume_from_checkpoint", "auto")
    for name in ("subnet.json", "search/model/model.safetensors", "model.safetensors"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes(), name
    assert not (cut / "FAILED.txt").exists()
