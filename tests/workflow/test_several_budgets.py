"""Several budgets in one run: nested models, each in a complete folder, each within its budget,
resumable."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from runs import PRODUCT, QUICK, TESTS, finish, places, refused, run_search, start
from transformers import AutoModelForImageClassification

from ofb_hf import SubnetSpec, cli, count_macs
from ofb_hf.models import OFBViTForImageClassification
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.training.history import read_history
from ofb_hf.workflow import search as workflow
from ofb_hf.workflow.run import Run

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

BUDGETS = {"target_macs-0.8": 0.8, "target_macs-0.6": 0.6, "target_macs-0.4": 0.4}
FLAGS = ["--target_macs", "0.6,0.8,0.4", "--keep_dense", "--max_steps", "48"]
# Each member is cut from the one before as it is.
FLAGS += ["--preset", "bi_mask"]


@pytest.fixture(scope="module")
def finished(checkpoint, images, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "budgets"
    return output, run_search(checkpoint, images, output, *FLAGS)


def subnet_of(folder):
    return SubnetSpec.from_json((folder / "subnet.json").read_text())


def test_every_member_is_complete_and_within_its_budget(finished):
    output, results = finished
    assert list(results) == list(BUDGETS)
    assert json.loads((output / "family.json").read_text()) == results
    with Image.open(output / "family.png") as picture:
        assert len(picture.convert("L").getcolors(256)) > 10
    assert not (output / "FAILED.txt").exists()
    dense = AutoModelForImageClassification.from_pretrained(output / "dense")
    for number, (name, share) in enumerate(BUDGETS.items(), 1):
        assert {path.name for path in (output / name).iterdir()} >= PRODUCT
        assert not (output / name / "FAILED.txt").exists()
        model = AutoModelForImageClassification.from_pretrained(output / name)
        target = int(share * count_macs(dense))
        assert results[name]["target_macs"] == target
        assert (
            results[name]["finetuned"]["macs"]
            == count_macs(model)
            == count_macs(dense, subnet_of(output / name))
        )
        assert 0.9 * target <= count_macs(model) <= target
        # what it took in all
        assert results[name]["steps"] == {"search": 16 * number, "finetune": 3}
        assert results[name]["dense"]["top1"] == results["target_macs-0.8"]["dense"]["top1"]


def assert_nested(output, names):
    """Each member keeps some of the units of the one before, and not all of them."""
    larger, *others = (subnet_of(output / name) for name in names)
    for smaller in others:
        for name, kept in smaller.kept.items():
            assert set(kept) <= set(larger.kept[name]), name
            if isinstance(kept, dict):
                assert all(
                    set(channels) <= set(larger.kept[name][head]) for head, channels in kept.items()
                ), name
        assert smaller != larger
        larger = smaller


def test_each_member_keeps_some_of_the_units_of_the_one_before(finished):
    output, _ = finished
    assert_nested(output, BUDGETS)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_each_member_is_rewritten_anew(family, images, tmp_path, request):
    """It begins with the trained weights of the one before, whose widths it never exceeds."""
    name = {"vit": "checkpoint", "swin": "swin_checkpoint"}[family]
    flags = ["--target_macs", "0.8,0.5", "--max_steps", "12", "--keep_dense"]
    results = run_search(request.getfixturevalue(name), images, tmp_path / "out", *flags)
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "dense")
    larger, smaller = (subnet_of(tmp_path / "out" / member) for member in results)
    assert larger.basis == smaller.basis == "equivalent"
    for submodule, shape in smaller.shapes.items():
        pairs = zip(shape, larger.shapes[submodule], strict=True)
        assert all(small <= large for small, large in pairs), submodule
    for member, share in zip(results, (0.8, 0.5), strict=True):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / member)
        assert count_macs(model) == results[member]["finetuned"]["macs"]
        assert count_macs(model) <= share * count_macs(dense)


def test_a_swin_takes_several_budgets_too(swin_checkpoint, images, tmp_path):
    output = tmp_path / "budgets"
    results = run_search(
        swin_checkpoint,
        images,
        output,
        "--target_macs",
        "0.8,0.5",
        "--keep_dense",
        "--max_steps",
        "24",
        "--preset",
        "bi_mask",
    )
    dense = AutoModelForImageClassification.from_pretrained(output / "dense")
    assert_nested(output, results)
    for name, share in (("target_macs-0.8", 0.8), ("target_macs-0.5", 0.5)):
        macs = count_macs(AutoModelForImageClassification.from_pretrained(output / name))
        assert (
            results[name]["finetuned"]["macs"]
            == macs
            == count_macs(dense, subnet_of(output / name))
        )
        assert 0.9 * share < macs / count_macs(dense) <= share


def test_several_budgets_are_resumed_where_they_stopped(
    finished, checkpoint, images, tmp_path, monkeypatch
):
    """Stopped in the finetuning of the second member: what was done is not done again."""
    output, finetune = tmp_path / "budgets", Run.finetune

    def interrupted(run, *args):
        if run.folder.name == "target_macs-0.6":
            raise RuntimeError("the power went")
        return finetune(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finetune", interrupted)
        with pytest.raises(RuntimeError, match="power"):
            run_search(checkpoint, images, output, *FLAGS)
    assert "the power went" in (output / "FAILED.txt").read_text()
    assert "the power went" in (output / "target_macs-0.6" / "FAILED.txt").read_text()
    done = output / "target_macs-0.6" / "search" / "model" / "model.safetensors"
    before = done.stat().st_mtime_ns
    first = (output / "target_macs-0.8" / "eval_results.json").read_bytes()
    results = run_search(checkpoint, images, output, *FLAGS, "--resume_from_checkpoint", "auto")
    assert done.stat().st_mtime_ns == before
    # The finished member is neither measured again nor forgets how long it took.
    assert (output / "target_macs-0.8" / "eval_results.json").read_bytes() == first
    assert results["target_macs-0.8"]["seconds"] is not None
    assert not list(output.rglob("FAILED.txt"))
    for name in BUDGETS:
        file = f"{name}/model.safetensors"
        assert (output / file).read_bytes() == (finished[0] / file).read_bytes(), file
        phases = [row["phase"] for row in read_history(output / name / "search_history.jsonl")]
        assert phases == ["search"] * 16 + ["finetune"] * 3


def test_starting_over_removes_the_members_of_the_last_run(finished, checkpoint, images, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "copy")
    run_search(checkpoint, images, output, "--target_macs", "0.5", "--overwrite_output_dir")
    assert not list(output.glob("target_*"))
    assert not (output / "family.json").exists()


def test_given_candidates_and_dense_training_go_with_several_budgets(checkpoint, images, tmp_path):
    flags = [
        "--target_params",
        "0.8",
        "0.5",
        "--mlp_candidates",
        "8",
        "16",
        "32",
        "72",
        "--dense_epochs",
        "1",
    ]
    results = run_search(checkpoint, images, tmp_path / "out", *flags, "--finetune_max_steps", "0")
    assert list(results) == ["target_params-0.8", "target_params-0.5"]
    for name in results:
        sizes = subnet_of(tmp_path / "out" / name).sizes
        assert all(size in (8, 16, 32, 72) for name, size in sizes.items() if name.endswith("mlp"))
        assert results[name]["searched"]["params"] <= results[name]["target_params"]
        assert "finetuned" not in results[name]


DEPTH = ["--target_macs", "0.12", "0.07", "--search_depth"]
DEPTH += ["--max_steps", "32", "--finetune_max_steps", "0"]


def assert_shallower(output, results):
    """Both members meet their budgets, and the smaller one lacks all that the larger one lacks."""
    larger, smaller = (subnet_of(output / name) for name in results)
    assert any(not kept for kept in smaller.kept.values())
    assert all(not smaller.kept[name] for name, kept in larger.kept.items() if not kept)
    for name, result in results.items():
        model = AutoModelForImageClassification.from_pretrained(output / name)
        assert count_macs(model) == result["searched"]["macs"] <= result["target_macs"]


def test_a_search_for_depth_leaves_out_what_an_earlier_member_left_out(
    checkpoint, images, tmp_path
):
    results = run_search(checkpoint, images, tmp_path / "out", *DEPTH)
    assert_shallower(tmp_path / "out", results)


def test_two_ranks_leave_out_the_same_in_every_member(checkpoint, images, tmp_path):
    """Every cut compares the networks of the ranks, and stops the run if they differ."""
    output = tmp_path / "out"
    words = [*places(checkpoint, images, output), *QUICK, *DEPTH]
    words += ["--per_device_train_batch_size", "4"]
    recipe = TESTS.parent / "recipes" / "search_deit.py"
    status, said = finish(start("recipe_process.py", str(recipe), *words, ranks=2))
    assert status == 0, said[-3000:]
    results = json.loads((output / "family.json").read_text())
    assert_shallower(output, results)
    assert json.loads((output / "run_settings.json").read_text())["num_processes"] == 2


def test_units_of_a_cut_of_a_cut_are_counted_in_the_first_network():
    parent = SubnetSpec({"embeddings": (1, 4, 6), "layers.0.attention": {0: (2, 3), 2: (0, 5)}})
    child = SubnetSpec({"embeddings": (0, 2), "layers.0.attention": {1: (1,)}})
    assert child.within(parent) == SubnetSpec(
        {"embeddings": (1, 6), "layers.0.attention": {2: (5,)}}
    )


def test_cutting_twice_is_cutting_once(finished):
    output, _ = finished
    dense = AutoModelForImageClassification.from_pretrained(output / "dense")
    larger, smaller = subnet_of(output / "target_macs-0.8"), subnet_of(output / "target_macs-0.4")
    ours = OFBViTForImageClassification.from_dense(dense)
    relative = {name: _relative(units, larger.kept[name]) for name, units in smaller.kept.items()}
    twice = slice_model(slice_model(ours, larger), SubnetSpec(relative))
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(
            twice.eval()(pixels).logits, slice_model(ours, smaller).eval()(pixels).logits
        )


def _relative(units, parent):
    if isinstance(units, dict):
        heads = list(parent)
        return {
            heads.index(h): tuple(parent[h].index(c) for c in channels)
            for h, channels in units.items()
        }
    return tuple(parent.index(unit) for unit in units)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_macs", "0.5,half"], "target_macs is 0.5, half; give numbers"),
        (["--target_macs", "0.5,0"], "target_macs is 0.0; give a fraction"),
        (["--target_macs", "0.5,", "0.5"], "the same budget twice"),
        (["--target_macs", "0.5,0.01"], "below the smallest subnet"),
        (
            ["--target_macs", "0.5,0.4", "--push_to_hub", "--hub_model_id", "a/b"],
            "publish each finished folder",
        ),
        (
            ["--target_macs", "0.5,0.4", "--resume_from_checkpoint", "x/checkpoint-1"],
            "no complete checkpoint",
        ),
    ],
)
def test_impossible_budgets_are_refused_before_anything_starts(
    checkpoint, images, tmp_path, capsys, flags, message
):
    assert re.search(message, refused(capsys, checkpoint, images, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


def test_another_set_of_budgets_is_another_run(finished, checkpoint, images, capsys):
    flags = ["--target_macs", "0.8,0.6", "--resume_from_checkpoint", "auto", "--max_steps", "48"]
    assert "target_macs" in refused(capsys, checkpoint, images, finished[0], *flags)


def test_the_papers_preset_distils_in_no_member(checkpoint, images, tmp_path, monkeypatch):
    shares = []

    class Noted(workflow.OFBTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            shares.append((self.distillation_weight, self.teacher))

    monkeypatch.setattr(workflow, "OFBTrainer", Noted)
    run_search(
        checkpoint, images, tmp_path / "out", "--preset", "paper", "--target_macs", "0.8,0.6"
    )
    assert shares == [(0.0, None)] * 2


def test_only_folders_of_runs_are_removed_when_starting_over(checkpoint, images, tmp_path):
    (tmp_path / "out" / "target_practice").mkdir(parents=True)
    run_search(checkpoint, images, tmp_path / "first", "--finetune_max_steps", "0")
    shutil.copytree(tmp_path / "first", tmp_path / "out", dirs_exist_ok=True)
    run_search(
        checkpoint, images, tmp_path / "out", "--finetune_max_steps", "0", "--overwrite_output_dir"
    )
    assert (tmp_path / "out" / "target_practice").is_dir()


def test_help_teaches_several_budgets(capsys):
    with pytest.raises(SystemExit):
        cli.search(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0.7,0.5,0.35" in said
