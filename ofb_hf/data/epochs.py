"""In which order, and on which process, the rows of blocks are seen in an epoch: a function of seed
and epoch alone."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """What one process sees of an epoch, as batches that are dealt to its workers in turn.

    Args:
        batch_size: of this process; rank, world_size: which process, of how many.
        workers: batch b comes from worker b % workers.
        drop_last: leaves rows out that fill no batch, instead of filling the last one with repeated
            rows.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    drop_last: bool = False

    def num_batches(self, num_rows: int) -> int:
        """Batches of an epoch, the same number on every rank.

        Raises:
            ValueError: if there is nothing for some rank.
        """
        fewest, most = num_rows // self.world_size, -(-num_rows // self.world_size)
        batches = fewest // self.batch_size if self.drop_last else -(-most // self.batch_size)
        if fewest == 0 or batches == 0:
            dropping = " and dataloader_drop_last" if self.drop_last else ""
            raise ValueError(
                f"{num_rows} training examples are too few for {self.world_size} processes with "
                f"batches of "
                f"{self.batch_size}{dropping}; give more examples, or take fewer processes or "
                f"smaller batches."
            )
        return batches


class EpochPlan:
    """Every row once: blocks in random order, cut into ranks and workers by rows, then shuffled
    within a buffer.

    A *position* counts rows along the random order of the blocks. Every rank has `num_rows //
    world_size` of them, or one more, and every worker a run of them that makes whole batches. What
    the last batch of a rank lacks are the first positions of that rank, seen a second time. The
    order depends on the numbers of ranks and workers.

    Args:
        rows: (blocks,) rows of every block.
        shuffle_buffer: how many rows a worker chooses the next one from; 1 keeps the order within
            blocks.
        repeats: how often a row comes, one time right after the other. An epoch is not longer for
            that: it has one of `repeats` parts of the rows, and as many epochs have them all.
    """

    def __init__(
        self,
        rows: np.ndarray,
        share: Share,
        seed: int,
        epoch: int,
        shuffle_buffer: int,
        repeats: int = 1,
    ):
        self.share, self.seed, self.epoch, self.shuffle_buffer = (
            share,
            seed % 2**32,
            epoch,
            shuffle_buffer,
        )
        self.repeats = repeats
        # RandomState is the generator that numpy froze: a resumed run finds the same order with
        # another numpy.
        self.blocks = np.random.RandomState([self.seed, epoch // repeats]).permutation(len(rows))
        self.rows = rows[self.blocks]
        self.ends = np.cumsum(self.rows)
        self._first_row = (np.cumsum(rows) - rows)[self.blocks]
        self.num_rows = int(self.ends[-1])
        self.num_batches = share.num_batches(self.num_rows)

    def order(self, worker: int) -> np.ndarray:
        """Positions in the order in which one worker gives them out: whole batches."""
        own, wanted = self._own(worker), self._num_wanted(worker)
        first, last = self._of_rank()
        return np.concatenate([own, first + np.arange(wanted - len(own)) % (last - first)])

    def num_own(self, worker: int) -> int:
        """How many entries of that order are the worker's own; the others fill up a last batch."""
        return len(self._own(worker))

    def _of_rank(self) -> tuple[int, int]:
        first, last = (
            self.num_rows * rank // self.share.world_size
            for rank in (self.share.rank, self.share.rank + 1)
        )
        return first, last

    def _own(self, worker: int) -> np.ndarray:
        share, wanted = self.share, self._num_wanted(worker)
        first, last = self._of_rank()
        # The worker with the epoch's last batch comes last, so that only its part may be short of
        # rows.
        before = (worker - self.num_batches) % share.workers
        earlier = [(self.num_batches + turn) % share.workers for turn in range(before)]
        start = first + sum(self._num_wanted(other) for other in earlier)
        own = np.arange(start, max(start, min(start + wanted, last)))
        part = self.epoch % self.repeats
        own = own[len(own) * part // self.repeats : len(own) * (part + 1) // self.repeats]
        random = np.random.RandomState([self.seed, self.epoch, share.rank, worker])
        return own[_buffered_shuffle(len(own), self.shuffle_buffer, random)].repeat(self.repeats)[
            :wanted
        ]

    def repetitions(self, order: np.ndarray) -> np.ndarray:
        """How often each of these positions came before, in direct succession: 0 to repeats - 1."""
        starts = np.flatnonzero(np.diff(order, prepend=-1))
        return (
            np.arange(len(order)) - starts.repeat(np.diff(starts, append=len(order)))
        ) % self.repeats

    def _num_wanted(self, worker: int) -> int:
        return len(range(worker, self.num_batches, self.share.workers)) * self.share.batch_size

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every position: the block, the row in it, and the row's number in the data."""
        index = np.searchsorted(self.ends, positions, side="right")
        row = positions - (self.ends - self.rows)[index]
        return self.blocks[index], row, self._first_row[index] + row


def _buffered_shuffle(count: int, buffer: int, random: np.random.RandomState) -> np.ndarray:
    """A random order of 0..count-1 in which i stands at place i - buffer or later: a stream can
    deliver it."""
    held = list(range(min(buffer, count)))
    order, picks = (
        [],
        random.randint(len(held), size=count - len(held)) if len(held) < count else [],
    )
    for following, pick in enumerate(picks, start=len(held)):
        order.append(held[pick])
        held[pick] = following
    return np.array(order + [held[i] for i in random.permutation(len(held))], dtype=np.int64)
