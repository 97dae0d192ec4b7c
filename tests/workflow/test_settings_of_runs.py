"""Settings of transformers in a whole run: they reach the measured results by no way round, or are
refused before anything is written; and what goes wrong inside of a run is one sentence."""

import json
import shutil

import pytest
import torch
from conftest import save_checkpoint
from factories import tiny_vit
from runs import QUICK, arguments, places, rows, run_search
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, TrainerCallback

from ofb_hf import cli
from ofb_hf.training.distillation import DistillationTrainer
from ofb_hf.workflow.measure import evaluate_classifier
from ofb_hf.workflow.run import Run

UNWANTED = {
    "dataloader_drop_last": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "batch_eval_metrics": True,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs", "loss"],
    "remove_unused_columns": True,
    "eval_accumulation_steps": 1,
}


@pytest.mark.parametrize("name", UNWANTED)
@pytest.mark.parametrize("batch_size", [5, 64])
def test_flags_of_a_training_do_not_reach_the_measured_accuracy(tmp_path, name, batch_size):
    model, images = tiny_vit(), rows(12)
    size = {"per_device_eval_batch_size": batch_size}
    plain = evaluate_classifier(model, images, arguments(tmp_path, **size))
    flagged = arguments(tmp_path, **size, **{name: UNWANTED[name]})
    assert evaluate_classifier(model, images, flagged) == plain
    assert plain[0]["num_examples"] == 12


