"""`--basis`: whole commands that begin with the network in an equivalent basis."""

import json

import pytest
import torch
from runs import run_search
from transformers import AutoModelForImageClassification

from ofb_hf import SubnetSpec, cli, count_macs
from ofb_hf.data import ImageStream
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.search.trainer import OFBTrainer
from ofb_hf.workflow.run import Run

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

FLAGS = ["--basis", "equivalent", "--keep_dense"]


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def logits(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.randn(4, 3, 16, 16, generator=generator)).logits


def load(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def assert_cut_from(folder, dense):
    """The subnet in a folder counts units of the rewritten network, and says so."""
    subnet = SubnetSpec.from_json((folder / "subnet.json").read_text())
    small = load(folder)
    assert (subnet.basis, small.config.basis, dense.config.basis) == ("equivalent",) * 3
    assert shapes(slice_model(dense, subnet)) == shapes(small)
    assert (
        "`subnet.json` count units of the dense model in an equivalent"
        in (folder / "README.md").read_text()
    )


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_search_counts_units_of_the_kept_dense_model(
    checkpoint, swin_checkpoint, images, tmp_path, family
):
    given = checkpoint if family == "vit" else swin_checkpoint
    results = run_search(given, images, tmp_path / "out", *FLAGS)
    dense = load(tmp_path / "out" / "dense")
    assert results["finetuned"]["macs"] <= results["target_macs"] == count_macs(dense) // 2
    assert_cut_from(tmp_path / "out", dense)
    assert (logits(dense) - logits(load(given))).abs().max() < 1e-4
    assert not (tmp_path / "out" / "FAILED.txt").exists()


def test_a_streamed_search_is_rewritten_as_well(checkpoint, images, tmp_path, monkeypatch):
    read = []
    loader = ImageStream.loader

    def noted(stream, *args, **kwargs):
        read.append(type(stream.transform).__name__)
        return loader(stream, *args, **kwargs)

    monkeypatch.setattr(ImageStream, "loader", noted)
    flags = [*FLAGS, "--streaming", "true", "--augmentation", "deit", "--finetune_max_steps", "0"]
    run_search(checkpoint, images, tmp_path / "out", *flags)
    # without augmentation, which would leave gray levels that only a training normalizes
    assert read[0] == "ImageTransform"
    assert "DeiTTransform" in read
    assert_cut_from(tmp_path / "out", load(tmp_path / "out" / "dense"))


def test_several_budgets_are_nested_in_one_basis_and_resumed_there(
    checkpoint, images, tmp_path, monkeypatch
):
    """Stopped in the second search: neither the first one nor the basis is computed again."""
    budgets = [*FLAGS, "--target_macs", "0.7,0.5", "--max_steps", "32", "--dense_epochs", "1"]
    budgets += ["--preset", "bi_mask", "--importance_source", "error_curves"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_search(checkpoint, images, straight, *budgets)
    dense = load(straight / "dense")
    assert (logits(dense) - logits(load(straight / "dense_training" / "model"))).abs().max() < 1e-4
    folders = ("target_macs-0.7", "target_macs-0.5")
    for name in folders:
        assert_cut_from(straight / name, dense)
    larger, smaller = (
        json.loads((straight / name / "subnet.json").read_text()) for name in folders
    )
    for name, units in smaller["kept"].items():
        assert set(units) <= set(larger["kept"][name])

    finetune = Run.finetune

    def interrupted(run, *args):
        if run.folder.name == folders[1]:
            raise RuntimeError("the power went")
        return finetune(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finetune", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, cut, *budgets)

    def computed_again(*args):
        raise AssertionError("the basis was computed again")

    monkeypatch.setattr("ofb_hf.workflow.run.rewritten", computed_again)
    run_search(checkpoint, images, cut, *budgets, "--resume_from_checkpoint", "auto")
    for name in ("dense", *folders):
        file = f"{name}/model.safetensors"
        assert (cut / file).read_bytes() == (straight / file).read_bytes(), file


def test_a_stopped_search_goes_on_in_its_basis(checkpoint, images, tmp_path, monkeypatch):
    flags = [*FLAGS, "--save_strategy", "steps", "--save_steps", "1", "--finetune_max_steps", "0"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_search(checkpoint, images, straight, *flags)
    begin = OFBTrainer.begin_search_step

    def interrupted(trainer):
        # after the first steps, which observe, and before the choice
        if trainer.state.global_step == 2:
            raise RuntimeError("the power went")
        begin(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(OFBTrainer, "begin_search_step", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, cut, *flags)
    run_search(checkpoint, images, cut, *flags, "--resume_from_checkpoint", "auto")
    for name in ("subnet.json", "model.safetensors", "dense/model.safetensors"):
        assert (cut / name).read_bytes() == (straight / name).read_bytes(), name


def test_what_was_rewritten_goes_on_to_the_next_commands(checkpoint, images, tmp_path):
    """A finetuning keeps what is known of the cut; starting over removes the rewritten network."""
    run_search(checkpoint, images, tmp_path / "out", *FLAGS, "--finetune_max_steps", "0")
    tuned = tmp_path / "tuned"
    cli.finetune(
        [
            *("--model_name_or_path", str(tmp_path / "out"), "--data_dir", str(images)),
            *("--output_dir", str(tuned), "--max_steps", "1", "--use_cpu", "--report_to", "none"),
        ]
    )
    assert_cut_from(tuned, load(tmp_path / "out" / "dense"))
    assert (tmp_path / "out" / "basis").exists()
    run_search(
        checkpoint, images, tmp_path / "out", "--overwrite_output_dir", "--preset", "bi_mask"
    )
    assert not (tmp_path / "out" / "basis").exists()
    assert "basis" not in (tmp_path / "out" / "subnet.json").read_text()
