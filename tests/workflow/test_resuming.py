"""A whole run that is cut short and continued: in the search, in finetuning, by a failure, a kill
or a signal."""

import json
import os
import re
import shutil
import signal

import pytest
from runs import QUICK, places, run_code, run_search
from transformers import TrainerCallback

from ofb_hf import ViTBiMaskConfig, cli
from ofb_hf.training.classifier import ClassifierTrainer
from ofb_hf.training.history import read_history
from ofb_hf.training.interruption import TrainingInterrupted
from ofb_hf.workflow import output as output_folder
from ofb_hf.workflow import results as results_workflow
from ofb_hf.workflow import search as workflow
from ofb_hf.workflow.run import Run


@pytest.mark.slow
def test_failed_run_is_marked_and_can_be_resumed(checkpoint, images, tmp_path, monkeypatch):
    output = tmp_path / "out"

    def interrupted(*args):
        raise RuntimeError("the power went")

    flags = ["--save_strategy", "steps", "--save_steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finetune", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, output, *flags)
    assert "the power went" in (output / "FAILED.txt").read_text()
    assert not (output / "model.safetensors").exists()

    searched = (output / "search" / "model" / "model.safetensors").read_bytes()
    results = run_search(checkpoint, images, output, *flags, "--resume_from_checkpoint", "auto")
    assert not (output / "FAILED.txt").exists()
    assert (output / "search" / "model" / "model.safetensors").read_bytes() == searched
    assert [row["phase"] for row in read_history(output / "search_history.jsonl")] == [
        "search"
    ] * 16 + ["finetune"] * 3
    assert results["finetuned"]["macs"] <= results["target_macs"]


@pytest.mark.slow
def test_killed_search_resumes_to_the_same_weights_with_random_augmentation(
    checkpoint, images, tmp_path
):
    """Killed for real, in the middle of an epoch, while the loader has fetched ahead."""
    flags = ["--save_strategy", "steps", "--save_steps", "5", "--per_device_train_batch_size", "4"]
    run_search(checkpoint, images, tmp_path / "straight", *flags)
    script = (
        "import os, sys; from transformers import TrainerCallback; from ofb_hf import cli, "
        "callbacks\n"
        "class Kill(callbacks.SearchCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        super().on_step_begin(args, state, control, **kwargs)\n"
        "        if state.global_step == 8: os._exit(9)\n"
        "import ofb_hf.search.trainer; ofb_hf.search.trainer.SearchCallback = Kill\n"
        "import torch; torch.set_num_threads(1)\n"
        "cli.search(sys.argv[1:])"
    )
    cut = tmp_path / "cut"
    settings = [*places(checkpoint, images, cut), *QUICK]
    settings += ["--max_steps", "16", "--finetune_max_steps", "3", *flags]
    status, said = run_code(tmp_path, script, *settings)
    assert status == 9, said
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


DENSE = ["--dense_epochs", "2", "--dense_learning_rate", "1e-3", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def straight_swin(swin_checkpoint, images, tmp_path_factory):
    """Output folder of a whole run that nothing disturbed."""
    output = tmp_path_factory.mktemp("straight") / "out"
    run_search(swin_checkpoint, images, output, *DENSE)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "step"), [("dense_training", 4), ("search", 13), ("search", 16), ("finetune", 3)]
)
def test_a_terminated_run_goes_on_in_the_phase_it_was_in(
    swin_checkpoint, images, straight_swin, tmp_path, monkeypatch, phase, step
):
    cut, original = tmp_path / "cut", ClassifierTrainer.__init__

    def with_a_signal(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Terminates(phase, step))

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "__init__", with_a_signal)
        with pytest.raises(TrainingInterrupted) as stopped:
            run_search(swin_checkpoint, images, cut, *DENSE)
    assert stopped.value.code == 143
    assert (cut / phase / f"checkpoint-{step}").is_dir()
    assert f"stopped by SIGTERM after step {step}" in (cut / "FAILED.txt").read_text()
    run_search(swin_checkpoint, images, cut, *DENSE, "--resume_from_checkpoint", "auto")
    for name in ("subnet.json", "search/model/model.safetensors", "model.safetensors"):
        assert (cut / name).read_bytes() == (straight_swin / name).read_bytes(), name
    assert not (cut / "FAILED.txt").exists()


def finetune(checkpoint, images, output, *flags):
    """Six steps of the finetuning command, two epochs."""
    settings = places(checkpoint, images, output)
    return cli.finetune([*settings, *QUICK, "--max_steps", "6", *flags])


