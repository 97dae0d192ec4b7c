"""Whole searches that stream from a Hub: every image once per epoch, interrupted or not, whatever
the server does."""

import functools
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import HubServer, Repository
from pictures import LABELS, NUM_IMAGES, SHARD_ROWS, parquet
from PIL import Image
from runs import PRODUCT, run_fresh

from ofb_hf.training.history import read_history

TESTS = Path(__file__).parents[1]
RECIPE = TESTS.parent / "recipes" / "search_deit.py"
DATA = "lab/numbers"
BATCH_SIZE = 8
# DeiT's crops, mirroring, erasing and mixing; nothing that changes the colours that an image's
# number is read from.
AUGMENTATION = ["--augmentation", "deit", "--auto_augment", "none", "--color_jitter", "0"]
QUICK = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]
QUICK += ["--per_device_train_batch_size", str(BATCH_SIZE), "--finetune_max_steps", "2"]
RESULTS = ("subnet.json", "search/model/model.safetensors", "model.safetensors")

pytestmark = pytest.mark.slow


def numbered(number: int) -> bytes:
    """A PNG file whose red and green tell its number, at any size and place; every crop has another
    blue."""
    pixels = np.empty((16, 16, 3), np.uint8)
    pixels[..., :2] = divmod(number, 256)
    pixels[..., 2] = np.random.default_rng(number).integers(0, 256, (16, 16))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbered_data() -> Repository:
    """107 images in 8 shards, row groups of 4, and 6 to evaluate on; image n is of class n % 3."""
    files, first = {}, 0
    for shard, count in enumerate(SHARD_ROWS):
        content = parquet([numbered(n) for n in range(first, first + count)], first)
        files[f"data/train-{shard:05d}-of-{len(SHARD_ROWS):05d}.parquet"] = content
        first += count
    files["data/validation-00000-of-00001.parquet"] = parquet(
        [numbered(n) for n in range(500, 506)]
    )
    return Repository(files)


@dataclass
class Search:
    """One that has ended.

    Args:
        output: its folder; status: of its process; said: everything that was printed.
        batches: numbers of the images of every batch of every rank; labels: in the same order.
    """

    output: Path
    status: int
    said: str
    batches: list[list[list[int]]]
    labels: list[list[list[int]]]


@pytest.fixture(scope="module")
def hub():
    """A Hub with the data."""
    with HubServer({DATA: numbered_data()}) as server:
        yield server


@pytest.fixture(scope="module")
def run(hub, checkpoint, tmp_path_factory) -> Callable[..., Search]:
    """Runs a search in processes of its own, to its end or to a signal."""

    def search(output: Path, ranks: int, workers: int, *flags: str, stop_after: int = 0) -> Search:
        records = output.with_name(f"{output.name}-records")
        records.mkdir(exist_ok=True)
        words = [str(records), str(stop_after), "--model_name_or_path", str(checkpoint)]
        words += ["--match_labels_by_number"]
        words += ["--dataset_name", DATA, "--streaming", "true", "--shuffle_buffer", "16"]
        words += ["--dataloader_num_workers", str(workers), "--output_dir", str(output)]
        if workers:  # they start much faster, and know what the script has patched
            words += ["--dataloader_multiprocessing_context", "fork"]
        words += [*AUGMENTATION, *QUICK, "--max_steps", str(2 * epoch_length(ranks) + 3), *flags]
        environment = hub.environment(tmp_path_factory.mktemp("hf"))
        script = TESTS / "hub_search_process.py"
        status, said = run_fresh(script, *words, ranks=ranks, environment=environment)
        files = [records / f"{rank}.jsonl" for rank in range(ranks)]
        lines = [
            [json.loads(line) for line in file.read_text().splitlines()]
            for file in files
            if file.exists()
        ]
        batches, labels = (
            [[line[key] for line in rank] for rank in lines] for key in ("numbers", "labels")
        )
        return Search(output, status, said, batches, labels)

    return search


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> Callable[[int, int], Search]:
    """Return the search of 2 epochs and 3 steps that nothing happened to, by ranks and workers."""

    @functools.cache
    def search(ranks: int, workers: int) -> Search:
        finished = run(tmp_path_factory.mktemp("straight") / "out", ranks, workers)
        assert finished.status == 0, finished.said[-5000:]
        return finished

    return search


