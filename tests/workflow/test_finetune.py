"""`ofb-hf finetune` writes down what it did: history, picture, card, and the kept units."""

import json
import shutil

import pytest
from factories import tiny_vit
from huggingface_hub import ModelCard
from PIL import Image
from runs import PRODUCT, QUICK, places, run_search
from transformers import AutoModelForImageClassification, pipeline

from ofb_hf import cli, count_macs
from ofb_hf.release.card import read_results
from ofb_hf.training.history import HISTORY_FIELDS, read_history

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

STEPS = 3
OWN = ["kea", "lynx", "mole", "newt"]


def finetune(source, images, output, *flags):
    """Three steps of the command."""
    settings = [*places(source, images, output), *QUICK, "--max_steps", str(STEPS)]
    return cli.finetune([*settings, *flags])


@pytest.fixture(scope="module")
def searched(checkpoint, images, tmp_path_factory):
    """The output folder of a search without finetuning."""
    output = tmp_path_factory.mktemp("searched") / "half"
    run_search(checkpoint, images, output, "--finetune_max_steps", "0")
    return output


@pytest.fixture(scope="module")
def finetuned(searched, images, tmp_path_factory):
    """The output folder of finetuning that result, and what the command returned."""
    output = tmp_path_factory.mktemp("finetuned") / "longer"
    return output, finetune(searched, images, output)