@pytest.mark.slow
def test_finetuning_a_stock_model_resumes_in_the_middle_of_an_epoch(
    checkpoint, images, tmp_path, monkeypatch
):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    finetune(checkpoint, images, straight)
    original = ClassifierTrainer.__init__

    def with_a_signal(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Terminates("cut", 4))

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "__init__", with_a_signal)
        with pytest.raises(TrainingInterrupted):
            finetune(checkpoint, images, cut)
    finetune(checkpoint, images, cut, "--resume_from_checkpoint", "auto")
    assert [row["step"] for row in read_history(cut / "search_history.jsonl")] == [*range(1, 7)]
    assert json.loads((cut / "eval_results.json").read_text())["steps"] == {"finetune": 6}
    assert (cut / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stopped(checkpoint, images, tmp_path_factory):
    """Output folder of a run that failed after its search, with checkpoints of step 8 and 16."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Run,
            "finetune",
            lambda *args: (_ for _ in ()).throw(RuntimeError("the power went")),
        )
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, output, "--save_strategy", "steps", "--save_steps", "8")
    return output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_macs", "0.3"], r"target_macs': \(0\.5, 0\.3\)"),
        (["--head_candidates", "1", "5"], r"head_candidates': \("),
        (["--weight_decay", "0.1"], r"weight_decay': \(0\.0, 0\.1\)"),
        (["--bf16"], r"mixed_precision': \('no', 'bf16'\)"),
        (["--optim", "adamw_torch"], r"optim': \('adamw_torch_fused', 'adamw_torch'\)"),
        (["--data_seed", "5"], r"data_seed': \(None, 5\)"),
        (["--finetune_learning_rate", "1e-3"], r"finetune_learning_rate': \("),
        (["--finetune_max_steps", "9"], r"finetune_max_steps': \(3, 9\)"),
        (
            ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
            r"per_device_train_batch_size': \(8, 4\)",
        ),
        (["--lr_scheduler_type", "cosine"], r"lr_scheduler_type': \('linear', 'cosine'\)"),
        (["--warmup_steps", "3"], r"warmup_steps': \(0, 3"),
        (["--distillation_weight", "0.5"], r"distillation_weight': \(None, 0\.5\)"),
        (["--ema_decay", "0.9"], r"ema_decay': \(None, 0\.9\)"),
        (["--gradient_accumulation_steps", "2"], r"total_train_batch_size': \(8, 16\)"),
        (["--augmentation", "none"], r"augmentation': \('auto', 'none'\)"),
    ],
)
def test_resuming_with_other_settings_is_refused_before_any_data_is_read(
    checkpoint, images, stopped, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(workflow, "load_to_train", lambda *args: pytest.fail("data was read"))
    with pytest.raises(SystemExit) as refusal:
        run_search(checkpoint, images, stopped, "--resume_from_checkpoint", "auto", *flags)
    assert refusal.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_resuming_from_a_checkpoint_of_elsewhere_is_refused(
    checkpoint, images, stopped, tmp_path, capsys
):
    done = stopped / "search" / "checkpoint-8"
    for output, message in (
        (stopped, "belongs to a phase of the run that is finished"),
        (tmp_path, "no checkpoint of"),
    ):
        with pytest.raises(SystemExit) as refusal:
            run_search(checkpoint, images, output, "--resume_from_checkpoint", str(done))
        assert refusal.value.code == 2
        assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_checkpoint_may_be_named(checkpoint, images, stopped, tmp_path):
    copy, straight = shutil.copytree(stopped, tmp_path / "copy"), tmp_path / "straight"
    shutil.rmtree(copy / "search" / "model")
    run_search(checkpoint, images, straight)
    run_search(
        checkpoint, images, copy, "--resume_from_checkpoint", str(copy / "search" / "checkpoint-8")
    )
    assert (copy / "model.safetensors").read_bytes() == (
        straight / "model.safetensors"
    ).read_bytes()


def test_going_on_with_another_number_of_processes_is_said(stopped, caplog, monkeypatch):
    monkeypatch.setattr(output_folder.logger, "propagate", True)
    settings = json.loads((stopped / "run_settings.json").read_text())
    two = settings | {"num_processes": 2, "per_device_train_batch_size": 4}
    output_folder._check_settings(stopped, two)
    assert re.search(
        r"another number of processes.*'num_processes': \(1, 2\).*\(8, 4\)", caplog.text
    )
    with pytest.raises(ValueError, match=r"total_train_batch_size': \(8, 16\)"):
        output_folder._check_settings(stopped, two | {"total_train_batch_size": 16})


def test_the_settings_of_a_run_of_version_0_1_are_understood(tmp_path):
    """It called its default preset "ours", and had fields that have been removed."""
    settings = ViTBiMaskConfig(preset="bi_mask").to_dict()
    file = tmp_path / "run_settings.json"
    earlier = {"preset": "ours", "importance_from": "first_order", "budget_ramp": 0.0}
    file.write_text(json.dumps(settings | earlier))
    output_folder._check_settings(tmp_path, settings)
    with pytest.raises(ValueError, match=r"other settings.*'preset': \('bi_mask', 'paper'\)"):
        output_folder._check_settings(tmp_path, settings | {"preset": "paper"})
    file.write_text(json.dumps(settings | earlier | {"budget_ramp": 0.4}))
    with pytest.raises(ValueError, match=r"budget_ramp is 0\.4, but version 0\.2 removed"):
        output_folder._check_settings(tmp_path, settings)


def test_precision_that_a_launcher_sets_is_compared(
    checkpoint, images, stopped, capsys, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SystemExit):
        run_search(checkpoint, images, stopped, "--resume_from_checkpoint", "auto")
    assert "mixed_precision': ('no', 'bf16')" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["search", "finetune"])
def test_what_is_trained_is_kept_when_the_measuring_is_cut_short(
    checkpoint, images, tmp_path, monkeypatch, command
):
    steps = []
    run = run_search if command == "search" else finetune
    original = ClassifierTrainer.training_step

    def count(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ClassifierTrainer, "training_step", count)
    with monkeypatch.context() as patch:
        patch.setattr(
            results_workflow, "measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, images, tmp_path / "cut", "--save_strategy", "no")
    trained = len(steps)
    assert trained
    run(
        checkpoint,
        images,
        tmp_path / "cut",
        "--save_strategy",
        "no",
        "--resume_from_checkpoint",
        "auto",
    )
    assert len(steps) == trained
    run(checkpoint, images, tmp_path / "straight", "--save_strategy", "no")
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