def epoch_length(ranks: int) -> int:
    """Batches of an epoch on every rank."""
    return -(-NUM_IMAGES // (BATCH_SIZE * ranks))


def assert_same_result(search: Search, expected: Search) -> None:
    """Of two searches that saw the same, down to the last bit."""
    assert search.status == 0, search.said[-5000:]
    assert search.batches == expected.batches
    for name in RESULTS:
        assert (search.output / name).read_bytes() == (expected.output / name).read_bytes(), name


def split_epoch(
    batches: list[list[int]], rank: int, ranks: int, epoch: int
) -> tuple[list[int], list[int]]:
    """Numbers of a rank's own images in one epoch, and of those that its last batch is filled up
    with at its end."""
    length, share = (
        epoch_length(ranks),
        NUM_IMAGES * (rank + 1) // ranks - NUM_IMAGES * rank // ranks,
    )
    seen = [number for batch in batches[epoch * length : (epoch + 1) * length] for number in batch]
    return seen[:share], seen[share:]


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        (1, 0),
        pytest.param(1, 2, marks=pytest.mark.thorough),
        pytest.param(2, 0, marks=pytest.mark.thorough),
        (2, 2),
    ],
)
def test_a_search_uses_every_image_once_per_epoch(straight, ranks, workers):
    search, length = straight(ranks, workers), epoch_length(ranks)
    assert [len(batches) for batches in search.batches] == [2 * length + 3] * ranks
    assert {len(batch) for batches in search.batches for batch in batches} == {BATCH_SIZE}
    epochs = []
    for epoch in (0, 1):
        parts = [
            split_epoch(batches, rank, ranks, epoch) for rank, batches in enumerate(search.batches)
        ]
        assert sorted(number for own, _ in parts for number in own) == list(range(NUM_IMAGES))
        for own, again in parts:
            assert len(own) + len(again) == length * BATCH_SIZE
            assert len(set(again)) == len(again) < BATCH_SIZE
            assert set(again) <= set(own)
            assert own != sorted(own)
        epochs.append([own for own, _ in parts])
    for first, second in zip(*epochs, strict=True):
        assert first != second
        assert ranks == 1 or set(first) != set(second)  # ranks do not keep their images
    assert search.labels == [
        [[n % len(LABELS) for n in batch] for batch in batches] for batches in search.batches
    ]
    assert [row["phase"] for row in read_history(search.output / "search_history.jsonl")][-2:] == [
        "finetune"
    ] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_deal_out_the_same_images_in_another_order(straight, ranks):
    """A rank's share of an epoch, and what its last batch is filled up with, do not depend on its
    workers."""
    alone, helped = straight(ranks, 0), straight(ranks, 2)
    for rank, epoch in ((rank, epoch) for rank in range(ranks) for epoch in (0, 1)):
        own, again = split_epoch(alone.batches[rank], rank, ranks, epoch)
        theirs, theirs_again = split_epoch(helped.batches[rank], rank, ranks, epoch)
        assert set(own) == set(theirs)
        assert own != theirs
        assert again == theirs_again


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_a_search_stopped_in_mid_epoch_ends_like_the_straight_one(
    run, straight, tmp_path, ranks, workers
):
    expected, step = straight(ranks, workers), epoch_length(ranks) + 4
    stopped = run(tmp_path / "out", ranks, workers, stop_after=step)
    assert stopped.status == (143 if ranks == 1 else 1), stopped.said[-5000:]
    assert f"stopped by SIGTERM after step {step} of {2 * epoch_length(ranks) + 3}" in stopped.said
    assert stopped.batches == [batches[:step] for batches in expected.batches]
    # The records go on where they ended: nothing that was skipped may appear in them a second time.
    resumed = run(tmp_path / "out", ranks, workers, "--resume_from_checkpoint", "auto")
    assert_same_result(resumed, expected)


