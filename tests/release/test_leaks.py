"""What must not be published is found wherever it is, and text that only resembles it passes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from factories import non_uniform_vit
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from ofb_hf import models, publish
from ofb_hf.release.card import plain_card
from ofb_hf.release.leaks import LeakError, require_no_leaks

HOME = "/".join(["", "home", "me"])  # in pieces: this file is searched for folders, too
TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to publish, on the machine `gpu-box-7` of the account `mallory`."""
    monkeypatch.setattr("getpass.getuser", lambda: "mallory")
    monkeypatch.setattr("platform.node", lambda: "gpu-box-7")
    (tmp_path / "README.md").write_text(
        "# A model\n\nImages/s and top-1/top-5: see [docs](docs/a.md), https://a.co/b/c.\n"
        "Labels are those of https://storage.googleapis.com/openimages/web: /m/01g317, and so on.\n"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "ofb_vit", "ratio": "1/2", "hf_version": 3})
    )
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    Image.new("RGB", (4, 4)).save(tmp_path / "search.png")
    return tmp_path


def test_what_is_harmless_passes(folder):
    assert require_no_leaks(folder) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"--hub_token {TOKEN}", "an access token"),
        ("ghp_" + "x1" * 18, "an access token"),
        ("AKIA" + "ABCD1234" * 2, "an access token"),
        ("--output_dir /scratch/runs/half", r"a folder of a machine \(/scratch/runs/half\)"),
        ('{"data_dir": "/mnt/photos"}', r"a folder of a machine \(/mnt/photos\)"),
        ("--data_dir=/gpfs/lab/x", "a folder of a machine"),
        (r"C:\Users\me\x", "a folder of a machine"),
        (r"C:\\Users\\me\\x", "a folder of a machine"),
        ("C:/Users/me/x", "a folder of a machine"),
        (r"\\server\share\me", "a folder of a machine"),
        (f"file://{HOME}/data", "a folder of a machine"),
        (f"dir:{HOME}/data", "a folder of a machine"),
        (f"<{HOME}/x>", "a folder of a machine"),
        ("hf_oauth_" + "eyJ" * 9, "an access token"),
        ("x_hf_" + "Ab9" * 12, "an access token"),
        ("glpat-" + "Ab9_" * 5, "an access token"),
        ("~/photos", "a folder of a machine"),
        ("made by mallory", r"the name of the account \(mallory\)"),
        ("on gpu-box-7, 8 GPUs", r"the name of the machine \(gpu-box-7\)"),
    ],
)
@pytest.mark.parametrize("name", ["README.md", "config.json", "search_history.jsonl"])
def test_a_leak_is_named_with_its_place(folder, name, text, what):
    file = folder / name
    file.write_text((file.read_text() if file.exists() else "{}\n") + f"\n{text}\n")
    line = len(file.read_text().splitlines())
    with pytest.raises(LeakError, match=rf"not published.*{name}, line {line}: {what}") as refusal:
        require_no_leaks(folder)
    assert TOKEN not in str(refusal.value)


def test_weights_and_pictures_are_read_too(folder):
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors", {"source": TOKEN})
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "from /scratch/photos/runs")
    Image.new("RGB", (4, 4)).save(folder / "search.png", pnginfo=info)
    with pytest.raises(LeakError) as refusal:
        require_no_leaks(folder)
    assert "model.safetensors (header): an access token" in str(refusal.value)
    assert "search.png (Comment): a folder of a machine" in str(refusal.value)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "model.pkl"])
def test_pickles_are_refused(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.raises(LeakError, match=f"{name}: a file that may hold pickled code"):
        require_no_leaks(folder)


def test_secrets_of_this_machine_are_known_whatever_they_look_like(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "quite-an-ordinary-word")
    (folder / "README.md").write_text("quite-an-ordinary-word")
    with pytest.raises(LeakError, match="the value of a secret") as refusal:
        require_no_leaks(folder)
    assert "ordinary" not in str(refusal.value)


def test_other_variables_are_no_secrets(folder, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_CONFIG", "transformers")
    (folder / "README.md").write_text("made with transformers")
    assert require_no_leaks(folder) is None


def account(monkeypatch, name):
    monkeypatch.setattr("getpass.getuser", lambda: name)


@pytest.mark.parametrize("name", ["model", "pruning", "checkpoint", "train", "forward", "layers"])
def test_a_name_that_is_a_word_of_cards_or_of_our_code_is_no_leak(folder, monkeypatch, name):
    card = plain_card(1, 1, [[17, 9]])
    (folder / "README.md").write_text(card)
    for file in Path(models.__file__).parent.glob("*_ofb_*.py"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps({name: {name: 1}}, indent=2))
    save_file({f"{name}.layers.0": torch.zeros(3)}, folder / "model.safetensors")
    account(monkeypatch, name)
    monkeypatch.setattr("platform.node", lambda: name.capitalize())
    assert require_no_leaks(folder) is None


def test_code_that_is_not_ours_is_searched(folder):
    file = shutil.copy(Path(models.__file__).with_name("modeling_ofb_vit.py"), folder)
    require_no_leaks(folder)
    with open(file, "a") as code:
        code.write("# by mallory\n")
    with pytest.raises(LeakError, match=r"modeling_ofb_vit.py, line \d+: the name of the account"):
        require_no_leaks(folder)


def test_values_are_searched_where_keys_are_not(folder):
    (folder / "config.json").write_text(json.dumps({"mallory": 'a "quoted": word'}))
    require_no_leaks(folder)
    (folder / "config.json").write_text(json.dumps({"mallory": {"author": "mallory"}}))
    with pytest.raises(LeakError, match=r"config.json, line 1: the name of the account"):
        require_no_leaks(folder)


def test_a_class_and_an_allowed_word_may_be_called_like_the_account(tmp_path, monkeypatch):
    model = non_uniform_vit()
    model.config.id2label = {0: "red deer", 1: "roe_deer", 2: "elk"}
    account(monkeypatch, "deer")
    publish(model, output_dir=tmp_path / "deer")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    account(monkeypatch, "gelu")
    with pytest.raises(LeakError, match=r"account \(gelu\).*`ofb-hf publish --allow_words NAME`"):
        publish(model, output_dir=tmp_path / "gelu")
    publish(model, output_dir=tmp_path / "gelu", allow_words=["gelu"])


def test_a_user_without_a_name_can_publish(folder, monkeypatch):
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert require_no_leaks(folder) is None


def test_the_account_that_is_published_to_may_be_named(folder, monkeypatch):
    (folder / "README.md").write_text("mallory/ofb-vit, by mallory")
    with pytest.raises(LeakError, match="the name of the account"):
        require_no_leaks(folder, {"alice"})
    require_no_leaks(folder, {"mallory"})
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    (folder / "README.md").write_text("the root of it")
    require_no_leaks(folder)
