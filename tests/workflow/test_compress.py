"""`ofb-hf compress` as a user runs it: a model and unlabeled images in, an output folder out."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from factories import invented_table, tiny_images, tiny_swin, tiny_vit
from hub_server import HubServer, Repository, Token
from huggingface_hub import ModelCard
from PIL import Image
from runs import TESTS, finish, run_code, run_fresh
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ViTImageProcessorPil
from warm import start

from ofb_hf import SubnetSpec, cli, count_macs, count_params
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.latency import count_latency, milliseconds
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.workflow import compress

ROOT = Path(__file__).parents[2]
PRODUCT = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "subnet.json"),
    *("compress.png", "README.md", "eval_results.json", "run_settings.json"),
}
QUICK = ["--use_cpu", "--disable_tqdm", "--seed", "1"]


def run(model, images, folder, *flags):
    """Run the command in this process; return its results."""
    words = [str(model), str(images), "--output_dir", str(folder), *QUICK]
    return cli.compress([*words, *map(str, flags)])


def refused(capsys, *arguments):
    """Return the line with which the command refuses to do anything."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def weights(folder):
    """Return the tensors of a checkpoint."""
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 40 images as people have them: nested, of many sizes and modes, one corrupt."""
    folder = tmp_path_factory.mktemp("album") / "photos"
    rng = np.random.default_rng(0)
    for index in range(40):
        place = folder / ("trip" if index % 2 else "home") / str(2000 + index % 3)
        place.mkdir(parents=True, exist_ok=True)
        width, height = rng.integers(9, 60, 2).tolist()
        pixels = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height))
        image.save(place / f"{index:02}.jpg")
        if index == 3:
            image.convert("L").save(place / f"{index:02}.jpg")
        if index == 4:
            image.convert("RGBA").save(place / "alpha.png")
            image.convert("P").save(place / "palette.png")
    (folder / "trip" / "2000" / "corrupt.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "thumbnail.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def compressed(checkpoint, photos, tmp_path_factory):
    """The output of the command for half of the MACs, without tokens so that it has a twin."""
    folder = tmp_path_factory.mktemp("runs") / "half"
    flags = ("--target_macs", 0.5, "--keep_dense", "--search_tokens", "false")
    return folder, run(checkpoint, photos, folder, *flags)


# ---------------------------------------------------------------------------- what comes of it


def test_output_folder_is_complete_and_consistent(compressed):
    folder, results = compressed
    assert {path.name for path in folder.iterdir()} == PRODUCT | {"dense"}
    assert {path.name for path in folder.parent.iterdir()} == {"half"}
    assert json.loads((folder / "eval_results.json").read_text()) == results
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert count_macs(model) == results["compressed"]["macs"] <= results["target_macs"]
    assert count_params(model) == results["compressed"]["params"]
    dense = AutoModelForImageClassification.from_pretrained(folder / "dense").eval()
    assert results["target_macs"] == results["dense"]["macs"] // 2 == count_macs(dense) // 2
    # The subnet counts the units of the kept parent, which computes what the given model does.
    subnet = SubnetSpec.from_json((folder / "subnet.json").read_text())
    assert count_macs(slice_model(dense, subnet)) == results["compressed"]["macs"]
    given = tiny_vit()
    images = tiny_images()
    torch.testing.assert_close(dense(images).logits, given(images).logits, rtol=0, atol=1e-4)
    assert results["basis"] == subnet.basis == "equivalent"
    with Image.open(folder / "compress.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors(256)) > 10


def test_images_are_counted_and_agreement_is_measured_on_held_out_ones(compressed):
    _, results = compressed
    # 42 readable images, a fifth of them held out
    assert (results["num_images"], results["held_out"], results["skipped"]) == (34, 8, 1)
    assert results["compressed"]["num_examples"] == 8
    assert 0 <= results["compressed"]["agreement"] <= 100
    assert results["compressed"]["kl"] >= 0
    assert "top1" not in results["dense"]
    assert "top1" not in results["compressed"]
    assert set(results["timings"]) == {
        "loading", "measuring errors", "choosing and fitting", "measuring the result",
    }  # fmt: skip


def test_card_says_what_was_measured_and_that_nothing_was_trained(compressed):
    folder, results = compressed
    card = (folder / "README.md").read_text()
    assert "$" not in card
    assert "Nothing was trained and no labels were used" in card
    assert f"{results['compressed']['agreement']:.2f} %" in card
    assert f"{results['target_macs']:,} MACs" in card
    assert "accuracy is not known" in card
    assert str(folder.parent) not in card
    metadata = ModelCard(card).data
    assert metadata.pipeline_tag == "image-classification"
    assert not metadata.eval_results


def test_what_is_said(checkpoint, photos, tmp_path, caplog):
    run(checkpoint, photos, tmp_path / "out", "--num_images", 20, "--batch_size", 7)
    said = caplog.text
    assert "photos: 20 images of 43, without labels." in said
    assert "This takes about " in said
    assert "Nothing was trained, and no labels were used" in said
    assert f"written to {tmp_path / 'out'}" in said
    caplog.clear()
    run(checkpoint, photos, tmp_path / "all")
    assert "all 42 images that can be decoded (512 were asked for)" in caplog.text
    assert "corrupt.jpg (no image of a known format)" in caplog.text


@pytest.mark.slow
def test_it_loads_by_all_doors(compressed, tmp_path):
    folder, _ = compressed
    sent = tmp_path / "sent"
    cli.publish([str(folder), "--dry_run", "--output_dir", str(sent)])
    images = tiny_images()
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    logits = model(images).logits
    twin = AutoModelForImageClassification.from_pretrained(sent / "stock").eval()
    assert type(twin).__module__.startswith("transformers.models.vit.")
    torch.testing.assert_close(twin(images).logits, logits, rtol=0, atol=1e-5)
    hidden = AutoModel.from_pretrained(folder).eval()(images).last_hidden_state
    assert hidden.shape[-1] == model.config.hidden_size
    # without this package, by the code that comes with the checkpoint
    save_file({"images": images}, tmp_path / "images.safetensors")
    script = f"""
