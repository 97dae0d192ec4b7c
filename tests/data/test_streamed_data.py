"""What streams are made of: images that may be broken, formats, labels, arguments."""

import io
import logging
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset, Features, Image, Value
from factories import tiny_vit
from pictures import (
    LABELS,
    NUM_IMAGES,
    archive,
    noisy_number_of,
    number_of,
    numbers,
    parquet,
    picture,
    repository,
    stream,
    write,
)
from PIL import Image as PILImage
from runs import arguments

from ofb_hf import DistillationTrainer
from ofb_hf.data import DataArguments, ImageStream, TooManyBadImagesError, load_image_data
from ofb_hf.data import row_blocks as blocks
from ofb_hf.data.decoding import AT_ANY_TIME, ENOUGH_SEEN, ONCE, BadImages, decode_image
from ofb_hf.data.epochs import Batching, EpochPlan
from ofb_hf.training import callbacks

pytestmark = pytest.mark.usefixtures("own_cache")


@contextmanager
def assert_logs(logger: str, text: str):
    """Fails unless a warning with this text comes."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(logger).addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(handler)
    assert any(text in line for line in lines), lines


# Images that cannot be decoded


def encoded(image: PILImage.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def drawing(mode: str) -> PILImage.Image:
    pixels = np.random.default_rng(5).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    return (
        PILImage.fromarray(pixels).convert(mode)
        if mode != "CMYK"
        else PILImage.fromarray(pixels, "CMYK")
    )


def rotated() -> bytes:
    exif = PILImage.Exif()
    exif[PILImage.ExifTags.Base.Orientation] = 6
    return encoded(drawing("RGB").resize((16, 12)), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "content",
    [
        *(encoded(drawing(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "1", "P")),
        encoded(drawing("P"), "PNG", transparency=b"\x00\x80\xff" * 20),
        *(encoded(drawing(mode), "JPEG") for mode in ("RGB", "L", "CMYK")),
        encoded(drawing("P"), "GIF"),
        rotated(),
    ],
)
def test_any_image_becomes_rgb_as_datasets_decodes_it(content):
    image, expected = (
        decode_image(content),
        Image().decode_example({"bytes": content, "path": None}).convert("RGB"),
    )
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_images_are_turned_as_exif_says():
    assert decode_image(rotated()).size == (12, 16)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_count(suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 7
    content = encoded(PILImage.fromarray(levels), suffix)
    image = decode_image(content)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 1], (levels // 256).astype(np.uint8))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_known_range_are_bad(mode):
    with pytest.raises(ValueError, match=f"its mode is {mode}, numbers of no known range"):
        decode_image(encoded(drawing("L").convert(mode), "TIFF"))


def test_other_modes_in_a_stream(tmp_path):
    contents = [encoded(drawing(mode), "PNG") for mode in ("L", "P", "RGBA")] + [
        encoded(drawing("CMYK"), "JPEG")
    ]
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    images = stream(write(tmp_path / "data", files), lambda image: torch.tensor(np.asarray(image)))
    (batch,) = images.loader(4)
    assert batch["pixel_values"].shape == (4, 16, 16, 3)
    assert images.bad_images.bad == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_and_counted(tmp_path, workers, caplog):
    contents: list = [picture(n) for n in range(300)]
    contents[17], contents[130], contents[131] = contents[17][:50], b"no image", b""
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    images = stream(write(tmp_path / "data", files))
    loader = images.loader(20, num_workers=workers)
    for epoch in (0, 1):
        images.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 15
        times = Counter(numbers(batches))
        assert set(times) == set(range(300)) - {17, 130, 131}
        assert sum(times.values()) == 300
        assert all(
            batch["labels"].tolist() == [n % 3 for n in numbers([batch])] for batch in batches
        )
        assert (images.bad_images.seen, images.bad_images.bad) == (300, 3)
        assert images.end_epoch().startswith(
            f"3 of 300 images of epoch {epoch} could not be decoded"
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(tmp_path, workers):
    contents = [picture(n)[: 40 if n % 10 == 3 else None] for n in range(300)]
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    folder = write(tmp_path / "data", files)
    images = stream(folder)
    iterator = iter(images.loader(4, num_workers=workers))
    with pytest.raises(TooManyBadImagesError) as raised:
        list(iterator)
    if workers:  # the garbage collector would wait ten seconds for them
        iterator._shutdown_workers()
    message = str(raised.value)
    assert re.search(
        r"\d+ of \d+ images of this epoch cannot be decoded: \d+\.\d%, and max_bad_share is 1\.0%",
        message,
    )
    assert re.search(r"For example: row \d*3 of train.parquet, row \d*3 of train.parquet", message)
    # After the first 100, not at the end.
    assert 100 <= images.bad_images.seen < 130
    assert len(list(stream(folder, max_bad_share=0.11).loader(4, num_workers=workers))) == 75


def test_an_unlucky_beginning_stops_no_run_and_a_bad_epoch_does():
    random, images = np.random.default_rng(0), BadImages(2, 0.01)
    for _ in range(10):
        images.reset()
        for bad in random.permutation(2000) < 20:
            images.saw(int(random.integers(2)), 0, "x", OSError() if bad else None)
        assert (images.seen, images.bad) == (2000, 20)
        images.require_few(2000, 20)
    with pytest.raises(TooManyBadImagesError, match=r"21 of 2000 images of this epoch .* 1.1%"):
        images.require_few(2000, 21)
    images.require_few(2000, 37, ONCE)
    with pytest.raises(TooManyBadImagesError, match="38 of 2000"):
        images.require_few(2000, 38, ONCE)
    images.reset()
    assert (images.seen, images.bad) == (0, 0)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(("share", "stops"), [(0.01, False), (0.012, True)])
def test_the_limit_is_that_of_an_epoch_over_all_ranks(world_size, repeats, share, stops):
    """Whatever part of the bad ones a rank has, and however often an image comes: one part in a
    hundred is allowed."""
    broken = set(np.random.default_rng(1).permutation(6000)[: round(share * 6000)].tolist())
    counts, total = [], [0, 0]
    for epoch in range(repeats):
        ranks = []
        for rank in range(world_size):
            plan = EpochPlan(
                np.full(60, 100),
                Batching(7, rank, world_size, workers=2),
                seed=0,
                epoch=epoch,
                shuffle_buffer=50,
                repeats=repeats,
            )
            images = BadImages(2, 0.01)
            for worker in range(2):
                order = plan.order(worker)
                new = (plan.repetitions(order) == 0) & (
                    np.arange(len(order)) < plan.num_own(worker)
                )
                for number in plan.locate(order[new])[2].tolist():
                    images.saw(worker, epoch, "x", OSError() if number in broken else None)
            ranks.append(images.counts.sum(0))
        counts.append(sum(ranks).tolist())
        total = [a + b for a, b in zip(total, counts[-1], strict=True)]
    assert total == [6000, len(broken)]
    allowance = 0.0 if repeats == 1 else ONCE
    if repeats == 1 and stops:
        with pytest.raises(TooManyBadImagesError, match="72 of 6000"):
            images.require_few(*counts[0], allowance)
    else:  # a part of the images may have more than its share
        for seen, bad in counts:
            images.require_few(seen, bad, allowance)


def test_days_of_looking_do_not_stop_a_run_within_its_limit():
    """Judged after every image: 2,000 epochs of 2,000 images, 0.9 % of them bad."""
    bad = np.random.default_rng(0).random((2000, 2000)) < 0.009
    seen = np.arange(1, 2001)
    allowed = 0.01 * seen
    assert (bad.cumsum(1) <= allowed + AT_ANY_TIME * np.sqrt(allowed))[:, ENOUGH_SEEN:].all()


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_trainer_judges_every_epoch_over_all_ranks(tmp_path, monkeypatch, drop_last):
    contents = [picture(n)[: 40 if n in (3, 7) else None] for n in range(99)]
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    split = stream(write(tmp_path / "data", files), shuffle_buffer=1).split
    summed = []

    def over_ranks(counts, how):
        summed.append((counts.tolist(), how))
        return counts

    monkeypatch.setattr(callbacks, "reduce", over_ranks)

    def pixels(image):
        return torch.full((3, 16, 16), float(number_of(image)) / 100)

    args = arguments(
        tmp_path / "out",
        max_steps=30,
        per_device_train_batch_size=9,
        dataloader_drop_last=drop_last,
    )
    trainer = DistillationTrainer(
        tiny_vit().train(), args, train_dataset=ImageStream(split, pixels, seed=1)
    )
    with pytest.raises(TooManyBadImagesError, match="2 of 99 images of this epoch"):
        trainer.train()
    assert trainer.state.global_step == 11
    assert summed == [([99, 2], "sum")]


def test_few_images_are_judged_when_all_were_seen(tmp_path):
    contents = [picture(0)[:40], *(picture(n) for n in range(1, 10))]
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    folder = write(tmp_path / "data", files)
    images = stream(folder)
    assert len(list(images.loader(2))) == 5
    with pytest.raises(
        TooManyBadImagesError, match=r"1 of 10 images of this epoch cannot be decoded: 10.0%"
    ):
        images.end_epoch()
    with pytest.raises(TooManyBadImagesError, match=r"4 of 40"):
        images.end_epoch(lambda counts: 4 * counts)
    images = stream(folder, max_bad_share=0.1)
    assert len(list(images.loader(2))) == 5
    assert "1 of 10 images of epoch 0" in images.end_epoch()


def test_a_part_of_an_epoch_is_judged_with_allowance(tmp_path):
    """A run that was resumed, or stopped, has seen too little for the exact limit."""
    contents = [picture(n)[: 40 if n < 2 else None] for n in range(100)]
    files = {
        "train.parquet": parquet(contents),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    images = stream(write(tmp_path / "data", files), shuffle_buffer=1)
    iterator = iter(images.loader(5))
    for _ in range(12):
        next(iterator)
    assert images.bad_images.bad == 2
    assert "2 of " in images.end_epoch()
    list(iterator)
    with pytest.raises(TooManyBadImagesError, match="2 of 100"):
        images.end_epoch()


def test_a_bad_image_in_repeats_counts_once_and_its_places_are_taken(tmp_path):
    order = numbers(
        ImageStream(stream(write(tmp_path / "good", repository())).split, number_of, 1, 3).loader(4)
    )
    bad = next(number for number in order[6:] if order.count(number) == 3)
    split = stream(write(tmp_path / "bad", repository(broken=[bad])), max_bad_share=0.5).split
    images = ImageStream(split, noisy_number_of, 1, 3)
    drawn = torch.cat([batch["pixel_values"] for batch in images.loader(4)])
    following = order[order.index(bad) + 3]
    assert drawn[:, 0].int().tolist() == [
        following if number == bad else number for number in order
    ]
    assert images.bad_images.bad == 1
    noise = drawn[drawn[:, 0] == following][:, 1].tolist()
    assert len(set(noise)) == len(noise) == 6


def test_the_next_good_image_takes_the_place_and_the_first_that_of_the_last(tmp_path):
    order = numbers(stream(write(tmp_path / "good", repository())).loader(1))
    bad = [order[0], order[20], order[21], order[-1]]
    images = stream(write(tmp_path / "bad", repository(broken=bad)), max_bad_share=0.5)
    expected = [order[1], *order[1:20], order[22], order[22], *order[22:-1], order[1]]
    assert numbers(images.loader(1)) == expected
    assert [numbers([batch]) for batch in skip_first_batches(images.loader(1), NUM_IMAGES - 1)] == [
        [order[1]]
    ]


def test_nothing_but_bad_images(tmp_path):
    files = {
        "train.parquet": parquet([b"x"] * 6),
        "test.parquet": parquet([picture(n) for n in range(3)]),
    }
    images = stream(write(tmp_path / "data", files))
    with pytest.raises(TooManyBadImagesError, match="none of 6 images can be decoded"):
        list(skip_first_batches(images.loader(2), 2))


# Formats


@pytest.mark.parametrize("workers", [0, 2])
def test_class_folders(tmp_path, workers):
    names = [
        f"{split}/{LABELS[n % 3]}/{n}.png"
        for split, count in (("train", 23), ("test", 6))
        for n in range(count)
    ]
    images = stream(write(tmp_path, {name: picture(int(Path(name).stem)) for name in names}))
    assert images.split.label_names == list(LABELS)
    batches = list(images.loader(4, num_workers=workers))
    assert sorted(set(numbers(batches))) == list(range(23))
    assert all(batch["labels"].tolist() == [n % 3 for n in numbers([batch])] for batch in batches)
    (tmp_path / "train" / "cat" / "3.png").unlink()
    list(images.loader(4))
    assert workers or images.bad_images.names[0].endswith("cat/3.png")
    with pytest.raises(TooManyBadImagesError, match="1 of 23 images"):
        images.end_epoch()


@pytest.fixture
def archives(tmp_path):
    """WebDataset shards of 7, 9, 3 and 11 images."""
    bounds = [0, 7, 16, 19, 30]
    files = {f"train-{s}.tar": archive(range(bounds[s], bounds[s + 1])) for s in range(4)}
    return write(tmp_path / "archives", files | {"validation-0.tar": archive(range(100, 106))})


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_archives(archives, workers):
    """Also with more workers than shards, where several read the same one."""
    images = stream(archives)
    assert images.split.source.rows.tolist() == [7, 9, 3, 11]
    assert images.split.label_names == ["0", "1", "2"]
    loader = images.loader(4, num_workers=workers)
    batches = list(loader)
    assert sorted(set(numbers(batches))) == list(range(30))
    assert all(batch["labels"].tolist() == [n % 3 for n in numbers([batch])] for batch in batches)
    assert numbers(skip_first_batches(loader, 3)) == numbers(batches[3:])


def test_rows_are_counted_once(archives, monkeypatch, caplog):
    assert len(stream(archives)) == 30
    monkeypatch.setattr(blocks, "_survey", lambda *args: pytest.fail("counted once more"))
    assert len(stream(archives)) == 30
    (archives / "train-2.tar").write_bytes(archive(range(50, 60)))  # another file of the same name
    with pytest.raises(pytest.fail.Exception):
        stream(archives)


def test_a_description_that_counts_otherwise_is_mentioned(archives):
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 31\n---\n"
    write(archives, {"README.md": card.encode()})
    with assert_logs(
        "ofb_hf.data.row_blocks", "--num_train_examples 31 would take that as the number"
    ):
        assert len(stream(archives)) == 30
    with assert_logs(
        "ofb_hf.data.row_blocks", "split 'train' has 30 rows, though its description says 31"
    ):
        stream(archives)


def test_a_given_number_of_examples_spares_the_counting(archives, monkeypatch):
    monkeypatch.setattr(blocks, "_survey", lambda *args: pytest.fail("counted"))
    monkeypatch.setattr(blocks, "_count", lambda *args: pytest.fail("counted"))
    images = stream(archives, num_train_examples=29)
    assert images.split.source.rows.tolist() == [7, 7, 7, 8]
    times = Counter(numbers(images.loader(1)))
    # Shard 1 is cut after 7 of 9 rows and shard 3 after 8 of 11; the three rows of shard 2 are
    # repeated.
    assert times == Counter([*range(14), 16, 17, 18, 16, 17, 18, 16, *range(19, 27)])


def test_the_first_examples_of_a_stream(shards, archives, monkeypatch):
    assert sorted(numbers(stream(shards, max_train_samples=23).loader(1))) == list(range(23))
    counted, count = [], blocks._count
    monkeypatch.setattr(
        blocks,
        "_count",
        lambda dataset, shard, column: counted.append(shard) or count(dataset, shard, column),
    )
    assert sorted(numbers(stream(archives, max_train_samples=12).loader(1))) == list(range(12))
    assert counted == [0, 1]


def test_workers_that_share_blocks_are_mentioned(archives):
    images = stream(archives)
    with assert_logs("ofb_hf.data.streaming", "5 workers read 4 blocks"):
        images.loader(4, num_workers=5)


# Labels and arguments


def test_labels_without_names_are_those_of_both_splits(tmp_path):
    def table(labels):
        rows = {
            "image": [{"bytes": picture(n), "path": None} for n in range(len(labels))],
            "label": labels,
        }
        file = io.BytesIO()
        Dataset.from_dict(
            rows, features=Features({"image": Image(), "label": Value("string")})
        ).to_parquet(file)
        return file.getvalue()

    folder = write(
        tmp_path / "data",
        {"train.parquet": table(["b", "c", "a", "b"]), "test.parquet": table(["c", "b", "a"])},
    )
    images = stream(folder)
    assert images.split.label_names == ["a", "b", "c"]
    batch = next(iter(images.loader(4)))
    assert dict(zip(numbers([batch]), batch["labels"].tolist(), strict=True)) == {
        0: 1,
        1: 2,
        2: 0,
        3: 1,
    }
    images.split = images.split.aligned(["c", "a", "b"])
    batch = next(iter(images.loader(4)))
    assert dict(zip(numbers([batch]), batch["labels"].tolist(), strict=True)) == {
        0: 2,
        1: 0,
        2: 1,
        3: 2,
    }
    assert images.split.label_names == ["c", "a", "b"]
    write(folder, {"train.parquet": table(["b", "d"])})
    images = stream(folder)
    loaded = load_image_data(DataArguments(data_dir=str(folder)))
    assert images.split.label_names == loaded.label_names == ["a", "b", "c", "d"]
    assert [int(batch["labels"][0]) for batch in images.loader(1)] in ([1, 3], [3, 1])
    # As of archives, whose labels are not known before they are read.
    images.split = replace(images.split, class_of={"a": 0, "b": 1}, label_names=["a", "b"])
    message = r"row 1 of train.parquet has the label 'd', but the 2 classes .* 'a', 'b'"
    with pytest.raises(ValueError, match=message):
        list(images.loader(1))
    write(folder, {"train.parquet": table(["b", None])})
    with pytest.raises(
        ValueError, match=r"no label, the first: 'label' is None in row 1 of train.p"
    ):
        stream(folder)
    images = stream(folder, max_train_samples=2)  # the labels of the others do not matter
    with pytest.raises(ValueError, match=r"row 1 of train.parquet has no label \(None\)"):
        list(images.loader(1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0; it must be at least 1"),
        ({"num_train_examples": 0}, "num_train_examples is 0; it must be at least 1"),
        ({"max_bad_share": 1.0}, "max_bad_share is 1.0; it must be at least 0 and below 1"),
        ({"max_bad_share": -0.1}, "max_bad_share is -0.1"),
        (
            {"streaming": False, "shuffle_buffer": 10},
            "shuffle_buffer is 10, which has an effect on streams only",
        ),
        ({"data_dir": None}, "streaming is True, but no data is named"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**({"data_dir": "x", "streaming": True} | kwargs))


def test_what_cannot_be_streamed_is_refused(shards, tmp_path):
    with pytest.raises(
        ValueError,
        match="num_train_examples is 5, but the files of split 'train' say that there are 107",
    ):
        stream(shards, num_train_examples=5)
    with pytest.raises(
        ValueError,
        match=r"'train' is to be trained and evaluated on, .* \['train', 'validation'\]. Name",
    ):
        stream(shards, eval_split="train")
    with pytest.raises(TypeError, match=r"iterate over ImageStream.loader"):
        stream(shards)[0]
    empty = {"train.parquet": parquet([]), "test.parquet": parquet([picture(n) for n in range(3)])}
    with pytest.raises(ValueError, match="split 'train' is empty"):
        stream(write(tmp_path / "empty", empty))