def words(settings):
    """Return settings as flags."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def types(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize(
    "rounding", ["bf16_full_eval", pytest.param("fp16_full_eval", marks=pytest.mark.slow)]
)
def test_what_a_run_measures_and_writes_is_whole_whatever_its_evaluations_are(
    checkpoint, images, tmp_path, rounding
):
    flags = words(UNWANTED | {rounding: True, "per_device_eval_batch_size": 64})
    flags += ["--eval_strategy", "steps", "--eval_steps", "8", "--keep_dense"]
    results = run_search(checkpoint, images, tmp_path, *flags)
    assert results["finetuned"]["num_examples"] == results["dense"]["num_examples"] == 12
    assert types(tmp_path) == types(tmp_path / "dense") == {torch.float32}
    assert results["finetuned"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_a_measurement_in_half_precision_is_of_the_weights_as_they_are(checkpoint, images, capsys):
    place = ["--model_name_or_path", str(checkpoint), "--data_dir", str(images), "--use_cpu"]
    whole = cli.evaluate(place)
    half = cli.evaluate([*place, "--bf16_full_eval"])
    assert half["bytes"] == whole["bytes"]
    assert half["num_examples"] == 12


REFUSED = [
    (["--lr_scheduler_type", "cosine_with_min_lr"], "lr_scheduler_type is 'cosine_with_min_lr'"),
    (["--report_to", "smoke_signals"], "report_to is 'smoke_signals'"),
    (["--use_liger_kernel", "true"], "use_liger_kernel is True"),
    (["--metric_for_best_model", "f1"], "metric_for_best_model is 'f1'; an evaluation gives"),
    (["--label_names", "class"], "label_names is ['class']"),
    (["--learning_rate", "nan"], "learning_rate is nan"),
    (["--max_steps", "0"], "max_steps is 0"),
    (
        ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "64"],
        "24 training examples are too few",
    ),
]


@pytest.mark.parametrize("command", ["search", "search_tokens", "finetune"])
@pytest.mark.parametrize(("flags", "message"), REFUSED)
def test_what_a_training_would_refuse_is_refused_before_anything_is_written(
    checkpoint, images, tmp_path, capsys, command, flags, message
):
    place = places(checkpoint, images, tmp_path / "out")
    if command == "search_tokens":
        tiny_vit(num_hidden_layers=3).save_pretrained(tmp_path / "deep")
        shutil.copy(checkpoint / "preprocessor_config.json", tmp_path / "deep")
        place = places(tmp_path / "deep", images, tmp_path / "out")
        flags = [word for word in flags if word not in ("--learning_rate", "nan")] or [
            "--adam_epsilon",
            "nan",
        ]
        message = message.replace("learning_rate is", "adam_epsilon is")
    with pytest.raises(SystemExit) as stop:
        getattr(cli, command)([*place, *QUICK, *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--finetune_epochs", "-1"], ["--dense_epochs", "-1"], ["--dense_epochs", "nan"]]
)
def test_phases_of_no_possible_length_are_refused(checkpoint, images, tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        cli.search([*places(checkpoint, images, tmp_path / "out"), *QUICK, *flags])
    assert f"{flags[0]} is {float(flags[1])}; it must be finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["search", "finetune", "evaluate"])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_heads_without_a_softmax_are_refused_by_every_command(
    checkpoint, images, tmp_path, capsys, command, problem
):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    place = places(model, images, tmp_path / "out")
    if command == "evaluate":
        place = place[:4]
    with pytest.raises(SystemExit) as stop:
        getattr(cli, command)([*place, "--use_cpu"])
    assert stop.value.code == 2
    assert f"problem_type '{problem}'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_a_softmax_is_refused(checkpoint, images, tmp_path, capsys):
    teacher = shutil.copytree(checkpoint, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    config["problem_type"] = "multi_label_classification"
    (teacher / "config.json").write_text(json.dumps(config))
    place = places(checkpoint, images, tmp_path / "out")
    with pytest.raises(SystemExit):
        cli.finetune([*place, *QUICK, "--teacher_name_or_path", str(teacher)])
    assert "the teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=[torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def half_checkpoint(request, tmp_path):
    """A checkpoint in half precision, and its type."""
    folder = save_checkpoint("vit", tmp_path / "half")
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.to(request.param).save_pretrained(folder)
    return folder, request.param


def test_a_checkpoint_in_half_precision_is_trained_in_float32_and_stays_what_it_is(
    half_checkpoint, images, tmp_path, caplog
):
    folder, stored = half_checkpoint
    output = tmp_path / "out"
    results = run_search(folder, images, output, "--keep_dense")
    name = str(stored).removeprefix("torch.")
    assert f"weights are stored in {name}" in caplog.text
    # trained in float32, which a resumed run needs
    assert types(output / "finetune/model") == types(output / "search/model") == {torch.float32}
    # published and counted as it was given
    assert types(output) == types(output / "dense") == {stored}
    assert results["finetuned"]["bytes"] == (output / "model.safetensors").stat().st_size
    assert results["dense"]["bytes"] == (output / "dense/model.safetensors").stat().st_size
    again = cli.evaluate(["--model_name_or_path", str(output), "--data_dir", str(images)])
    for what in ("top1", "top5", "macs", "params", "bytes"):
        assert again[what] == results["finetuned"][what]


# ------------------------------------------------------------------------- errors inside of a run


def test_an_error_inside_of_a_run_is_one_sentence(checkpoint, images, tmp_path, capsys):
    place = places(checkpoint, images, tmp_path / "out")
    too_fast = [*QUICK, "--max_steps", "4", "--learning_rate", "1e38"]
    with pytest.raises(SystemExit) as stop:
        cli.finetune([*place, *too_fast])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: the loss is not finite after optimizer step")
    assert said.endswith("--traceback shows where this was raised.)")
    assert "FloatingPointError" in (tmp_path / "out/FAILED.txt").read_text(encoding="utf-8")
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        cli.finetune([*place, *too_fast, "--overwrite_output_dir", "--traceback"])


def test_the_traceback_of_a_refusal_is_shown_on_request(checkpoint, tmp_path):
    words = ["--model_name_or_path", str(checkpoint), "--data_dir", str(tmp_path / "missing")]
    with pytest.raises(ValueError, match="missing"):
        cli.evaluate([*words, "--traceback"])


def test_a_fault_of_the_code_keeps_its_traceback(checkpoint, images, tmp_path, monkeypatch):
    def faulty(*args, **kwargs):
        raise KeyError("no setting's fault")

    monkeypatch.setattr(DistillationTrainer, "train", faulty)
    with pytest.raises(KeyError, match="no setting"):
        cli.finetune([*places(checkpoint, images, tmp_path / "out"), *QUICK])


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ValueError("image 7 of the split is broken; mend it.")


def test_a_workers_error_is_the_sentence_that_it_raised(capsys):
    with pytest.raises(SystemExit), cli.exit_with_message([]):
        list(DataLoader(Broken(), num_workers=1))
    assert capsys.readouterr().err == "error: image 7 of the split is broken; mend it.\n"


def test_the_traceback_is_no_setting_of_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("traceback: true\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.search(["--model_name_or_path", str(checkpoint), "--config", str(file)])
    assert "unknown setting --traceback" in capsys.readouterr().err


class StopAtOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
        return control


def test_a_phase_that_ends_early_marks_the_run(checkpoint, images, tmp_path, monkeypatch, capsys):
    datasets = Run.datasets
    monkeypatch.setattr(Run, "datasets", lambda run: datasets(run) | {"callbacks": [StopAtOnce()]})
    with pytest.raises(SystemExit) as stop:
        run_search(checkpoint, images, tmp_path / "out")
    assert stop.value.code == 1
    assert "phase 'search': the training ended after step 1 of 16" in capsys.readouterr().err
    assert "ended after step 1" in (tmp_path / "out/FAILED.txt").read_text(encoding="utf-8")
    assert not (tmp_path / "out/README.md").exists()
