"""`ofb-hf search-tokens` from checkpoint to output folder, and the picture of what becomes of
patches."""

import itertools
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from factories import scheduled_vit, tiny_images, tiny_vit
from PIL import Image
from runs import PRODUCT, QUICK, places, run_search
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from ofb_hf import OFBViTForImageClassification, SubnetSpec, cli, count_macs, publish
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.latency import PICOSECONDS, LatencyTable, count_latency
from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.pictures.token_maps import DROPPED, draw_tokens, paint_tokens, trace_tokens
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.token_search.learned_counts import TokenSearchConfig
from ofb_hf.workflow import results as run_results

# Whole commands: together they take too long for `make quick`.
pytestmark = pytest.mark.slow

SETTINGS = ["--token_learning_rate", "0.3", "--max_steps", "8", *QUICK]


def search_tokens(checkpoint, images, output, *flags, macs=True):
    """The command on a checkpoint and a folder of images, under a budget in MACs unless the flags
    have another."""
    budget = ["--target_macs", "0.75"] if macs else []
    return cli.search_tokens([*places(checkpoint, images, output), *SETTINGS, *budget, *flags])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stock ViT of four layers and its image processor."""
    folder, names = tmp_path_factory.mktemp("checkpoint") / "vit", ["blue", "green", "red"]
    labels = {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
    tiny_vit(num_hidden_layers=4, **labels).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def output(checkpoint, images, tmp_path_factory):
    """The output folder of a search for tokens without finetuning."""
    folder = tmp_path_factory.mktemp("tokens") / "out"
    search_tokens(checkpoint, images, folder)
    return folder


def test_the_output_folder_is_complete_and_within_budget(checkpoint, output):
    results = json.loads((output / "eval_results.json").read_text())
    assert PRODUCT - {"subnet.json"} | {"tokens.png"} <= {path.name for path in output.iterdir()}
    assert not (output / "FAILED.txt").exists()
    dense = AutoModelForImageClassification.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert results["target_macs"] == int(0.75 * count_macs(dense))
    assert results["searched"]["macs"] == count_macs(model) <= results["target_macs"]
    assert model.config.token_schedule == results["token_schedule"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True)
    )
    card = (output / "README.md").read_text()
    kept, merged = model.config.token_schedule[1]
    assert f"| 1 | {kept} | {merged} |" in card
    assert "those of the parent" in card
    rows = [json.loads(line) for line in (output / "search_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "search"] == list(range(1, 9))
    assert all(row["expected_macs"] > 0 for row in rows)
    with Image.open(output / "tokens.png") as picture:
        assert picture.width > 100


def test_what_is_published_leaves_the_pictures_of_the_data_out(output, tmp_path):
    folder = publish(output, output_dir=tmp_path / "published")
    names = {path.name for path in folder.iterdir()}
    assert "modeling_ofb_vit.py" in names
    assert not names & {"tokens.png", "stock", "subnet.json"}


def test_pixels_that_are_not_normalised_can_be_drawn(checkpoint, images, tmp_path, monkeypatch):
    undone = []

    def draw(model, pixels, mean, std, path):
        undone.append((mean, std))
        draw_tokens(model, pixels, mean, std, path)

    monkeypatch.setattr(run_results, "draw_tokens", draw)
    source = shutil.copytree(checkpoint, tmp_path / "source")
    file = source / "preprocessor_config.json"
    raw = {"do_normalize": False, "image_mean": None, "image_std": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | raw))
    search_tokens(source, images, tmp_path / "out")
    (numbers,) = undone
    assert numbers == ([0.0] * 3, pytest.approx([1.0] * 3))
    assert (tmp_path / "out" / "tokens.png").is_file()


def test_it_goes_on_to_finetuning_and_can_be_resumed(checkpoint, images, output, tmp_path):
    folder = tmp_path / "out"
    flags = ["--finetune_max_steps", "2", "--token_pictures", "0"]
    results = search_tokens(checkpoint, images, folder, *flags)
    assert results["finetuned"]["macs"] == results["searched"]["macs"]
    assert not (folder / "tokens.png").exists()
    again = search_tokens(checkpoint, images, folder, *flags, "--resume_from_checkpoint", "auto")
    assert again["token_schedule"] == results["token_schedule"]
    assert again["finetuned"]["top1"] == results["finetuned"]["top1"]
    assert (
        results["token_schedule"]
        == json.loads((output / "eval_results.json").read_text())["token_schedule"]
    )


def test_a_second_search_is_measured_against_the_model_with_all_its_tokens(
    output, images, tmp_path
):
    first = json.loads((output / "eval_results.json").read_text())
    results = search_tokens(output, images, tmp_path / "again", "--target_macs", "0.9")
    assert (
        results["dense"]["macs"]
        == first["dense"]["macs"]
        > results["searched"]["macs"]
        > first["searched"]["macs"]
    )


def test_tokens_after_widths_keep_the_record_of_the_units(checkpoint, images, tmp_path):
    """A search for widths and depth, and one for tokens of what it made."""
    narrow = tmp_path / "narrow"
    run_search(
        checkpoint,
        images,
        narrow,
        "--preset",
        "bi_mask",
        "--target_macs",
        "0.7",
        "--search_depth",
        "mlp",
        "--finetune_max_steps",
        "0",
    )
    results = search_tokens(narrow, images, tmp_path / "both", "--token_pictures", "0")
    before, after = (
        SubnetSpec.from_json((folder / "subnet.json").read_text())
        for folder in (narrow, tmp_path / "both")
    )
    assert after.kept == before.kept
    assert after.token_schedule == results["token_schedule"]
    dense = OFBViTForImageClassification.from_dense(
        AutoModelForImageClassification.from_pretrained(checkpoint)
    )
    longer = tmp_path / "longer"
    cli.finetune([*places(tmp_path / "both", images, longer), *QUICK, "--max_steps", "1"])
    assert SubnetSpec.from_json((longer / "subnet.json").read_text()) == after
    kept, merged = results["token_schedule"][1]
    assert f"| 1 | {kept} | {merged} |" in (longer / "README.md").read_text()
    assert slice_model(dense, after).config.token_schedule == results["token_schedule"]
    assert count_macs(dense, after) == results["searched"]["macs"]


def test_widths_and_tokens_in_one_run(checkpoint, images, tmp_path):
    """`ofb-hf search --search_tokens`: everything that a search writes, with the tokens in it."""
    folder, published = tmp_path / "out", tmp_path / "published"
    results = run_search(
        checkpoint, images, folder, "--target_macs", "0.4", "--search_tokens", "--search_depth"
    )
    assert {path.name for path in folder.iterdir()} >= PRODUCT | {"tokens.png"}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert results["token_schedule"] == model.config.token_schedule
    assert (
        0.98 * results["target_macs"]
        <= results["finetuned"]["macs"]
        == count_macs(model)
        <= results["target_macs"]
    )
    subnet = SubnetSpec.from_json((folder / "subnet.json").read_text())
    assert subnet.token_schedule == model.config.token_schedule
    kept, merged = subnet.token_schedule[-1]
    assert f"| 3 | {kept} | {merged} |" in (folder / "README.md").read_text()
    rows = [json.loads(line) for line in (folder / "search_history.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == [left for _, left in subnet.token_schedule]
    assert not {"stock", "tokens.png"} & {
        path.name for path in publish(folder, output_dir=published).iterdir()
    }


@pytest.fixture(scope="module")
def measured(checkpoint, tmp_path_factory):
    """A measured table of that model with large batches, which fewer tokens make faster; and a
    budget within reach."""
    file = tmp_path_factory.mktemp("table") / "table.json"
    flags = [
        "--networks",
        "12",
        "--rounds",
        "2",
        "--batch_size",
        "256",
        "--num_threads",
        "1",
        "--disable_tqdm",
        "true",
    ]
    table, model = (
        cli.latency_table([str(checkpoint), "--output", str(file), *flags]),
        tiny_vit(num_hidden_layers=4),
    )
    with pytest.raises(UnreachableBudgetError) as refusal:
        TokenSearchConfig(target_latency_ms=1e-3, latency_table=table.to_dict()).target_for(
            model.config
        )
    between = (refusal.value.smallest + count_latency(model, table)) / 2
    return ["--latency_table", str(file), "--target_latency_ms", str(between / PICOSECONDS)], table


def test_tokens_for_milliseconds_and_their_record(checkpoint, images, measured, tmp_path, capsys):
    folder, (flags, table) = tmp_path / "out", measured
    results = search_tokens(checkpoint, images, folder, *flags, macs=False)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert LatencyTable.load(folder / "latency_table.json").coefficients == table.coefficients
    assert results["target_macs"] is None
    assert count_latency(model, table) <= round(results["target_latency_ms"] * PICOSECONDS)
    assert results["searched"]["predicted_latency_ms"] == count_latency(model, table) / PICOSECONDS
    assert results["dense"]["predicted_latency_ms"] > results["target_latency_ms"]
    assert all(results[name]["latency_ms"] > 0 for name in ("dense", "searched"))
    said = f"budget of at most {results['target_latency_ms']:,} ms for a batch of 256 with 1 thread"
    assert said in (folder / "README.md").read_text()
    rows = [json.loads(line) for line in (folder / "search_history.jsonl").read_text().splitlines()]
    assert all(row["expected_latency_ms"] > 0 for row in rows if row["phase"] == "search")
    again = ["--resume_from_checkpoint", "auto"]
    assert search_tokens(checkpoint, images, folder, *flags, *again, macs=False)["token_schedule"]
    for other, name in (
        (["--target_latency_ms", "1e9"], "target_latency_ms"),
        (["--target_macs", "0.7"], "one budget"),
    ):
        with pytest.raises(SystemExit):
            search_tokens(checkpoint, images, folder, *flags, *other, *again, macs=False)
        assert name in capsys.readouterr().err


def test_milliseconds_are_written_down_beside_macs_and_for_widths_and_tokens_together(
    checkpoint, images, measured, tmp_path
):
    flags, table = measured
    results = search_tokens(checkpoint, images, tmp_path / "macs", *flags[:2])
    assert results["searched"]["macs"] <= results["target_macs"]
    assert results["searched"]["predicted_latency_ms"] > 0
    together = run_search(
        checkpoint,
        images,
        tmp_path / "both",
        *flags,
        "--search_tokens",
        "--finetune_max_steps",
        "0",
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "both")
    assert count_latency(model, table) <= round(together["target_latency_ms"] * PICOSECONDS)
    assert together["searched"]["predicted_latency_ms"] == count_latency(model, table) / PICOSECONDS


def test_models_whose_tokens_nothing_ranks_are_refused_before_anything_starts(
    images, tmp_path, capsys
):
    tiny_vit(num_hidden_layers=2).save_pretrained(tmp_path / "gone")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "gone")
    with pytest.raises(SystemExit) as stopped:
        search_tokens(tmp_path / "gone", images, tmp_path / "out")
    assert stopped.value.code == 2
    assert "in models with attention in at least 3 layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target_macs", "0.01"], "below the smallest token schedule"),
        (["--token_pictures", "-1"], "token_pictures is -1"),
        (["--token_granularity", "0"], "token_granularity is 0"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    checkpoint, images, tmp_path, capsys, flags, message
):
    with pytest.raises(SystemExit) as stopped:
        search_tokens(checkpoint, images, tmp_path / "out", *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_swin_is_refused_with_an_explanation(swin_checkpoint, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        search_tokens(swin_checkpoint, images, tmp_path / "out")
    assert "class token" in capsys.readouterr().err


def test_demonstration_path_at_a_tiny_size(tmp_path, monkeypatch):
    """The recipe itself, in this process."""
    monkeypatch.chdir(tmp_path)
    flags = "--dense_epochs 1 --max_steps 6 --max_train_samples 96 --max_eval_samples 24 "
    flags += "--disable_tqdm true"
    monkeypatch.setattr(sys, "argv", ["search_tokens", *flags.split()])
    runpy.run_path(
        str(Path(__file__).parents[2] / "recipes" / "search_tokens.py"), run_name="__main__"
    )
    results = json.loads((tmp_path / "runs" / "demo_tokens" / "eval_results.json").read_text())
    assert (
        results["searched"]["macs"] <= results["target_macs"] == int(0.7 * results["dense"]["macs"])
    )
    assert "finetuned" not in results


# ----------------------------------------------------------------------------------------- pictures


def test_patches_are_traced_to_where_they_are():
    model = scheduled_vit()  # 17 tokens: 15 by merging 2; 12 and then 7; 2 by merging 5
    traced = trace_tokens(model, tiny_images(3))
    patches = torch.arange(16)
    for ends, dropped, left in zip(traced, (0, 3, 3), (14, 6, 1), strict=True):
        for place in ends:
            assert len(place[place >= 0].unique()) == left
            # a token that is dropped takes along what was merged into it
            assert (place == DROPPED).sum() >= dropped
            alive = place >= 0
            # a token that takes in others is where it was
            assert (place[place[alive]] == place[alive]).all()
    for earlier, later in itertools.pairwise(traced):
        assert ((later == DROPPED) | (earlier != DROPPED)).all()
        gone = (earlier != patches) & (earlier != DROPPED)
        assert (later[gone] == later.gather(1, earlier.clamp(min=0))[gone]).all()


def test_patches_with_equal_content_are_merged_with_each_other():
    model = scheduled_vit([[17, 17], [17, 2], [2, 2]])
    places = trace_tokens(model, tiny_images())[1]
    assert all(len(place.unique()) == 1 for place in places)


def test_painting_shows_all_three_fates():
    image = torch.rand(3, 8, 8)
    painted = paint_tokens(image, torch.tensor([0, DROPPED, 2, 2]), patch_size=4)
    assert torch.equal(painted[:, :4, :4], image[:, :4, :4])
    torch.testing.assert_close(painted[:, :4, 4:], 0.25 * image[:, :4, 4:])
    mean = image[:, 4:].mean((1, 2), keepdim=True)
    torch.testing.assert_close(painted[:, 4:], mean.expand(3, 4, 8))


def test_pictures_need_a_schedule(tmp_path):
    draw_tokens(scheduled_vit(), tiny_images(2), [0.5] * 3, [0.5] * 3, tmp_path / "tokens.png")
    with Image.open(tmp_path / "tokens.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(ValueError, match="no token_schedule"):
        trace_tokens(tiny_vit(), tiny_images())
    with pytest.raises(UnsupportedArchitectureError, match="class token"):
        trace_tokens(torch.nn.Linear(1, 1), tiny_images())
    with pytest.raises(TypeError, match=r"got a OFBViTModel; .*OFBViTForImageClassification"):
        trace_tokens(scheduled_vit().vit, tiny_images())
