"""Whole commands as a user runs them: from a checkpoint and images to an output folder."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from factories import non_uniform_vit, tiny_vit
from huggingface_hub import ModelCard
from PIL import Image
from runs import PRODUCT, QUICK, places, refused, run_code, run_search
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline

import ofb_hf
from ofb_hf import SubnetSpec, cli, count_macs, count_params
from ofb_hf.data import DataArguments
from ofb_hf.release.card import render_card
from ofb_hf.training.history import HISTORY_FIELDS, read_history
from ofb_hf.workflow.command_line import DEMO_CONFIG, command_line, parse
from ofb_hf.workflow.inputs import load
from ofb_hf.workflow.measure import images_per_second, lost_classes
from ofb_hf.workflow.results import license_of

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(checkpoint, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "half"
    return output, run_search(checkpoint, images, output, "--target_macs", "0.5", "--keep_dense")


def test_output_folder_is_complete_and_consistent(finished):
    output, results = finished
    assert {path.name for path in output.iterdir()} >= PRODUCT
    assert not [path for path in output.rglob("*") if path.name.startswith(".incomplete")]
    assert not (output / "FAILED.txt").exists()
    assert json.loads((output / "eval_results.json").read_text()) == results

    model = AutoModelForImageClassification.from_pretrained(output)
    assert results["finetuned"]["macs"] == count_macs(model) <= results["target_macs"]
    assert results["finetuned"]["params"] == count_params(model)
    assert results["finetuned"]["bytes"] == (output / "model.safetensors").stat().st_size
    assert results["dense"]["bytes"] == (output / "dense" / "model.safetensors").stat().st_size
    for stage in ("dense", "searched", "finetuned"):
        assert set(results[stage]) == {
            "top1", "top5", "macs", "params", "bytes", "images_per_second", "num_examples",
        }  # fmt: skip
        assert results[stage]["num_examples"] == 12
        assert 0 <= results[stage]["top1"] <= results[stage]["top5"] == 100

    dense = AutoModelForImageClassification.from_pretrained(output / "dense")
    subnet = SubnetSpec.from_json((output / "subnet.json").read_text())
    assert count_macs(dense, subnet) == results["finetuned"]["macs"]

    history = read_history(output / "search_history.jsonl")
    assert [row["phase"] for row in history] == ["search"] * 16 + ["finetune"] * 3
    assert all(list(row) == HISTORY_FIELDS for row in history)
    with Image.open(output / "search.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(256)) > 10


def test_card_repeats_the_measured_numbers(finished):
    output, results = finished
    card = (output / "README.md").read_text()
    assert "$" not in card
    for stage in ("dense", "searched", "finetuned"):
        assert f"{results[stage]['top1']:.2f}" in card
        assert f"{results[stage]['params'] / 1e6:.4g}" in card
    assert f"{results['target_macs']:,} MACs" in card
    assert str(output.parent) not in card
    metadata = ModelCard(card).data
    in_card = {result.metric_type: result.metric_value for result in metadata.eval_results}
    assert in_card == {
        "accuracy": results["finetuned"]["top1"], "top_5_accuracy": results["finetuned"]["top5"],
    }  # fmt: skip
    assert results["source"]["model"] in card
    assert results["seconds"] >= 1
    assert results["steps"] == {"search": 16, "finetune": 3}
    assert "16 steps of search, 3 steps of finetuning" in card
    assert results["commit"] is None or results["commit"] in card


def test_weights_that_were_kept_are_on_record(checkpoint, images, tmp_path):
    output = tmp_path / "out"
    results = run_search(checkpoint, images, output, "--guard_images", "6", "--ema_decay", "0.5")
    assert results["kept_weights"].keys() == {"search", "finetune"}
    card = (output / "README.md").read_text()
    for report in results["kept_weights"].values():
        assert report["images"] == 6
        assert report["top1"].keys() == {"before", "after", "average"}
        assert f"those *{report['kept']}* were kept (top-1 on 6 held-out training images" in card


def test_bi_masks_leave_out_halves_one_after_the_other(checkpoint, images, tmp_path):
    flags = ["--target_macs", "0.15", "--search_depth", "--preset", "bi_mask"]
    results = run_search(checkpoint, images, tmp_path / "out", *flags)
    history = {
        row["step"]: row
        for row in read_history(tmp_path / "out" / "search_history.jsonl")
        if row["phase"] == "search"
    }
    assert results["left_out"]
    for name, step in results["left_out"].items():
        assert name in history[step]["left_out"]
        assert name not in history[step - 1].get("left_out", ())


def test_what_was_left_out_and_when_is_on_record(checkpoint, images, tmp_path):
    results = run_search(
        checkpoint, images, tmp_path / "out", "--target_macs", "0.15", "--search_depth"
    )
    subnet = SubnetSpec.from_json((tmp_path / "out" / "subnet.json").read_text())
    gone = {name for name, kept in subnet.kept.items() if not kept}
    assert results["left_out"].keys() == gone != set()
    first = read_history(tmp_path / "out" / "search_history.jsonl")[0]
    card = (tmp_path / "out" / "README.md").read_text()
    for name, step in results["left_out"].items():
        assert name in first["left_out"]
        assert step == 1  # error curves choose before it
        assert f"- `{name}`: removed (by step {step} of the search)" in card
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert count_macs(model) == results["finetuned"]["macs"] <= results["target_macs"]


def test_classes_that_lost_much_are_named(finished):
    assert lost_classes([90.0, 50.0, math.nan, 80.0], [79.0, 41.0, 3.0, 30.0], list("abcd")) == {
        "d": [80.0, 30.0], "a": [90.0, 79.0],
    }  # fmt: skip
    _, results = finished
    card = render_card(results | {"lost_classes": {"red": [75.0, 50.0]}}, SubnetSpec({}), "")
    assert "| red | 75.0 | 50.0 |" in card
    assert "No class lost" in render_card(results | {"lost_classes": {}}, SubnetSpec({}), "")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("eval_results.json", None, '{"top1": 1}', "has no results"),
        ("eval_results.json", None, "[]", "has no results"),
        ("eval_results.json", None, "{", "is no JSON"),
        ("README.md", r"value: [\d.]+", "value: 0.0 %", "has no numbers for"),
        ("README.md", "^---\n", "---\na: b: c\n", "cannot be read"),
    ],
)
def test_cards_that_cannot_be_read_are_refused_with_an_explanation(
    finished, images, tmp_path, capsys, name, old, new, message
):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    text = (copy / name).read_text()
    (copy / name).write_text(new if old is None else re.sub(old, new, text))
    with pytest.raises(SystemExit) as verdict:
        cli.verify([str(copy), "--data_dir", str(images), "--use_cpu", "--report_to", "none"])
    assert verdict.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (None, None),
        ("---\nlicense: mit\n---\n", "mit"),
        ("no metadata", None),
        ("---\nlicense: {name: mit}\n---\n", None),
        ("---\nlicense: mit\ndescription: fast: and small\n---\n", None),
        ("---\nhello world\n---\n", None),
        ("---\nlicense: mit\ntags: 5\neval_results: 3\n---\n", None),
        (b"---\nlicense: mit\n---\nna\xefve", None),
    ],
)
def test_the_licence_of_the_source_is_kept_where_it_can_be_read(tmp_path, card, license):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert license_of(str(tmp_path)) == license


def test_licences_that_the_hub_does_not_know_are_called_other(finished):
    _, results = finished
    for license, stated in (
        ("mit", {"license": "mit"}),
        ("mine", {"license": "other", "license_name": "mine"}),
    ):
        card = render_card(
            results | {"source": {"model": "a", "revision": None, "license": license}},
            SubnetSpec({}),
            "",
        )
        data = ModelCard(card).data.to_dict()
        assert {key: value for key, value in data.items() if key.startswith("license")} == stated


def test_a_card_is_verified_and_a_lie_is_found(finished, images, tmp_path, capsys):
    output, results = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    words = [str(copy), "--data_dir", str(images), "--use_cpu", "--report_to", "none"]
    cli.verify(words)
    assert "Everything is as the card says." in capsys.readouterr().out
    card, top1 = (copy / "README.md").read_text(), results["finetuned"]["top1"]
    (copy / "README.md").write_text(card.replace(f"value: {top1}", f"value: {top1 + 0.2}"))
    with pytest.raises(SystemExit) as verdict:
        cli.verify(words)
    assert verdict.value.code == 1
    assert re.search(r"top1 +README.md .*differs", capsys.readouterr().out)
    row = f"| after finetuning | {top1:.2f} |"
    assert row in card
    (copy / "README.md").write_text(card.replace(row, f"| after finetuning | {top1 + 0.2:.2f} |"))
    with pytest.raises(SystemExit) as verdict:
        cli.verify(words)
    assert verdict.value.code == 1
    assert re.search(r"row 'after finetuning' +README.md .*differs", capsys.readouterr().out)
    (copy / "README.md").write_text(card)
    with pytest.raises(SystemExit) as verdict:
        cli.verify([*words, "--max_eval_samples", "2"])
    assert verdict.value.code == 1
    assert re.search(r"num_examples +eval_results.json .*differs", capsys.readouterr().out)
    (copy / "README.md").unlink()
    with pytest.raises(SystemExit) as verdict:
        cli.verify(words)
    assert verdict.value.code == 2
    assert "has no README.md" in capsys.readouterr().err


def test_result_loads_in_a_fresh_process_bit_for_bit(finished, images, tmp_path):
    output, _ = finished
    picture = images / "test" / "red" / "0.png"
    here = pipeline("image-classification", str(output))(str(picture))
    code = (
        "import json, warnings; warnings.simplefilter('error'); import ofb_hf, torch; "
        "torch.set_num_threads(1);"
        "from transformers import AutoModel, pipeline;"
        f"AutoModel.from_pretrained({str(output)!r});"
        f"print(json.dumps(pipeline('image-classification', {str(output)!r})({str(picture)!r})))"
    )
    status, said = run_code(tmp_path, code)
    assert status == 0, said[-3000:]
    (answer,) = [line for line in said.splitlines() if line.startswith("[")]
    assert json.loads(answer) == here
    assert {row["label"] for row in here} == {"red", "green", "blue"}
    assert "not used" not in said
    assert "newly initialized" not in said


def test_finetune_and_evaluate_take_the_result(finished, images, tmp_path, capsys):
    output, results = finished
    shared = ["--data_dir", str(images), "--use_cpu", "--report_to", "none"]
    again = ["--model_name_or_path", str(output), "--teacher_name_or_path", str(output / "dense")]
    longer = cli.finetune(
        [*again, *shared, "--output_dir", str(tmp_path / "longer"), "--max_steps", "2"]
    )
    assert longer["dense"]["top1"] == results["finetuned"]["top1"]
    assert longer["finetuned"]["macs"] == results["finetuned"]["macs"]

    capsys.readouterr()
    measured = cli.evaluate(["--model_name_or_path", str(output), *shared])
    assert measured["top1"] == results["finetuned"]["top1"]
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{\n") :]) == measured


def test_search_on_a_parameter_budget_without_finetuning(checkpoint, images, tmp_path):
    results = run_search(
        checkpoint, images, tmp_path / "out", "--target_params", "0.6", "--finetune_max_steps", "0"
    )
    assert results["target_macs"] is None
    said = {
        "seed",
        "versions",
        "command",
        "commit",
        "hardware",
        "seconds",
        "source",
        "data",
        "lost_classes",
    }
    said |= {"steps", "left_out", "kept_weights"}
    assert set(results) == {"target_macs", "target_params", "dense", "searched"} | said
    assert (
        results["searched"]["params"]
        <= results["target_params"]
        <= 0.6 * results["dense"]["params"]
    )


@pytest.mark.parametrize(
    ("recipe", "folder"), [("search_deit", "demo"), ("search_swin", "demo_swin")]
)
def test_demonstration_path_at_a_tiny_size(tmp_path, monkeypatch, recipe, folder):
    """The recipe itself, in this process."""
    monkeypatch.chdir(tmp_path)
    flags = "--dense_epochs 1 --max_steps 12 --finetune_max_steps 2 --max_train_samples 96 "
    flags += "--max_eval_samples 24"
    monkeypatch.setattr(
        sys, "argv", [recipe, *flags.split(), "--disable_tqdm", "true", "--logging_steps", "2"]
    )
    runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    output = tmp_path / "runs" / folder
    results = json.loads((output / "eval_results.json").read_text())
    assert PRODUCT | {"dense"} <= {path.name for path in output.iterdir()}
    assert (
        0.49 * results["dense"]["macs"]
        <= results["finetuned"]["macs"]
        <= 0.5 * results["dense"]["macs"]
    )
    assert results["dense"]["num_examples"] == 24


def test_a_search_may_begin_where_halves_are_gone(images, tmp_path):
    """Pictures and reports included; what was gone before is not said to have gone in this
    search."""
    source = tmp_path / "gone"
    non_uniform_vit().save_pretrained(source)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(source)
    results = run_search(
        source, images, tmp_path / "out", "--target_macs", "0.6", "--finetune_max_steps", "0"
    )
    assert results["left_out"] == {}
    assert "removed" in (tmp_path / "out" / "README.md").read_text()


def test_short_runs_need_no_special_flags(checkpoint, images, tmp_path):
    """Fewer steps than a logging interval; a share of distillation, an average and evaluations on
    the way."""
    output = tmp_path / "out"
    flags = places(checkpoint, images, output)
    flags += [
        "--use_cpu",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--finetune_max_steps",
        "2",
    ]
    flags += ["--max_steps", "3", "--distillation_weight", "0.5", "--ema_decay", "0.9"]
    results = cli.search([*flags, "--eval_strategy", "steps", "--eval_steps", "2"])
    assert {path.name for path in output.iterdir()} >= PRODUCT
    history = read_history(output / "search_history.jsonl")
    assert [(row["phase"], row["step"]) for row in history] == [("search", 3), ("finetune", 2)]
    assert results["finetuned"]["macs"] <= results["target_macs"]


def test_average_of_the_weights_is_what_finetuning_keeps(finished, images, tmp_path):
    output, _ = finished
    flags = [*QUICK, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]
    finals = []
    for name, extra in (("raw", []), ("average", ["--ema_decay", "0.99"])):
        cli.finetune([*places(output, images, tmp_path / name), *flags, *extra])
        finals.append(AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict())
    raw, average = finals
    assert not torch.equal(raw["classifier.weight"], average["classifier.weight"])
    saved = load_file(tmp_path / "average" / "checkpoint-4" / "ema.safetensors")
    assert torch.equal(saved["classifier.weight"], average["classifier.weight"])


def test_labels_in_another_order_are_matched_by_name(images, tmp_path):
    folder = tmp_path / "checkpoint"
    model = tiny_vit()
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    for order, name in ((["blue", "green", "red"], "same"), (["red", "blue", "green"], "other")):
        model.config.id2label = dict(enumerate(order))
        model.config.label2id = {label: index for index, label in enumerate(order)}
        model.save_pretrained(folder)
        loaded, inputs = load(str(folder), DataArguments(data_dir=str(images)), seed=0)
        assert inputs.data.label_names == order, name
        for row in range(len(inputs.eval)):
            assert order[inputs.eval[row]["labels"]] == ["blue", "green", "red"][row // 4]
        assert [loaded.config.id2label[i] for i in range(3)] == order


@pytest.mark.parametrize("spelling", ["--data-dir", "--data_dir"])
def test_demonstration_settings_never_reach_a_users_own_run(spelling):
    words = [spelling, "photos", "--output_dir", "o", "--use_cpu"]
    model, *_, args = parse(cli.SEARCH, words, demo={})
    assert model.dense_epochs == 0
    assert args.output_dir == "o"
    assert args.num_train_epochs == 3
    model, *_ = parse(cli.SEARCH, ["--use_cpu"], demo={})
    assert model.dense_epochs > 0


def test_wheel_holds_what_the_commands_need(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    source = tmp_path / "source"
    tracked = [
        path for path in (ROOT / "ofb_hf").rglob("*") if path.suffix in (".py", ".md", ".yaml")
    ]
    tracked.append(ROOT / "ofb_hf_command.py")
    for path in [
        *tracked,
        *(ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")),
    ]:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "ofb-hf = ofb_hf_command:main" in archive.read(points).decode()
        archive.extractall(tmp_path / "installed")
    assert {str(path.relative_to(ROOT)) for path in tracked} <= names
    says = subprocess.run(
        [sys.executable, "-c", "from ofb_hf_command import main; main(['--version'])"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert says.stdout == f"ofb-hf {ofb_hf.__version__}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--target_macs", "0.01"],
            r"budget of [\d,]+ is below the smallest subnet .* costs [\d,]+",
        ),
        (
            ["--preset", "theirs"],
            r"preset is 'theirs'; known presets are \['bi_mask', 'default', 'paper'\]",
        ),
        (["--target_macs", "-1"], r"target_macs is -1"),
        (["--image_column", "photo"], "photo"),
        (["--finetune_distillation_weight", "2"], "finetune_distillation_weight is 2"),
        (["--model_name_or_path", "no/such-folder"], "cannot load|no image processor"),
        (["--config", "missing.yaml"], "missing.yaml is no file"),
        (["--max_steps", "0"], "max_steps is 0"),
        (["--push_to_hub"], "hub_model_id is None; --push_to_hub needs"),
        (["--push_to_hub", "--hub_model_id", "a/b"], "--push_to_hub: .*Nothing was started"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
        (
            ["--resume_from_checkpoint", "no/checkpoint-3"],
            "no/checkpoint-3 is no complete checkpoint",
        ),
        (["--repeated_augmentation", "3"], "repeated_augmentation is 3, which only a stream does"),
    ],
)
def test_bad_settings_are_one_line_and_touch_nothing(
    checkpoint, images, tmp_path, capsys, flags, message
):
    output = tmp_path / "out"
    assert re.search(message, refused(capsys, checkpoint, images, output, *flags))
    assert not output.exists()


def test_wrong_label_count_and_empty_data_are_refused(checkpoint, images, tmp_path, capsys):
    four = tmp_path / "four"
    for name in "abcd":
        (four / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (16, 16)).save(four / name / f"{index}.png")
    message = refused(capsys, checkpoint, four, tmp_path / "out")
    assert "classifies 3 labels, but the data has 4" in message
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, checkpoint, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_used_output_folder_is_not_overwritten_by_accident(finished, checkpoint, images, capsys):
    output, _ = finished
    before = (output / "eval_results.json").read_bytes()
    assert "--overwrite_output_dir" in refused(capsys, checkpoint, images, output)
    assert (output / "eval_results.json").read_bytes() == before


def test_foreign_files_are_never_overwritten(checkpoint, images, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "notes.txt").write_text("mine")
    assert "holds other files" in refused(
        capsys, checkpoint, images, tmp_path, "--overwrite_output_dir"
    )
    assert (tmp_path / "search" / "notes.txt").read_text() == "mine"


def test_images_that_the_model_cannot_take_are_refused_before_anything_starts(
    images, tmp_path, capsys
):
    folder = tmp_path / "checkpoint"
    tiny_vit(num_channels=1).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    assert "cannot take the images" in refused(capsys, folder, images, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_yaml_gives_defaults_the_command_line_wins_and_unknown_keys_are_refused(
    checkpoint, images, tmp_path, capsys
):
    config = tmp_path / "run.yaml"
    config.write_text(
        "target_macs: 0.7\nmlp_candidates: [36, 72]\nfinetune_max_steps: 0\nmax_steps: 3\n"
    )
    output = tmp_path / "out"
    flags = places(checkpoint, images, output)
    results = cli.search([*flags, *QUICK, "--config", str(config), "--target_macs", "0.8"])
    assert results["target_macs"] == int(0.8 * results["dense"]["macs"])
    subnet = SubnetSpec.from_json((output / "subnet.json").read_text())
    assert subnet.size("layers.0.mlp") in (36, 72)

    config.write_text("target_mcas: 0.7\n")
    assert "target_mcas" in refused(
        capsys, checkpoint, images, tmp_path / "other", "--config", str(config)
    )


def test_speed_of_several_models_is_measured_in_one_run():
    models = {"large": tiny_vit(num_hidden_layers=6), "small": tiny_vit(num_hidden_layers=1)}
    speed = images_per_second(models, torch.randn(8, 3, 16, 16))
    assert speed["small"] > speed["large"] > 0
    assert not models["large"].training


def test_submodules_are_reachable_from_the_package(tmp_path):
    """Without importing them: rooms, and modules under the names that they had in version 0.1."""
    code = (
        "import ofb_hf; ofb_hf.tokens.published_schedule; ofb_hf.masks; ofb_hf.bi_mask.BiMask; "
        "ofb_hf.losses.flops_loss"
    )
    status, said = run_code(tmp_path, code)
    assert status == 0, said
    with pytest.raises(AttributeError, match="no attribute 'bimask'"):
        ofb_hf.bimask  # noqa: B018


def test_commands_in_cards_name_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            *(
                "/elsewhere/recipes/search_deit.py",
                "--output_dir",
                "/data/out",
                "--data_dir=/data/in",
                "--seed",
                "3",
            ),
            *("--hub_token", "hf_secret", "--hub_token=hf_secret", "--push_to_hub"),
        ],
    )
    said = "--output_dir out --data_dir=in --seed 3 --hub_token HIDDEN --hub_token=HIDDEN"
    assert command_line() == f"recipes/search_deit.py {said} --push_to_hub"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--search_tokens --search_depth mlp --seed 3", None),
        (
            "--search_tokens true --token_learning_rate 0.3 --token_granularity=4 "
            "--token_pictures 2",
            None,
        ),
        ("--hub_token abc --seed 3", "--hub_token HIDDEN --seed 3"),
        ("--hub_token=abc --hub-token a=b", "--hub_token=HIDDEN --hub-token HIDDEN"),
        ("--push_to_hub_token=abc=def --token abc", "--push_to_hub_token=HIDDEN --token HIDDEN"),
    ],
)
def test_commands_in_cards_hide_secrets_and_nothing_else(typed, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ofb-hf", "search", *typed.split()])
    assert command_line() == f"ofb-hf search {said or typed}"


def test_flags_have_one_name():
    """A shortened one would show the secret behind it."""
    with pytest.raises(ValueError, match="--hub_tok"):
        parse(cli.FINETUNE, ["--hub_tok", "abc"])


@pytest.mark.parametrize(
    "recipe", ["search_deit", "search_swin", "search_tokens", "finetune", "evaluate", "publish"]
)
def test_recipes_start_and_teach(recipe, tmp_path, monkeypatch, capsys):
    """Also as a program from another folder, where evaluate.py must not hide the package of that
    name."""
    command = [str(ROOT / "recipes" / f"{recipe}.py"), "--help"]
    if recipe == "evaluate":
        result = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        said = result.stdout
    else:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(command[0], run_name="__main__")
        said = capsys.readouterr().out
    assert ("--model_dir" if recipe == "publish" else "--model_name_or_path") in said
    if recipe.startswith("search"):
        for flag in ("--target_macs", "--finetune_epochs", "--config", "--resume_from_checkpoint"):
            assert flag in said


def test_demo_settings_are_known_and_stay_on_the_machine():
    settings = yaml.safe_load(DEMO_CONFIG.read_text())
    assert settings["model_name_or_path"] == "digits_vit"
    assert not {"dataset_name", "push_to_hub"} & set(settings)