def test_the_output_folder_is_complete_and_consistent(searched, finetuned):
    output, results = finetuned
    names = {path.name for path in output.iterdir() if path.is_file()}
    assert names == PRODUCT - {"search.png"} | {"finetune.png", "run_settings.json"}
    assert not (output / "model").exists()
    assert json.loads((output / "eval_results.json").read_text()) == results
    assert (output / "subnet.json").read_bytes() == (searched / "subnet.json").read_bytes()
    model = AutoModelForImageClassification.from_pretrained(output)
    before = json.loads((searched / "eval_results.json").read_text())["searched"]
    assert results["dense"]["top1"] == before["top1"]
    assert results["finetuned"]["macs"] == results["dense"]["macs"] == count_macs(model)
    assert results["finetuned"]["bytes"] == (output / "model.safetensors").stat().st_size
    assert results["steps"] == {"finetune": STEPS}
    assert results["source"]["model"] == searched.name
    history = read_history(output / "search_history.jsonl")
    assert [(row["phase"], row["step"]) for row in history] == [
        ("finetune", step + 1) for step in range(STEPS)
    ]
    assert all(list(row) == HISTORY_FIELDS for row in history)
    with Image.open(output / "finetune.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(256)) > 10


def test_the_card_repeats_the_measured_numbers(searched, finetuned):
    output, results = finetuned
    card = (output / "README.md").read_text()
    assert "$" not in card
    assert "othing was measured" not in card
    for stage, title in (("dense", "before finetuning"), ("finetuned", "after finetuning")):
        assert f"| {title} | {results[stage]['top1']:.2f} | {results[stage]['top5']:.2f} |" in card
    assert f"{results['finetuned']['macs']:,} multiply-accumulates" in card
    assert f"{STEPS} steps of finetuning" in card
    assert "Kept widths:" in card
    assert "- `embeddings`: " in card
    assert "import ofb_hf" in card
    assert str(output.parent) not in card
    data = ModelCard(card).data
    assert data.model_name == f"{searched.name}, finetuned"
    assert "pruning" in data.tags
    in_card = {result.metric_type: result.metric_value for result in data.eval_results}
    assert in_card == {
        "accuracy": results["finetuned"]["top1"],
        "top_5_accuracy": results["finetuned"]["top5"],
    }
    assert read_results(output / "eval_results.json") == results


def test_it_is_verified_and_published(finetuned, images, tmp_path, capsys):
    output, _ = finetuned
    cli.verify([str(output), "--data_dir", str(images), "--use_cpu", "--report_to", "none"])
    assert "differs" not in capsys.readouterr().out
    published = tmp_path / "published"
    cli.publish([str(output), "--dry_run", "--output_dir", str(published)])
    names = {path.name for path in published.iterdir()}
    assert names >= PRODUCT - {"search.png"} | {"finetune.png", "modeling_ofb_vit.py"}
    assert "run_settings.json" not in names
    for name in ("README.md", "subnet.json", "eval_results.json", "finetune.png"):
        assert (published / name).read_bytes() == (output / name).read_bytes(), name


def test_a_stock_model_gets_a_card_without_code_of_ours(checkpoint, images, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--teacher_name_or_path", str(checkpoint), "--keep_dense"]
    results = finetune(checkpoint, images, output, *flags)
    assert not (output / "subnet.json").exists()
    assert (output / "dense" / "model.safetensors").is_file()
    card = (output / "README.md").read_text()
    assert "ofb_hf" not in card.split("## Results")[0]
    assert "Kept widths" not in card
    assert ModelCard(card).data.tags == ["vision-transformer"]
    assert f"| after finetuning | {results['finetuned']['top1']:.2f} |" in card
    cli.verify([str(output), "--data_dir", str(images), "--use_cpu", "--report_to", "none"])
    assert "Everything" in capsys.readouterr().out


def test_a_subnet_of_another_model_is_not_taken_over(searched, checkpoint, images, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (source / name).write_bytes((checkpoint / name).read_bytes())
    for content in ((searched / "subnet.json").read_text(), "{}"):
        (source / "subnet.json").write_text(content)
        finetune(source, images, tmp_path / "out", "--overwrite_output_dir")
        assert not (tmp_path / "out" / "subnet.json").exists()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders of another number of classes than the checkpoint's: 8 and 4 images each."""
    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate(OWN):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                color = (60 * number, 20 * index, 90)
                Image.new("RGB", (20, 16), color).save(folder / split / name / f"{index}.png")
    return folder


def test_a_model_for_other_labels_gets_a_new_classifier(checkpoint, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune(checkpoint, photos, tmp_path / "out")
    assert "`ofb-hf finetune --new_classifier`" in capsys.readouterr().err
    results = finetune(checkpoint, photos, tmp_path / "out", "--new_classifier")
    assert results["finetuned"]["num_examples"] == 16
    classify = pipeline("image-classification", model=str(tmp_path / "out"), device="cpu")
    files = sorted((photos / "test").glob("*/*.png"))
    right = [classify(str(file))[0]["label"] == file.parent.name for file in files]
    assert 100 * sum(right) / len(right) == results["finetuned"]["top1"]
    assert set(classify.model.config.label2id) == set(OWN)


@pytest.mark.parametrize("command", ["search", "search_tokens"])
def test_a_search_may_begin_with_a_new_classifier(command, checkpoint, photos, tmp_path, capsys):
    start = getattr(cli, command)
    source = shutil.copytree(checkpoint, tmp_path / "source")
    tiny_vit(num_hidden_layers=3).save_pretrained(source)
    flags = [*places(source, photos, tmp_path / "out"), *QUICK, "--new_classifier"]
    flags += ["--max_steps", "16", "--finetune_epochs", "0"]
    with pytest.raises(SystemExit):
        start(flags)
    assert "--dense_epochs" in capsys.readouterr().err
    results = start([*flags, "--dense_epochs", "2"])
    assert results["steps"]["dense"] == 8
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert [model.config.id2label[number] for number in range(4)] == OWN


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dense_epochs", "1"], "unknown setting --dense_epochs"),
        (["--distillation_weight", "0.5"], "distillation_weight is 0.5, but there is no teacher"),
        (["--push_to_hub"], "hub_model_id is None"),
    ],
)
def test_settings_without_effect_are_refused(checkpoint, images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as refusal:
        finetune(checkpoint, images, tmp_path / "out", *flags)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stock_model_is_not_pushed(checkpoint, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ofb_hf.workflow.run.require_push", lambda args: None)
    with pytest.raises(SystemExit):
        finetune(checkpoint, images, tmp_path / "out", "--push_to_hub", "--hub_model_id", "a/b")
    assert "the model's own push_to_hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