import sys; sys.modules["ofb_hf"] = None
import safetensors.torch, torch
from transformers import AutoModel, AutoModelForImageClassification
images = safetensors.torch.load_file({str(tmp_path / "images.safetensors")!r})["images"]
settings = {{"trust_remote_code": True}}
model = AutoModelForImageClassification.from_pretrained({str(sent)!r}, **settings).eval()
AutoModel.from_pretrained({str(sent)!r}, **settings)
answers = {{"logits": model(images).logits.detach()}}
safetensors.torch.save_file(answers, {str(tmp_path / "answers.safetensors")!r})
"""
    status, said = run_code(tmp_path, script, environment={"HF_HOME": str(tmp_path / "hf")})
    assert status == 0, said[-3000:]
    answers = load_file(tmp_path / "answers.safetensors")["logits"]
    torch.testing.assert_close(answers, logits, rtol=0, atol=0)


@pytest.mark.slow
def test_it_is_published_and_verified(checkpoint, images, compressed, tmp_path, capsys):
    tokens = {"hf_write": Token("ann", organizations=("lab",))}
    case = ["one", str(compressed[0]), "lab/half", "hf_write", {}]
    with HubServer({"case/one": Repository({})}, tokens=tokens) as hub:
        environment = hub.environment(tmp_path / "hf")
        script = TESTS / "publish_process.py"
        status, said = run_fresh(script, json.dumps([case]), environment=environment)
        assert status == 0, said[-3000:]
        assert '"error"' not in said
        files = set(hub.repositories["lab/half"].files)
    sent = (PRODUCT - {"run_settings.json"}) | {"modeling_ofb_vit.py", "configuration_ofb_vit.py"}
    assert files - {".gitattributes"} == sent
    run(checkpoint, images, tmp_path / "out")
    capsys.readouterr()
    words = [str(tmp_path / "out"), "--data_dir", str(images), "--use_cpu", "--report_to", "none"]
    cli.verify(words)
    assert "Everything is as the card says." in capsys.readouterr().out
    # Without labels there is no accuracy to compare.
    with pytest.raises(SystemExit):
        cli.verify([str(compressed[0]), *words[1:]])
    assert "has no results in its metadata" in capsys.readouterr().err


# ----------------------------------------------------------------------------- images and labels


def test_labels_are_only_for_measuring(checkpoint, images, tmp_path):
    results = run(checkpoint, images, tmp_path / "known")
    assert results["compressed"]["num_examples"] == results["dense"]["num_labelled"] == 12
    assert results["measured_on"] == "the split test"
    assert (results["num_images"], results["held_out"]) == (24, 0)
    assert 0 <= results["compressed"]["top1"] <= results["compressed"]["top5"] == 100
    metadata = ModelCard((tmp_path / "known" / "README.md").read_text()).data
    assert metadata.eval_results[0].metric_value == results["compressed"]["top1"]
    # The same images in the same order, under names that the model does not know.
    other = shutil.copytree(images, tmp_path / "other")
    for split in ("train", "test"):
        for number, name in enumerate(("blue", "green", "red")):
            (other / split / name).rename(other / split / f"album {number}")
    again = run(checkpoint, other, tmp_path / "unknown")
    assert "top1" not in again["compressed"]
    assert again["compressed"]["agreement"] == results["compressed"]["agreement"]
    torch.testing.assert_close(weights(tmp_path / "unknown"), weights(tmp_path / "known"))


def test_parquet_files_with_and_without_labels(checkpoint, images, tmp_path):
    paths = sorted((images / "train").rglob("*.png"))
    names = [path.parent.name for path in paths]
    plain = datasets.Dataset.from_dict({"photo": [str(path) for path in paths]})
    plain = plain.cast_column("photo", datasets.Image())
    rows = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    rows[5]["bytes"] = b"broken"
    encoded = datasets.Dataset.from_dict({"photo": rows, "name": names})
    encoded = encoded.cast_column("photo", datasets.Image(decode=False))
    encoded.to_parquet(tmp_path / "one.parquet")
    results = run(checkpoint, tmp_path / "one.parquet", tmp_path / "a", "--label_column", "name")
    assert results["skipped"] == 1
    assert (results["data"], results["num_images"], results["held_out"]) == ("one.parquet", 19, 4)
    assert results["dense"]["num_labelled"] == 4
    # images that were held out are no split of the data
    assert not ModelCard((tmp_path / "a" / "README.md").read_text()).data.eval_results
    (tmp_path / "shards").mkdir()
    plain.to_parquet(tmp_path / "shards" / "train-00000.parquet")
    plain.select(range(6)).to_parquet(tmp_path / "shards" / "validation-00000.parquet")
    results = run(checkpoint, tmp_path / "shards", tmp_path / "b", "--max_eval_samples", 4)
    assert results["measured_on"] == "a random part of the split validation"
    assert (results["num_images"], results["compressed"]["num_examples"]) == (24, 4)


# ----------------------------------------------------------------------------- models


def test_a_model_without_a_head_is_compressed_by_its_features(photos, tmp_path, caplog):
    model = tiny_vit()
    model.base_model.save_pretrained(tmp_path / "encoder")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "encoder")
    results = run(tmp_path / "encoder", photos, tmp_path / "out", "--target_macs", 0.8)
    assert "no classification head: its features decide" in caplog.text
    assert results["basis"] == "heads"
    assert 0 <= results["compressed"]["feature_error"] < 0.5
    assert "agreement" not in results["compressed"]
    assert not any("classifier" in name for name in weights(tmp_path / "out"))
    small = AutoModel.from_pretrained(tmp_path / "out").eval()
    images = tiny_images()
    features = small(images).last_hidden_state[:, 0]
    assert features.shape == model.base_model(images).last_hidden_state[:, 0].shape
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "AutoModel.from_pretrained" in card.text
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 0


def test_half_precision_is_kept_and_said_once(photos, tmp_path, caplog):
    tiny_vit(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "half")
    results = run(tmp_path / "half", photos, tmp_path / "out")
    assert caplog.text.count("bfloat16") == 1
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert results["compressed"]["bytes"] < results["dense"]["bytes"]


def test_a_budget_in_milliseconds(checkpoint, photos, tmp_path):
    table = invented_table(tiny_vit())
    (tmp_path / "table.json").write_text(json.dumps(table.to_dict()))
    whole = milliseconds(count_latency(tiny_vit(), table))
    flags = ("--latency_table", tmp_path / "table.json", "--target_latency_ms", 0.6 * whole)
    results = run(checkpoint, photos, tmp_path / "out", *flags)
    assert results["compressed"]["predicted_latency_ms"] <= results["target_latency_ms"]
    assert results["dense"]["predicted_latency_ms"] == whole
    assert results["target_macs"] is None
    assert "ms for a batch of 1 with 1 thread" in (tmp_path / "out" / "README.md").read_text()


def test_swin_with_several_budgets_from_one_measuring(swin_checkpoint, photos, tmp_path):
    results = run(swin_checkpoint, photos, tmp_path / "out", "--budgets", "0.8,0.6")
    assert list(results) == ["target_macs-0.8", "target_macs-0.6"]
    folders = {path.name for path in (tmp_path / "out").iterdir()}
    assert folders == {*results, "family.json", "family.png", "run_settings.json"}
    assert json.loads((tmp_path / "out" / "family.json").read_text()) == results
    for name, result in results.items():
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == PRODUCT
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / name)
        assert count_macs(model) == result["compressed"]["macs"] <= result["target_macs"]


def test_one_budget_that_nothing_meets_does_not_cost_the_others(
    checkpoint, photos, tmp_path, monkeypatch, caplog
):
    original = compress.FrozenCompressor.compress

    def refusing(self, config):
        if config.target_macs == 0.6:
            raise UnreachableBudgetError("nothing fits", 1)
        return original(self, config)

    with monkeypatch.context() as patch:
        patch.setattr(compress.FrozenCompressor, "compress", refusing)
        results = run(checkpoint, photos, tmp_path / "out", "--budgets", "0.8,0.6")
        with pytest.raises(SystemExit):
            run(checkpoint, photos, tmp_path / "none", "--budgets", "0.6")
    assert list(results) == ["target_macs-0.8"]
    assert (tmp_path / "out" / "target_macs-0.8" / "model.safetensors").is_file()
    assert "target_macs-0.6 is missing: nothing fits" in caplog.text
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------- folder and failures


def test_a_run_is_replaced_only_on_request_and_only_by_a_whole_one(
    checkpoint, photos, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    run(checkpoint, photos, out, "--target_macs", 0.7, "--keep_dense")
    (out / "mine.txt").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "--overwrite_output_dir" in refused(capsys, checkpoint, photos, out)

    def stop(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(compress, "plot_curves", stop)
    assert "no space left" in refused(capsys, checkpoint, photos, out, "--overwrite_output_dir")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    monkeypatch.undo()
    results = run(checkpoint, photos, out, "--overwrite_output_dir")
    assert {path.name for path in out.iterdir()} == PRODUCT | {"mine.txt"}
    assert json.loads((out / "eval_results.json").read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_folder_with_other_files_is_not_written_to(checkpoint, photos, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    message = refused(capsys, checkpoint, photos, tmp_path, "--overwrite_output_dir")
    assert "holds other files" in message
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def corrupt(folder, count=10, bad=2):
    """Return a folder of images of which some cannot be decoded."""
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (20, 20)).save(folder / f"{index}.png")
        if index < bad:
            (folder / f"{index}.png").write_bytes(b"broken")
    return folder


def nan_model(folder):
    """Return a checkpoint whose outputs are not finite."""
    model = tiny_vit()
    model.base_model.layernorm.weight.data[0] = torch.nan
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def gray_model(folder, num_channels=1, num_labels=3):
    """Return a checkpoint for images of other channels."""
    tiny_vit(num_channels=num_channels, num_labels=num_labels).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def broken_split(folder):
    """Return a folder whose split to measure on holds no image that can be decoded."""
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    corrupt(folder / "train" / "a", bad=0)
    corrupt(folder / "test" / "a", 2, 2)
    return folder


BAD = {
    "no images": (lambda tmp: {"images": tmp / "empty"}, "holds no images"),
    "missing folder": (lambda tmp: {"images": tmp / "nowhere"}, "does not exist"),
    "no folder and not on the Hub": (lambda tmp: {"images": "no/where"}, "no/where"),
    "a text file": (lambda tmp: {"images": __file__}, "is a file; give a folder"),
    "too many unreadable": (
        lambda tmp: {"images": corrupt(tmp / "bad")},
        "2 of 10 images cannot be decoded, and at most 10% may be: ",
    ),
    "none readable": (lambda tmp: {"images": corrupt(tmp / "bad", 3, 3)}, "3 of 3 images cannot"),
    "a single image": (lambda tmp: {"images": corrupt(tmp / "one", 1, 0)}, "at least two"),
    "unknown split": (lambda tmp: {"flags": ["--eval_split", "holiday"]}, "['home', 'trip']"),
    "not finite": (lambda tmp: {"model": nan_model(tmp / "nan")}, "are not finite"),
    "a shape": (lambda tmp: {"model": "digits_vit"}, "weights are random"),
    "no such model": (lambda tmp: {"model": "digits_vitt"}, "did you mean digits_vit?"),
    "below the smallest": (lambda tmp: {"flags": ["--target_macs", "0.001"]}, "costs "),
    "above the model": (lambda tmp: {"flags": ["--target_macs", "1e12"]}, "nothing would be"),
    "no number": (lambda tmp: {"flags": ["--target_macs", "half"]}, "give numbers"),
    "no budget": (lambda tmp: {"flags": ["--target_macs", "-1"]}, "target_macs is -1.0"),
    "two targets": (
        lambda tmp: {"flags": ["--target_macs", "0.5", "--budgets", "0.7,0.5"]},
        "--target_macs and --budgets are given together",
    ),
    "one budget twice": (lambda tmp: {"flags": ["--budgets", "0.5,0.5"]}, "budget twice"),
    "milliseconds without a table": (
        lambda tmp: {"flags": ["--target_latency_ms", "3"]},
        "latency_table is not given",
    ),
    "unknown basis": (
        lambda tmp: {"flags": ["--basis", "fourier"]},
        "allowed are 'given', 'heads', 'equivalent'",
    ),
    "a flag of trainings": (
        lambda tmp: {"flags": ["--learning_rate", "1e-3", "--num_train_epochs", "2"]},
        "--num_train_epochs (it is for trainings, and `ofb-hf compress` trains nothing)",
    ),
    "no images named": (lambda tmp: {"images": None}, "no images are named"),
    "a budget without end": (lambda tmp: {"flags": ["--target_macs", "inf"]}, "give numbers"),
    "a budget of commas": (lambda tmp: {"flags": ["--target_macs", ","]}, "give numbers"),
    "the whole model": (lambda tmp: {"flags": ["--target_macs", "1.0"]}, "nothing would be"),
    "gray images only": (lambda tmp: {"model": gray_model(tmp / "gray")}, "images of 1 channels"),
    "one output": (lambda tmp: {"model": gray_model(tmp / "one", 3, 1)}, "two or more classes"),
    "a split that cannot be read": (
        lambda tmp: {"images": broken_split(tmp / "split"), "flags": ["--eval_split", "test"]},
        "cannot be decoded",
    ),
    "images twice": (lambda tmp: {"flags": ["--data_dir", "x"]}, "images come from one place"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_an_explanation(checkpoint, photos, tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    prepare, message = BAD[case]
    given = {"model": checkpoint, "images": photos, "flags": []} | prepare(tmp_path)
    words = [str(given["model"])]
    words += [] if given["images"] is None else [str(given["images"])]
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        cli.compress([*words, "--output_dir", str(tmp_path / "out"), *QUICK, *given["flags"]])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert said.splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_basis_that_the_architecture_does_not_allow_is_refused(photos, tmp_path, capsys):
    tiny_swin(depths=[2], num_heads=[2]).save_pretrained(tmp_path / "swin")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "swin")
    message = refused(capsys, tmp_path / "swin", photos, tmp_path / "out", "--basis", "equivalent")
    assert "--basis is 'equivalent', but no residual stream of this SwinFor" in message
    assert "the norm of the patch embedding writes it" in message
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_give_what_one_gives(checkpoint, photos, tmp_path):
    words = [str(checkpoint), str(photos), *QUICK, "--target_macs", "0.5", "--batch_size", "8"]
    processes = [
        start(ROOT / "recipes/compress.py", *words, "--output_dir", str(tmp_path / str(ranks)),
              ranks=ranks, environment={"ACCELERATE_USE_CPU": "true"})
        for ranks in (1, 2)
    ]  # fmt: skip
    for process in processes:
        status, said = finish(process)
        assert status == 0, said[-3000:]
        assert said.count("written to ") == 1
    one, two = tmp_path / "1", tmp_path / "2"
    assert (two / "subnet.json").read_text() == (one / "subnet.json").read_text()
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=1e-5)
    results = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, two)]
    assert results[0]["compressed"]["agreement"] == results[1]["compressed"]["agreement"]
    assert results[0]["compressed"]["num_examples"] == results[1]["compressed"]["num_examples"]


def test_output_folders_that_only_fail_at_the_end_are_refused(
    checkpoint, photos, tmp_path, capsys, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for place, message in ((".", "is the current folder"), (tmp_path / "file" / "x", "is a file")):
        with pytest.raises(SystemExit):
            cli.compress([str(checkpoint), str(photos), *QUICK, "--output_dir", str(place)])
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_link_to_an_empty_folder_is_filled(checkpoint, photos, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    cli.compress([str(checkpoint), str(photos), *QUICK, "--output_dir", str(link)])
    assert link.is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".incomplete*"))
