"""Streams are as exact as data on the disk: every image once, also after an interruption or a fault
of the network."""

import gc
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hub_server import HubServer, Repository
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from pictures import (
    LABELS,
    NUM_IMAGES,
    SHARD_ROWS,
    noisy_number_of,
    numbers,
    repository,
    stream,
    write,
)
from runs import finish, run_fresh, start
from stream_process import train

from ofb_hf import hub_retries as network
from ofb_hf.data import DataArguments, ImageStream, SeededImages, StreamBrokenError, load_image_data
from ofb_hf.data.row_blocks import Row, read_patiently

# Whole commands: together they take too long for `make quick`.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

BATCH_SIZE = 5
TESTS = Path(__file__).parents[1]


# Whole epochs


def test_repeated_images_are_augmented_differently_and_resumed_exactly(shards):
    images = ImageStream(stream(shards).split, noisy_number_of, seed=1, repeats=3)
    seen = Counter()
    for epoch in range(3):
        images.set_epoch(epoch)
        loader = images.loader(BATCH_SIZE)
        batches = [batch["pixel_values"] for batch in loader]
        assert len(batches) == -(-NUM_IMAGES // BATCH_SIZE)
        rest = [batch["pixel_values"] for batch in skip_first_batches(loader, 7)]
        assert all(torch.equal(a, b) for a, b in zip(batches[7:], rest, strict=True))
        drawn = torch.cat(batches)
        seen.update(drawn[:, 0].int().tolist())
        assert len(set(drawn[:, 0].tolist())) == pytest.approx(NUM_IMAGES / 3, abs=3)
        assert len(set(drawn[:-BATCH_SIZE, 1].tolist())) == len(drawn) - BATCH_SIZE
    assert set(seen) == set(range(NUM_IMAGES))


def test_no_two_times_of_an_image_are_augmented_alike(shards):
    """Over two rounds of epochs: six times of every image."""
    images, noise = ImageStream(stream(shards).split, noisy_number_of, seed=1, repeats=3), {}
    for epoch in range(6):
        images.set_epoch(epoch)
        for number, value in torch.cat(
            [batch["pixel_values"] for batch in images.loader(1)]
        ).tolist():
            noise.setdefault(number, set()).add((epoch, value))
    for times in noise.values():
        values = {value for _, value in times}
        assert len(values) == len(times) >= 4


def test_rows_that_had_their_turn_are_let_go(shards):
    def rows_in_memory() -> int:
        # without what conftest.py has frozen, which is most
        return sum(type(thing) is Row for thing in gc.get_objects())

    images, most = stream(shards), 0
    gc.collect()
    before = rows_in_memory()  # of earlier tests
    for _ in images.loader(1):
        most = max(most, rows_in_memory() - before)
    assert 8 <= most <= 8 + 6  # some are on their way


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_has_every_image_once(shards, world_size, workers):
    images, orders = stream(shards), []
    assert len(images) == NUM_IMAGES
    for epoch in (0, 1):
        images.set_epoch(epoch)
        ranks = []
        for rank in range(world_size):
            loader = images.loader(BATCH_SIZE, rank, world_size, workers)
            batches = list(loader)
            assert len(batches) == len(loader) == -(-NUM_IMAGES // (BATCH_SIZE * world_size))
            assert {tuple(batch["pixel_values"].shape) for batch in batches} == {(BATCH_SIZE,)}
            assert all(
                batch["labels"].tolist() == [n % 3 for n in numbers([batch])] for batch in batches
            )
            assert images.bad_images.bad == 0
            assert images.end_epoch() is None
            assert numbers(loader) == numbers(batches)
            ranks.append(numbers(batches))
        times = Counter(number for rank in ranks for number in rank)
        assert sorted(times) == list(range(NUM_IMAGES))
        assert sum(times.values()) == NUM_IMAGES + len(ranks[0]) * world_size - NUM_IMAGES
        assert max(times.values()) <= 2
        orders.append(ranks)
    assert orders[0] != orders[1]
    assert numbers(stream(shards, seed=2).loader(BATCH_SIZE)) != numbers(
        stream(shards).loader(BATCH_SIZE)
    )


def test_images_mix_across_shards(shards):
    """With a buffer of a quarter of the data, half a batch of 8 comes from at least three
    shards."""
    shard_of = np.repeat(np.arange(len(SHARD_ROWS)), SHARD_ROWS)
    batches = list(stream(shards, shuffle_buffer=NUM_IMAGES // 4).loader(8))
    assert np.mean([len(set(shard_of[numbers([batch])])) for batch in batches]) > 3


def test_streamed_and_loaded_images_are_augmented_alike(shards):
    """Random transforms follow seed, epoch and the image's place in the data; not rank, worker or
    order."""
    loaded = load_image_data(DataArguments(data_dir=str(shards)))
    rows = SeededImages(
        loaded.train, noisy_number_of, loaded.image_column, loaded.label_column, seed=1
    )
    rows.set_epoch(2)
    expected = {int(row["pixel_values"][0]): row for row in rows}
    images = stream(shards, noisy_number_of)
    images.set_epoch(2)
    state = torch.get_rng_state()
    for workers, world_size in ((0, 1), (2, 1), (0, 2)):
        for batch in images.loader(BATCH_SIZE, num_workers=workers, world_size=world_size):
            for values, label in zip(batch["pixel_values"], batch["labels"], strict=True):
                row = expected[int(values[0])]
                assert torch.equal(values, row["pixel_values"])
                assert label == row["labels"]
    assert torch.equal(torch.get_rng_state(), state)


# Going on in the middle of an epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_after_skipped_ones_are_the_same(tmp_path, workers):
    """Also around images that cannot be decoded; and what is skipped is neither decoded nor
    augmented."""
    folder = write(tmp_path / "data", repository(broken=[3, 40, 41, 99]))
    images = stream(folder, noisy_number_of, max_bad_share=0.5)
    images.set_epoch(1)
    loader = images.loader(BATCH_SIZE, num_workers=workers)
    batches = [batch["pixel_values"] for batch in loader]
    assert images.bad_images.bad >= 4
    for skipped in (1, 4, 7, len(batches) - 1):
        following = [batch["pixel_values"] for batch in skip_first_batches(loader, skipped)]
        assert len(following) == len(batches) - skipped
        assert all(torch.equal(a, b) for a, b in zip(following, batches[skipped:], strict=True))
        # An image that replaces a bad one at the end of a batch is looked at for the next batch as
        # well.
        assert images.bad_images.seen <= (len(batches) - skipped) * BATCH_SIZE + 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_resumes_where_it_was(shards, tmp_path, workers):
    """In an epoch, between two epochs, and after the last batch of a step that is not full."""
    settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
    straight = train(tmp_path, shards, **settings)
    assert len(straight) == 66
    epochs = [
        sorted({int(n) for batch in straight[e : e + 22] for n in batch[:, 0]}) for e in (0, 22, 44)
    ]
    assert epochs == [list(range(NUM_IMAGES))] * 3
    assert not torch.equal(straight[0], straight[22])
    for step in (5, 15, 30) if workers == 0 else (15,):
        resumed = train(tmp_path, shards, str(tmp_path / f"checkpoint-{step}"), **settings)
        assert len(resumed) == 66 - 2 * step
        assert all(torch.equal(a, b) for a, b in zip(resumed, straight[2 * step :], strict=True))


def test_two_ranks_share_an_epoch_and_resume(shards, tmp_path):
    process = start("stream_process.py", "train", str(shards), str(tmp_path), ranks=2)
    status, said = finish(process)
    assert status == 0, said
    ranks = [torch.load(tmp_path / f"seen-{rank}.pt", weights_only=True) for rank in range(2)]
    for seen in ranks:
        assert len(seen["straight"]) == 33
        assert all(
            torch.equal(a, b) for a, b in zip(seen["resumed"], seen["straight"][10:], strict=True)
        )
    for epoch in range(3):
        batches = [
            batch for seen in ranks for batch in seen["straight"][11 * epoch : 11 * epoch + 11]
        ]
        times = Counter(int(number) for batch in batches for number in batch[:, 0])
        assert sorted(times) == list(range(NUM_IMAGES))
        assert sum(times.values()) == NUM_IMAGES + 3


# The network


class _Unsteady:
    """Rows 0..9 in one block; reading fails at the given rows, as often as it says."""

    def __init__(self, faults: dict[int, int], error: Exception):
        self.rows, self.faults, self.error, self.opened = np.array([10]), dict(faults), error, 0

    def read(self, block, start):
        self.opened += 1
        for number in range(start, 10):
            if self.faults.get(number, 0):
                self.faults[number] -= 1
                raise self.error
            yield Row(b"", number, str(number))


def hub_error(status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "http://hub"))
    return HfHubHTTPError(f"status {status}", response=response)


def wrapped(cause: Exception) -> Exception:
    error = OSError("cannot read the file")
    error.__cause__ = cause
    return error


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for, without waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(network.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        TimeoutError(),
        httpx.ConnectError("no route"),
        httpx.RemoteProtocolError("cut"),
        *map(hub_error, (408, 429, 500, 503, 504)),
        wrapped(hub_error(503)),
    ],
)
def test_reading_goes_on_where_the_network_failed(error, waits):
    source = _Unsteady({2: 1, 3: 3, 9: 2}, error)
    assert [row.label for row in read_patiently(source, 0, 1)] == list(range(1, 10))
    assert source.opened == 7
    for wait, expected in zip(waits, (1, 1, 2, 4, 1, 2), strict=True):
        assert expected <= wait <= 1.25 * expected


@pytest.mark.parametrize(
    "error",
    [
        *map(hub_error, (400, 401, 403, 404, 416)),
        FileNotFoundError(),
        ValueError("corrupt"),
        OfflineModeIsEnabled("off"),
    ],
)
def test_other_errors_are_not_waited_for(error, waits):
    with pytest.raises(type(error)):
        list(read_patiently(_Unsteady({2: 1}, error), 0, 0))
    assert waits == []


def test_a_network_that_stays_down_ends_the_run(waits):
    with pytest.raises(
        StreamBrokenError,
        match=r"reading row 4 of block 0: 14 attempts in a row failed, .* status 503",
    ):
        list(read_patiently(_Unsteady({4: 99}, hub_error(503)), 0, 0))
    assert 1700 < sum(waits) < 2200


def test_data_that_changes_under_a_run_is_noticed(shards):
    images = stream(shards)
    images.split = replace(
        images.split, source=replace(images.split.source, rows=images.split.source.rows + 1)
    )
    with pytest.raises(RuntimeError, match=r"block \d+ ended before its row 4: the data changed"):
        list(images.loader(1))


# The real client, and a Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What a process of its own got from a Hub with faults: (results by data set, requests, what it
    said)."""
    requests: Counter[str] = Counter()

    def fault(path: str) -> int | str | None:
        name = next((name for name in repositories if f"/{name}/" in f"{path}/"), "")
        requests[name] += 1
        if name == "lab/busy":
            return 503 if requests[name] % 7 == 0 else None
        if name == "lab/down":  # for longer than the client repeats a request
            return 503 if 40 <= requests[name] < 60 else None
        if name == "lab/cut":
            return (
                "cut"
                if "train-00003" in path and requests[name] > 30 and requests[name] % 2
                else None
            )
        return None

    refused = "Access to dataset lab/gated is restricted and you are not in the authorized list."
    repositories = {
        name: Repository(repository()) for name in ("lab/steady", "lab/busy", "lab/down", "lab/cut")
    }
    repositories |= {
        "lab/gated": Repository(repository(), (403, "GatedRepo", refused)),
        "lab/gated-files": Repository(repository(), (401, "GatedRepo", refused), listed=True),
        "lab/old-token": Repository(
            repository(), (401, "", "Invalid credentials in Authorization header")
        ),
    }
    with HubServer(repositories, fault) as server:
        names = [
            "lab/steady:0",
            "lab/busy:2",
            "lab/down:2",
            "lab/cut:0",
            *list(repositories)[4:],
            "lab/missing",
        ]
        status, said = run_fresh(
            TESTS / "stream_process.py",
            "epochs",
            *names,
            environment=server.environment(tmp_path_factory.mktemp("hf")),
        )
        assert status == 0, said
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return {line["name"]: line for line in lines}, server.requests, said


@pytest.mark.parametrize("name", ["lab/steady", "lab/busy", "lab/down", "lab/cut"])
def test_a_hub_with_faults_gives_every_image_once(hub, name):
    results, _, said = hub
    assert "error" not in results[name], results[name]
    batches = results[name]["numbers"]
    assert [len(batch) for batch in batches] == [5] * 22
    times = Counter(number for batch in batches for number in batch)
    assert sorted(times) == list(range(NUM_IMAGES))
    assert sum(times.values()) == NUM_IMAGES + 3
    assert results[name]["labels"] == list(LABELS)
    assert results[name]["eval"] == 6
    if name != "lab/steady":
        assert "503 thrown while requesting GET" in said


def test_faults_do_not_change_what_is_seen(hub):
    results, _, said = hub
    assert results["lab/cut"]["numbers"] == results["lab/steady"]["numbers"]
    assert results["lab/down"]["numbers"] == results["lab/busy"]["numbers"]
    assert re.search(
        r"reading row \d+ of block \d+: HfHubHTTPError: .*503.*; attempt 2 of 14 in", said
    )
    assert "peer closed connection without sending complete message body" in said


def test_only_what_is_needed_travels(hub):
    _, requests, _ = hub
    steady = [line for line in requests if "/lab/steady/resolve/" in line]
    train = [line for line in steady if "/train-" in line]
    # One request for every row group, one or two for the footer of a file, and no file as a whole.
    row_groups = sum(-(-rows // 4) for rows in SHARD_ROWS)
    assert row_groups <= len(train) <= row_groups + 3 * len(SHARD_ROWS)
    spans = [re.search(r"bytes=(\d+)-(\d+)$", line) for line in train]
    read = sum(int(span[2]) - int(span[1]) + 1 for span in spans)
    # These files are so small that looking for the footer reads a whole one; then every row group
    # comes once.
    size = sum(len(content) for path, content in repository().items() if "/train-" in path)
    assert size < read < 2.1 * size
    assert any("/validation-" in line and "bytes=" not in line for line in steady)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lab/gated",
            "lab/gated is gated, and your account has not been let in. Open {page}, accept the "
            "terms",
        ),
        (
            "lab/gated-files",
            "not logged in. Accept the terms on {page}, then log in with `hf auth login`, or set "
            "HF_TOKEN",
        ),
        ("lab/old-token", "The Hub does not accept your token for lab/old-token."),
        (
            "lab/missing",
            "lab/missing is not on the Hub, or it is private. Check its name at {page}",
        ),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, name, message):
    results, _, _ = hub
    assert results[name]["error"] == "DatasetAccessError"
    assert re.search(
        re.escape(message).replace(r"\{page\}", rf"http://127.0.0.1:\d+/datasets/{name}"),
        results[name]["message"],
    )