class Faults:
    """Every seventh request is answered with 503; the connection is cut within one row group in the
    middle of a shard.

    That goes on for longer than the client repeats a request, which it does five times.
    """

    # where all four workers want that row group at once, at least one of them is cut six times
    cuts_wanted = 21

    def __init__(self, hub: HubServer):
        self.hub, self.requests, self.busy, self.cuts = hub, 0, 0, 0
        self.row_group: str | None = None

    def __call__(self, path: str) -> int | str | None:
        line = self.hub.requests[-1]
        self.requests += 1
        # A file's first row group begins at byte 4; where its footer is wanted, it is read from
        # byte 0.
        if self.row_group is None and re.search(r"^GET .*/train-00003-.* bytes=\d{2,}-", line):
            self.row_group = line
        if line == self.row_group and self.cuts < self.cuts_wanted:
            self.cuts += 1
            return "cut"
        if self.requests % 7 == 0:
            self.busy += 1
            return 503
        return None


def test_a_search_does_not_notice_faults_of_the_server(hub, run, straight, tmp_path, monkeypatch):
    expected, faults = straight(2, 2), Faults(hub)
    monkeypatch.setattr(hub, "fault", faults)
    search = run(tmp_path / "out", 2, 2)
    assert_same_result(search, expected)
    assert faults.busy >= 10
    assert faults.cuts == faults.cuts_wanted
    assert "503 thrown while requesting GET" in search.said
    assert re.search(
        r"reading row \d+ of block \d+: .*peer closed connection.*; attempt 2 of 14", search.said
    )


def test_a_recipe_with_a_config_file_streams_under_accelerate_launch(hub, checkpoint, tmp_path):
    config, output, home = tmp_path / "config.yaml", tmp_path / "out", tmp_path / "hf"
    settings = {
        "model_name_or_path": str(checkpoint),
        "match_labels_by_number": True,
        "streaming": True,
        "shuffle_buffer": 16,
        "target_macs": 0.6,
    }
    settings |= {
        "augmentation": "deit",
        "max_steps": 400,
        "finetune_max_steps": 2,
        "logging_steps": 1,
    }
    settings |= {"per_device_train_batch_size": BATCH_SIZE, "use_cpu": True, "report_to": "none"}
    config.write_text(yaml.safe_dump(settings))
    words = ["--config_file", str(TESTS.parent / "recipes" / "accelerate" / "cpu.yaml")]
    words += [str(TESTS / "recipe_process.py"), str(RECIPE)]
    words += ["--config", str(config), "--dataset_name", DATA]
    words += ["--max_steps", "4", "--output_dir", str(output)]
    script, environment = TESTS / "machine_process.py", hub.environment(home)
    status, said = run_fresh(script, "", "accelerate", *words, environment=environment)
    assert status == 0, said[-5000:]
    assert {path.name for path in output.iterdir()} >= PRODUCT
    history = read_history(output / "search_history.jsonl")
    assert [(row["phase"], row["step"]) for row in history] == [
        ("search", n) for n in (1, 2, 3, 4)
    ] + [
        ("finetune", 1),
        ("finetune", 2),
    ]
    results = json.loads((output / "eval_results.json").read_text())
    assert (
        results["target_macs"]
        == int(0.6 * results["dense"]["macs"])
        >= results["finetuned"]["macs"]
    )
    assert results["dense"]["num_examples"] == 6
    assert DATA in (output / "README.md").read_text()
    # A stream leaves no copy of the training images behind.
    train = hub.repositories[DATA].files["data/train-00000-of-00008.parquet"]
    blobs = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    assert any(b"PNG" in blob for blob in blobs)
    assert not any(numbered(0) in blob or blob == train for blob in blobs)
