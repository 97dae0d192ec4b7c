"""What must not be published is found wherever it is, and text that only resembles it passes."""

import json

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

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
