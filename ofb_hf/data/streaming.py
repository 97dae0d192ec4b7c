"""Images to train on that are read while training, from the Hub or a disk, and never stored as a
whole.

As exact as a data set on the disk: an epoch has every example once, ranks have equally many
batches, and what follows the k-th batch does not depend on whether the first k were computed. A
Trainer returns `ImageStream.loader(...)` from `get_train_dataloader` and needs to know no more. The
indices of that loader are numbers of batches: where the Trainer skips batches to resume
(`accelerate.skip_first_batches`), numbers are skipped, and nothing is decoded for them.
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

from .decoding import ONCE, BadImages, TooManyBadImagesError, decode_image
from .epochs import EpochPlan, Share
from .row_blocks import Row, Source, read_patiently

logger = logging.get_logger(__name__)

Example = dict[str, Any]
DECODED_AT_ONCE = 16  # photos of 24 megapixels are 72 MB each
BatchNumber = tuple[int, int]  # epoch, and batch of the rank


@dataclass(frozen=True)
class StreamedSplit:
    """The rows of a split that is not here yet, and what their labels mean.

    Args:
        source: the rows, in blocks of known length.
        class_of: label as it is stored -> index of its class; label_names: the classes, in the
            order of their indices.
        shuffle_buffer: from how many rows a worker chooses the next one.
        max_bad_share: of the images of an epoch that may be undecodable; a run with more of them
            stops.
    """

    source: Source
    class_of: dict[Any, int]
    label_names: list[str]
    shuffle_buffer: int = 1000
    max_bad_share: float = 0.01

    def __len__(self) -> int:
        return int(self.source.rows.sum())

    def aligned(self, label_names: list[str]) -> "StreamedSplit":
        """The same rows, their classes numbered in the order of `label_names`, which are those they
        have."""
        index_of = {name: index for index, name in enumerate(label_names)}
        class_of = {
            stored: index_of[self.label_names[index]] for stored, index in self.class_of.items()
        }
        return replace(self, class_of=class_of, label_names=list(label_names))

    def label(self, row: Row) -> int:
        """The class of a row.

        Raises:
            ValueError: if it has none, or one that is not known.
        """
        if row.label in self.class_of:
            return self.class_of[row.label]
        if row.label is None or row.label == -1:
            raise ValueError(
                f"{row.name} has no label ({row.label}); training needs one for every image."
            )
        raise ValueError(
            f"{row.name} has the label {row.label!r}, but the {len(self.label_names)} classes of "
            f"the evaluation split "
            f"are {', '.join(map(repr, self.label_names[:5]))}, ...; both splits need the same "
            f"ones."
        )


class Drawn(NamedTuple):
    """An image whose turn it is: its row, its row's number in the data, and how often it just came
    before."""

    image: Image.Image
    row: Row
    place: int
    repetition: int


class ImageStream(Dataset):
    """Images for training, {"pixel_values": tensor (3, H, W), "labels": int}, read and augmented by
    a loader's workers.

    The order of an epoch depends on seed, epoch, and the numbers of ranks and workers; random
    transforms on seed, epoch and the example's place in the data alone. `len` is the number of
    examples; that of a loader, of its batches.

    Args:
        repeats: repeated augmentation (Hoffer et al., CVPR 2020; DeiT uses 3): an epoch has as many
            examples, but every image of it comes this often, each time augmented anew, and
            `repeats` epochs have every image.
    """

    def __init__(
        self,
        split: StreamedSplit,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        repeats: int = 1,
    ):
        self.split, self.transform, self.seed, self.repeats, self.epoch = (
            split,
            transform,
            seed,
            repeats,
            0,
        )
        self.bad_images: BadImages | None = None
        self._num_expected = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "an ImageStream has no single images; iterate over ImageStream.loader(batch_size, ...)."
        )

    def set_epoch(self, epoch: int) -> None:
        """Draws another order and other random transforms from the next iteration on."""
        self.epoch = epoch

    def end_epoch(
        self, over_all_ranks: Callable[[Tensor], Tensor] = lambda counts: counts
    ) -> str | None:
        """Judges the images that could not be decoded; logs, and returns, how many. None if there
        were none.

        Args:
            over_all_ranks: adds up a tensor over all processes; every one of them has to call this.

        Raises:
            TooManyBadImagesError: on every rank, if they are more than `max_bad_share` of the
                epoch.
        """
        if self.bad_images is None:
            return None
        seen, bad = over_all_ranks(self.bad_images.counts.sum(0)).tolist()
        if not bad:
            return None
        # What was interrupted or resumed, and one of several parts of the images, says only so much
        # about all of them.
        is_everything = self.repeats == 1 and seen >= self._num_expected
        self.bad_images.require_few(seen, bad, 0.0 if is_everything else ONCE)
        message = f"{bad} of {seen} images of epoch {self.epoch} could not be decoded; others took their places."
        logger.warning(message)
        return message

    def loader(
        self,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        drop_last: bool = False,
        collate_fn: Callable[[list[Example]], Any] = default_collate,
        **options: Any,
    ) -> DataLoader:
        """A plain DataLoader over the batches of one rank: {"pixel_values": (B, 3, H, W), "labels":
        (B,)}.

        Every rank gets the same number of batches, all of B examples: the last one is filled up
        with the first examples of the rank's part of the epoch. A Trainer must not prepare it (no
        `accelerator.prepare`).

        Args:
            drop_last: leaves out the examples that fill no batch, instead of repeating others.
            collate_fn: from examples to a batch, in the workers.
            options: of DataLoader: pin_memory, persistent_workers, prefetch_factor,
                multiprocessing_context, ...

        Raises:
            ValueError: if there are too few examples. While iterating: for rows without a known
                label.
            TooManyBadImagesError: while iterating, for clearly more than `max_bad_share` of
                undecodable images; `end_epoch` judges whole epochs.
            StreamBrokenError: while iterating, if the network fails for half an hour.
        """
        share = Share(batch_size, rank, world_size, max(1, num_workers), drop_last)
        num_batches, num_blocks = (
            share.num_batches(len(self)),
            int((self.split.source.rows > 0).sum()),
        )
        if num_blocks < share.workers * world_size:
            logger.warning(
                f"{share.workers * world_size} workers read {num_blocks} blocks (shards, or row "
                f"groups of parquet "
                "files): several read the same one, each for its own rows. More blocks or fewer "
                "workers load faster."
            )
        self.bad_images = BadImages(share.workers, self.split.max_bad_share)
        self._num_expected = num_batches * batch_size * world_size if drop_last else len(self)
        return DataLoader(
            _RankBatches(self, share),
            batch_sampler=_BatchNumbers(self, num_batches),
            num_workers=num_workers,
            collate_fn=partial(_collate_only, collate_fn=collate_fn),
            # its own: the run's random numbers do not depend on how data is loaded
            generator=torch.Generator(),
            **options,
        )


class _BatchNumbers(Sampler):
    """What the loader hands to its workers: lists of one batch number, with the epoch that the
    stream is told."""

    def __init__(self, stream: ImageStream, num_batches: int):
        self.stream, self.num_batches = stream, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[BatchNumber]]:
        epoch = self.stream.epoch
        self.stream.bad_images.reset()
        for number in range(self.num_batches):
            yield [(epoch, number)]

    def set_epoch(self, epoch: int) -> None:
        """The Trainer looks for this method behind the sampler that skips batches."""
        self.stream.set_epoch(epoch)


class _RankBatches(Dataset):
    """Batches by epoch and number. A worker is asked for its own in turn, and goes on reading where
    it is."""

    def __init__(self, stream: ImageStream, share: Share):
        self.split, self.transform, self.seed = stream.split, stream.transform, stream.seed
        self.bad_images, self.share, self.repeats = stream.bad_images, share, stream.repeats
        self._running: dict[BatchNumber, Iterator[list[Example]]] = {}

    def __len__(self) -> int:
        return len(self.split)  # examples of all ranks: the Trainer reports it

    def __getitems__(self, numbers: list[BatchNumber]) -> list[list[Example]]:
        """Lists of `batch_size` examples."""
        return [self._batch(epoch, number) for epoch, number in numbers]

    def _batch(self, epoch: int, number: int) -> list[Example]:
        batches = self._running.pop((epoch, number), None)
        if batches is None:
            self._running.clear()
            buffer = self.split.shuffle_buffer
            plan = EpochPlan(
                self.split.source.rows, self.share, self.seed, epoch, buffer, self.repeats
            )
            batches = self._batches_from(plan, number)
        batch = next(batches)
        self._running[epoch, number + self.share.workers] = batches
        return batch

    def _batches_from(self, plan: EpochPlan, number: int) -> Iterator[list[Example]]:
        worker, skipped = number % self.share.workers, number // self.share.workers
        images = self._images(plan, worker, skipped * self.share.batch_size)
        while batch := self._next_batch(images, plan.epoch):
            yield batch

    def _next_batch(self, images: Iterator[Drawn], epoch: int) -> list[Example]:
        """A few images are decoded at a time: alternating code would not stay in the CPU's
        caches."""
        batch: list[Example] = []
        while drawn := list(
            islice(images, min(DECODED_AT_ONCE, self.share.batch_size - len(batch)))
        ):
            batch += self._augmented(drawn, epoch)
        return batch

    def _images(self, plan: EpochPlan, worker: int, skipped: int) -> Iterator[Drawn]:
        """A worker's images, in its order. The next good one takes the place of a bad one, its
        first that of a last."""
        order, num_own, waiting = plan.order(worker), plan.num_own(worker), []
        turns = enumerate(plan.repetitions(order)[skipped:].tolist(), start=skipped)
        image, error, decoded = None, None, None
        for (turn, repetition), (place, row) in zip(
            turns, self._rows(plan, order[skipped:]), strict=True
        ):
            waiting.append((place, repetition))
            if row is not decoded:
                image, error = _decoded(row)
                decoded = row
            if turn < num_own and repetition == 0:  # every image counts once in an epoch
                self.bad_images.saw(worker, plan.epoch, row.name, error)
            if image is not None:
                yield from (Drawn(image, row, *slot) for slot in waiting)
                waiting = []
        for _, row in self._rows(plan, order) if waiting else ():
            image, _ = _decoded(row)
            if image is not None:
                yield from (Drawn(image, row, *slot) for slot in waiting)
                return
        if waiting:
            raise TooManyBadImagesError(
                f"none of {len(order)} images can be decoded, {row.name} being the last."
            )

    def _augmented(self, batch: list[Drawn], epoch: int) -> list[Example]:
        state = torch.get_rng_state()
        try:
            return [self._example(drawn, epoch) for drawn in batch]
        finally:
            torch.set_rng_state(state)

    def _example(self, drawn: Drawn, epoch: int) -> Example:
        # As `SeededImages` does: the same example is augmented alike, streamed or loaded.
        time = epoch * self.repeats + drawn.repetition
        torch.default_generator.manual_seed(
            ((self.seed * 1_000_003 + time) * 1_000_003 + drawn.place) % 2**63
        )
        return {"pixel_values": self.transform(drawn.image), "labels": self.split.label(drawn.row)}

    def _rows(self, plan: EpochPlan, order: np.ndarray) -> Iterator[tuple[int, Row]]:
        """(number in the data, row) of positions in any order; a row is held from when it arrives
        to its last turn."""
        positions, times = np.unique(order, return_counts=True)
        turns_left = dict(
            zip(positions[times > 1].tolist(), times[times > 1].tolist(), strict=True)
        )
        arriving, held = self._arriving(plan, positions), {}
        for position in order.tolist():
            while position not in held:
                arrived, *held[arrived] = next(arriving)
            yield tuple(held[position])
            turns_left[position] = turns_left.get(position, 1) - 1
            if not turns_left[position]:
                del held[position], turns_left[position]

    def _arriving(self, plan: EpochPlan, positions: np.ndarray) -> Iterator[tuple[int, int, Row]]:
        """(position, number in the data, row) of rising positions, block by block; others are not
        read."""
        blocks, rows, numbers = plan.locate(positions)
        bounds = [*np.flatnonzero(np.diff(blocks, prepend=-1)), len(blocks)]
        for begin, end in pairwise(bounds):
            block, following = int(blocks[begin]), int(rows[begin])
            arriving = read_patiently(self.split.source, block, following)
            for position, row, number in zip(
                *(a[begin:end].tolist() for a in (positions, rows, numbers)), strict=True
            ):
                arrived = next(islice(arriving, row - following, None), None)
                if arrived is None:
                    raise RuntimeError(
                        f"block {block} ended before its row {row}: the data changed while it was "
                        f"read."
                    )
                yield position, number, arrived
                following = row + 1
            arriving.close()


def _decoded(row: Row) -> tuple[Image.Image | None, Exception | None]:
    try:
        return decode_image(row.image), None
    except Exception as error:  # decoders raise what they like, from SyntaxError to struct.error
        return None, error


def _collate_only(batches: list[list[Example]], collate_fn: Callable[[list[Example]], Any]) -> Any:
    """The one batch that a batch number stands for."""
    return collate_fn(batches[0])
