"""The order of an epoch: which rank and worker sees which row when, by seed and epoch alone."""

from dataclasses import dataclass

import numpy as np

from .._moved import refusing_renamed

# of names that the module had in version 0.1
__getattr__ = refusing_renamed(__name__)


@dataclass(frozen=True)
class Batching:
    """How the rows of an epoch are divided into batches of ranks, which workers make in turn.

    Args:
        batch_size: rows in a batch of one rank.
        rank, world_size: which rank this is, of how many.
        workers: batch b is made by worker b % workers.
        drop_last: leave out rows that do not fill a batch, instead of filling the last batch with
            repeated rows.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    workers: int = 1
    drop_last: bool = False

    def num_batches(self, num_rows: int) -> int:
        """Return the batches of an epoch, the same number on every rank.

        Raises:
            ValueError: if some rank would get no row, or no batch.
        """
        # Ranks have `fewest` rows or one more.
        fewest = num_rows // self.world_size
        if self.drop_last:
            batches = fewest // self.batch_size
        else:
            most = _divide_up(num_rows, self.world_size)
            batches = _divide_up(most, self.batch_size)
        if fewest == 0 or batches == 0:
            dropping = " and dataloader_drop_last" if self.drop_last else ""
            raise ValueError(
                f"{num_rows} training examples are too few for {self.world_size} processes with "
                f"batches of {self.batch_size}{dropping}; give more examples, or take fewer "
                "processes or smaller batches."
            )
        return batches


class EpochPlan:
    """Give every rank and worker its rows of an epoch, each row once, in a random order.

    The blocks of rows are put into a random order. A *position* is the number of a row along this
    order. The positions are cut into one run per rank (`num_rows // world_size` of them, or one
    more), and the run of a rank into one per worker, of whole batches. A worker then shuffles its
    run within a buffer. If the last batch of a rank lacks rows, the first positions of that rank
    come a second time. So the order depends on the numbers of ranks and workers.

    Args:
        rows: (blocks,) number of rows of every block.
        batching: which rank this is, and how rows are divided.
        seed, epoch: the order is a function of the two.
        shuffle_buffer: how many rows a worker holds and chooses the next one from; 1 keeps the
            order within blocks.
        repeats: how many times a row comes in direct succession. An epoch has the same length in
            any case: it holds one part of `repeats` parts of the rows, and `repeats` epochs hold
            all of them.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batching: Batching,
        *,
        seed: int,
        epoch: int,
        shuffle_buffer: int,
        repeats: int = 1,
    ):
        self.batching = batching
        self.seed = seed % 2**32  # numpy takes no larger one
        self.epoch = epoch
        self.shuffle_buffer = shuffle_buffer
        self.repeats = repeats
        # `repeats` epochs divide the rows of one order among them. RandomState is the generator
        # that numpy froze, so a resumed run finds the same order with another version of numpy.
        random = np.random.RandomState([self.seed, epoch // repeats])
        # All by place in the random order, (blocks,): the block, its number of rows, the position
        # behind its last row, and the number of its first row in the data.
        self.blocks = random.permutation(len(rows))
        self.rows = rows[self.blocks]
        self.ends = np.cumsum(self.rows)
        first_rows = np.cumsum(rows) - rows
        self._first_row = first_rows[self.blocks]
        self.num_rows = int(self.ends[-1])
        self.num_batches = batching.num_batches(self.num_rows)

    def order(self, worker: int) -> np.ndarray:
        """Return the positions of one worker in its order, enough for all its batches: (N,)."""
        own = self._own(worker)
        first, last = self._run_of_rank()
        missing = np.arange(self._num_wanted(worker) - len(own))
        repeated = first + missing % (last - first)
        return np.concatenate([own, repeated])

    def num_own(self, worker: int) -> int:
        """Return how many entries of `order` are the worker's own; the others fill a last batch."""
        return len(self._own(worker))

    def repetitions(self, order: np.ndarray) -> np.ndarray:
        """Return how often each position came before in direct succession, 0 to repeats - 1: (N,).

        Args:
            order: positions (N,), e.g. [7, 7, 7, 2, 2, 2] -> [0, 1, 2, 0, 1, 2].
        """
        starts = np.flatnonzero(np.diff(order, prepend=-1))  # (runs,) of equal positions
        lengths = np.diff(starts, append=len(order))  # (runs,)
        since_start = np.arange(len(order)) - starts.repeat(lengths)  # (N,)
        # A run may be longer than `repeats`: a rank of a single row fills its last batch with it.
        return since_start % self.repeats

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for every position the block, the row in it, and the row's number in the data.

        Args:
            positions: (N,). The three results have the same shape.
        """
        index = np.searchsorted(self.ends, positions, side="right")
        starts = self.ends - self.rows
        row = positions - starts[index]
        return self.blocks[index], row, self._first_row[index] + row

    def _own(self, worker: int) -> np.ndarray:
        """Return the worker's own positions in the order in which it gives them out."""
        own = self._run_of_worker(worker)
        # The part of this epoch; all of them, if nothing is repeated.
        part = self.epoch % self.repeats
        begin = len(own) * part // self.repeats
        end = len(own) * (part + 1) // self.repeats
        own = own[begin:end]
        seeds = [self.seed, self.epoch, self.batching.rank, worker]
        random = np.random.RandomState(seeds)
        order = _buffered_shuffle(len(own), self.shuffle_buffer, random)
        # A part is rounded up for some epochs: its repeats may be more rows than the batches have.
        repeated = own[order].repeat(self.repeats)
        return repeated[: self._num_wanted(worker)]

    def _run_of_rank(self) -> tuple[int, int]:
        """Return the first position of this rank, and the one behind its last."""
        rank = self.batching.rank
        world_size = self.batching.world_size
        first = self.num_rows * rank // world_size
        last = self.num_rows * (rank + 1) // world_size
        return first, last

    def _run_of_worker(self, worker: int) -> np.ndarray:
        """Return the positions of a worker, rising, (N,)."""
        # The runs follow one another in this order of the workers. The one that makes the last
        # batch of the epoch comes last, so that only its run may be short of rows.
        workers = self.batching.workers
        in_order = [(self.num_batches + turn) % workers for turn in range(workers)]
        start, last = self._run_of_rank()
        for earlier in in_order[: in_order.index(worker)]:
            start += self._num_wanted(earlier)
        return np.arange(start, min(start + self._num_wanted(worker), last))

    def _num_wanted(self, worker: int) -> int:
        """Return the rows in the batches that a worker makes: worker, worker + workers, ..."""
        batches = range(worker, self.num_batches, self.batching.workers)
        return len(batches) * self.batching.batch_size


def _divide_up(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _buffered_shuffle(count: int, buffer: int, random: np.random.RandomState) -> np.ndarray:
    """Return a random order of 0..count-1 that a stream can deliver: (count,).

    The stream holds `buffer` rows and gives out one of them at random whenever the next arrives, so
    that row i comes at place i - buffer or later.
    """
    held = list(range(min(buffer, count)))
    order = []
    if len(held) < count:
        picks = random.randint(len(held), size=count - len(held))
        for arriving, pick in enumerate(picks, start=len(held)):
            order.append(held[pick])
            held[pick] = arriving
    # Nothing more arrives: the held rows come in any order.
    order += [held[pick] for pick in random.permutation(len(held))]
    return np.array(order, dtype=np.int64)
