"""Training images that are read while training, from the Hub or a disk, and never stored.

A stream is as exact as a data set on the disk: an epoch has every example once, all ranks have the
same number of batches, and what follows the k-th batch does not depend on whether the batches
before it were computed. All that a Trainer has to do is to return `ImageStream.loader(...)` from
`get_train_dataloader`. The indices of that loader are numbers of batches. Where the Trainer skips
batches to resume (`accelerate.skip_first_batches`), it skips numbers, and no image is decoded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from transformers.utils import logging

from .completeness import is_missing
from .decoding import MAX_BAD_SHARE, ONCE, BadImages, TooManyBadImagesError, readable
from .epochs import Batching, EpochPlan
from .row_blocks import Row, Source, read_patiently
from .seeding import seed_example

logger = logging.get_logger(__name__)

Example = dict[str, Any]
Collate = Callable[[list[Example]], Any]
BatchNumber = tuple[int, int]  # epoch, and number of the rank's batch in it
# Decoding some images and then augmenting them is faster than alternating, which would drive the
# code of both out of the CPU's caches. But not many: a photo of 24 megapixels is 72 MB.
DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class StreamedSplit:
    """Describe the rows of a split that are not read yet, and what their labels mean.

    Args:
        source: the rows, in blocks of known length.
        class_of: label as it is stored -> index of its class.
        label_names: the classes, in the order of their indices.
        shuffle_buffer: how many rows a worker holds and chooses the next one from.
        max_bad_share: fraction of the images of an epoch that may be undecodable; a run with more
            of them stops.
    """

    source: Source
    class_of: dict[Any, int]
    label_names: list[str]
    shuffle_buffer: int = 1000
    max_bad_share: float = MAX_BAD_SHARE

    def __len__(self) -> int:
        return int(self.source.rows.sum())

    def aligned(self, label_names: list[str]) -> "StreamedSplit":
        """Return the same rows with their classes numbered in another order.

        Args:
            label_names: the classes of the split, in the order of their new indices.
        """
        new_index = {name: index for index, name in enumerate(label_names)}
        class_of = {}
        for stored, old_index in self.class_of.items():
            class_of[stored] = new_index[self.label_names[old_index]]
        return replace(self, class_of=class_of, label_names=list(label_names))

    def label(self, row: Row) -> int:
        """Return the class of a row.

        Raises:
            ValueError: if the row has no label, or an unknown one.
        """
        if row.label in self.class_of:
            return self.class_of[row.label]
        if is_missing(row.label):
            raise ValueError(
                f"{row.name} has no label ({row.label!r}); training needs one for every image. Add "
                "it, or leave such rows out."
            )
        some_names = ", ".join(map(repr, self.label_names[:5]))
        raise ValueError(
            f"{row.name} has the label {row.label!r}, but the {len(self.label_names)} classes "
            f"that are known from the evaluation split are {some_names}, ...; it needs an image of "
            "every class."
        )


class Drawn(NamedTuple):
    """An image whose turn it is in the order of an epoch."""

    image: Image.Image
    row: Row
    place: int  # the number of the row in the data
    repetition: int  # how many times it came directly before


class ImageStream(Dataset):
    """Stream images for training: {"pixel_values": tensor (3, H, W), "labels": int}.

    They are read and augmented by the workers of a loader. The order of an epoch depends on seed,
    epoch, and the numbers of ranks and workers; random transforms depend on seed, epoch and the
    example's place in the data alone. The length is the number of examples; that of a loader is the
    number of its batches.

    Args:
        split: the rows.
        transform: from an RGB image to a tensor.
        seed: of the run.
        repeats: repeated augmentation (Hoffer et al., CVPR 2020; DeiT uses 3): an epoch has the
            same number of examples, but every image in it comes `repeats` times, each time
            augmented anew, and `repeats` epochs together have every image.
    """

    def __init__(
        self,
        split: StreamedSplit,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        repeats: int = 1,
    ):
        self.split = split
        self.transform = transform
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        # Both belong to the last loader: its counts, and how many images an epoch of it has.
        self.bad_images: BadImages | None = None
        self._num_expected = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "an ImageStream has no single images; iterate over ImageStream.loader(batch_size, ...)."
        )

    def set_epoch(self, epoch: int) -> None:
        """Use the order and the random transforms of an epoch from the next iteration on."""
        self.epoch = epoch

    def end_epoch(self, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> str | None:
        """Log how many images of the epoch could not be decoded.

        Every process has to call this together.

        Args:
            sum_over_ranks: adds up a tensor over all processes; None if there is one.

        Returns:
            The message that was logged, None if all images could be decoded.

        Raises:
            TooManyBadImagesError: on every rank, if they are more than `max_bad_share` of the
                epoch.
        """
        if self.bad_images is None:
            return None
        counts = self.bad_images.counts.sum(0)  # (workers, 2) -> (2,)
        if sum_over_ranks is not None:
            counts = sum_over_ranks(counts)
        seen, bad = counts.tolist()
        if not bad:
            return None
        # An epoch that was interrupted or resumed, or that has one of several parts of the images,
        # is a sample: the number of bad images in it varies by chance.
        is_everything = self.repeats == 1 and seen >= self._num_expected
        self.bad_images.require_few(seen, bad, 0.0 if is_everything else ONCE)
        message = (
            f"{bad} of {seen} images of epoch {self.epoch} could not be decoded; others took their "
            "places."
        )
        logger.warning(message)
        return message

    def loader(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        drop_last: bool = False,
        collate_fn: Collate = default_collate,
        **options: Any,
    ) -> DataLoader:
        """Return a DataLoader over the batches of one rank.

        A batch is {"pixel_values": (B, 3, H, W), "labels": (B,)}. Every rank gets the same number
        of batches, all of B examples: the last one is filled with the first examples of the rank's
        part of the epoch. A Trainer must not prepare the loader (`accelerator.prepare`), which
        would divide its batches among the ranks once more.

        Args:
            batch_size: B. rank, world_size, num_workers: who reads what.
            drop_last: leave out the examples that do not fill a batch, instead of repeating others.
            collate_fn: from examples to a batch, in the workers.
            options: of DataLoader: pin_memory, persistent_workers, prefetch_factor,
                multiprocessing_context, ...

        Raises:
            ValueError: if there are too few examples. While iterating: for rows without a known
                label.
            TooManyBadImagesError: while iterating, for clearly more than `max_bad_share` of
                undecodable images; `end_epoch` is strict with whole epochs.
            StreamBrokenError: while iterating, if the network fails for half an hour.
        """
        workers = max(1, num_workers)  # without workers, this process does the work of one
        batching = Batching(batch_size, rank, world_size, workers, drop_last)
        num_batches = batching.num_batches(len(self))
        num_blocks = int((self.split.source.rows > 0).sum())
        if num_blocks < workers * world_size:
            logger.warning(
                f"{workers * world_size} workers read {num_blocks} blocks (shards, or row groups "
                "of parquet files): several read the same one, each for its own rows. More blocks "
                "or fewer workers load faster."
            )
        self.bad_images = BadImages(workers, self.split.max_bad_share)
        self._num_expected = num_batches * batch_size * world_size if drop_last else len(self)
        return DataLoader(
            _RankBatches(self, batching),
            batch_sampler=_BatchNumbers(self, num_batches),
            num_workers=num_workers,
            collate_fn=partial(_collate_only, collate_fn=collate_fn),
            # A loader draws a seed for its workers. Drawn from the global generator, it would make
            # the run's random numbers depend on how data is loaded.
            generator=torch.Generator(),
            **options,
        )


class _BatchNumbers(Sampler):
    """Yield what the loader sends to its workers: lists of one batch number each."""

    def __init__(self, stream: ImageStream, num_batches: int):
        self.stream = stream
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[BatchNumber]]:
        epoch = self.stream.epoch
        self.stream.bad_images.reset()
        for number in range(self.num_batches):
            yield [(epoch, number)]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the stream."""
        # The Trainer looks for this method inside the batch sampler that skips batches.
        self.stream.set_epoch(epoch)


class _RankBatches(Dataset):
    """Make the batches of a rank, by epoch and number.

    A worker is asked for its own batches in turn, and continues to read where it stopped.
    """

    def __init__(self, stream: ImageStream, batching: Batching):
        self.split = stream.split
        self.transform = stream.transform
        self.seed = stream.seed
        self.repeats = stream.repeats
        self.bad_images = stream.bad_images
        self.batching = batching
        # The batch that a worker will be asked for next -> the iterator that gives it.
        self._running: dict[BatchNumber, Iterator[list[Example]]] = {}

    def __len__(self) -> int:
        return len(self.split)  # examples of all ranks: the Trainer reports it

    def __getitems__(self, numbers: list[BatchNumber]) -> list[list[Example]]:
        """Return lists of `batch_size` examples, one for every number."""
        return [self._batch(epoch, number) for epoch, number in numbers]

    def _batch(self, epoch: int, number: int) -> list[Example]:
        batches = self._running.pop((epoch, number), None)
        if batches is None:
            # Another epoch, or the first batch after those that a resumed run skips.
            self._running.clear()
            batches = self._batches_from(self._plan(epoch), number)
        batch = next(batches)
        self._running[epoch, number + self.batching.workers] = batches
        return batch

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            self.split.source.rows,
            self.batching,
            seed=self.seed,
            epoch=epoch,
            shuffle_buffer=self.split.shuffle_buffer,
            repeats=self.repeats,
        )

    def _batches_from(self, plan: EpochPlan, number: int) -> Iterator[list[Example]]:
        """Yield the batches of one worker from a number on."""
        worker = number % self.batching.workers
        batches_before = number // self.batching.workers
        images = self._images(plan, worker, batches_before * self.batching.batch_size)
        while batch := self._next_batch(images, plan.epoch):
            yield batch

    def _next_batch(self, images: Iterator[Drawn], epoch: int) -> list[Example]:
        """Return the next batch, which is empty when there are no more images."""
        batch: list[Example] = []
        while len(batch) < self.batching.batch_size:
            count = min(DECODED_AT_ONCE, self.batching.batch_size - len(batch))
            drawn = list(islice(images, count))
            if not drawn:
                break
            batch += self._augmented(drawn, epoch)
        return batch

    def _images(self, plan: EpochPlan, worker: int, skipped: int) -> Iterator[Drawn]:
        """Yield a worker's images in its order, without the first `skipped` ones.

        The next good image takes the place of a bad one. If the last ones are bad, the worker's
        first good image takes their places.
        """
        order = plan.order(worker)
        num_own = plan.num_own(worker)
        repetitions = plan.repetitions(order)[skipped:].tolist()
        rows = self._rows(plan, order[skipped:])
        waiting: list[tuple[int, int]] = []  # (place, repetition) of turns that have no image yet
        image = None
        error = None
        decoded = None  # the row that image and error belong to: repeats decode it once
        turns = zip(repetitions, rows, strict=True)
        for turn, (repetition, (place, row)) in enumerate(turns, start=skipped):
            waiting.append((place, repetition))
            if row is not decoded:
                image, error = readable(row.image)
                decoded = row
            # Every image counts once in an epoch: neither its repeats nor the filling of a batch.
            if turn < num_own and repetition == 0:
                self.bad_images.saw(worker, plan.epoch, row.name, error)
            if image is not None:
                yield from _in_place_of(waiting, image, row)
                waiting = []
        if waiting:
            image, row = self._first_good(plan, order)
            yield from _in_place_of(waiting, image, row)

    def _first_good(self, plan: EpochPlan, order: np.ndarray) -> tuple[Image.Image, Row]:
        for _, row in self._rows(plan, order):
            image, _ = readable(row.image)
            if image is not None:
                return image, row
        raise TooManyBadImagesError(
            f"none of {len(order)} images can be decoded, {row.name} being the last."
        )

    def _augmented(self, batch: list[Drawn], epoch: int) -> list[Example]:
        # Without workers this is the process that trains: its random numbers are restored.
        with torch.random.fork_rng(devices=[]):
            return [self._example(drawn, epoch) for drawn in batch]

    def _example(self, drawn: Drawn, epoch: int) -> Example:
        time = epoch * self.repeats + drawn.repetition
        seed_example(self.seed, time, drawn.place)
        return {
            "pixel_values": self.transform(drawn.image),
            "labels": self.split.label(drawn.row),
        }

    def _rows(self, plan: EpochPlan, order: np.ndarray) -> Iterator[tuple[int, Row]]:
        """Yield (number in the data, row) of positions in any order, also of repeated ones.

        Rows arrive in the order of their positions. A row is held from its arrival to its last
        turn.
        """
        positions, times = np.unique(order, return_counts=True)  # (P,) rising
        is_repeated = times > 1
        repeated = positions[is_repeated].tolist()
        turns_left = dict(zip(repeated, times[is_repeated].tolist(), strict=True))
        arriving = self._arriving(plan, positions)
        held: dict[int, tuple[int, Row]] = {}
        for position in order.tolist():
            while position not in held:
                arrived, number, row = next(arriving)
                held[arrived] = (number, row)
            yield held[position]
            turns_left[position] = turns_left.get(position, 1) - 1
            if not turns_left[position]:
                del held[position]
                del turns_left[position]

    def _arriving(self, plan: EpochPlan, positions: np.ndarray) -> Iterator[tuple[int, int, Row]]:
        """Yield (position, number in the data, row) of rising positions, block by block.

        Blocks without such a position are not read.
        """
        blocks, rows, numbers = plan.locate(positions)  # (P,) each
        starts = np.flatnonzero(np.diff(blocks, prepend=-1))  # where another block begins
        for begin, end in pairwise([*starts, len(blocks)]):
            block = int(blocks[begin])
            following = int(rows[begin])  # the row of the block that is read next
            reader = read_patiently(self.split.source, block, following)
            wanted = zip(
                positions[begin:end].tolist(),
                rows[begin:end].tolist(),
                numbers[begin:end].tolist(),
                strict=True,
            )
            for position, row, number in wanted:
                # Rows between belong to other parts of the epoch.
                found = next(islice(reader, row - following, None), None)
                if found is None:
                    raise RuntimeError(
                        f"block {block} ended before its row {row}: the data changed while it was "
                        "read."
                    )
                yield position, number, found
                following = row + 1
            reader.close()


def _in_place_of(waiting: list[tuple[int, int]], image: Image.Image, row: Row) -> Iterator[Drawn]:
    """Yield one image for all turns that wait: its own, and those of bad images before it."""
    for place, repetition in waiting:
        yield Drawn(image, row, place, repetition)


def _collate_only(batches: list[list[Example]], collate_fn: Collate) -> Any:
    """Collate the one batch that a list of one batch number stands for."""
    return collate_fn(batches[0])
