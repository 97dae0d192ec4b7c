"""Multiple-choice knapsack: one pick from each of several groups, within a band of exact costs.

Candidate i of group g costs c_gi >= 0 and scores s_gi. Wanted is one index i(g) for each of the G
groups that

    maximises  sum_g s_g,i(g)    subject to    lowest <= sum_g c_g,i(g) <= room.

This is NP-hard in general, and costs are large integers (MACs, picoseconds): the textbook dynamic
programme over all costs (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11)
would need a table of `room` entries. Three steps take its place:

1.  Dynamic programme over rounded costs. Costs are rounded to whole multiples of
    unit = ceil(room / BINS), and best[b] is the largest score of all picks, one from each of the
    first g groups, whose rounded costs add up to b units. Group g + 1 turns it into

        best'[b] = max_i best[b - step_i] + s_i .

2.  Exact verification. Each rounding is off by at most half a unit, so picks within the room have a
    rounded sum of at most room / unit + G / 2; the table is long enough for those. From the best
    score downwards, the picks behind an entry are traced back and their exact costs added up; the
    first sum within the band is the answer. It is never outside the band, and is worth at least
    what any picks are worth that stay G units away from both ends of it.

3.  Exact sums. In a coarse space it happens that only few picks lie in the band, or none, and that
    rounding hides them. Then the largest exact sum of costs that fits is found (`largest_picks`),
    and the best picks among those with that sum.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

# Number of units that the room is divided into for the dynamic programme.
BINS = 2048
# Up to this many different sums are told apart exactly in step 3.
REACHABLE = 2**22
# Picoseconds have far more: they are rounded to this many units, few enough that there are not as
# many ways to reach each sum as there are networks.
ROUNDED = 2**16


def best_picks(
    costs: list[list[int]],
    scores: list[list[float]],
    lowest: int,
    room: int,
) -> list[int]:
    """Return one index per group: the best total score at an exact cost in [lowest, room].

    Args:
        costs: of the candidates of each group, at least 0.
        scores: of the same candidates.
        lowest: the least that the picks should cost.
        room: the most that they may cost, at least the sum of the smallest costs.

    Returns:
        The best picks in the band; where there are none, those of the largest cost below it.
    """
    if sum(map(max, costs)) < lowest:
        return _most_expensive_picks(costs, scores)
    unit = max(1, -(-room // BINS))  # rounded up
    steps = []
    for row in costs:
        steps.append([round(cost / unit) for cost in row])
    length = room // unit + len(costs) + 1
    best = np.full(length, -np.inf)  # -inf: no picks have this rounded sum
    best[0] = 0.0
    history = []  # for each group, the candidate behind every entry of `best`, (length,)
    for group_steps, group_scores in zip(steps, scores, strict=True):
        table = np.full((len(group_steps), length), -np.inf)  # (K, length)
        candidates = zip(table, group_steps, group_scores, strict=True)
        for row, step, score in candidates:
            if step < length:
                row[step:] = best[: length - step] + score
        picked = table.argmax(0)
        history.append(picked)
        best = table[picked, np.arange(length)]
    for position in np.argsort(-best, kind="stable"):
        if best[position] == -np.inf:
            break
        picks = _trace(history, steps, int(position))
        cost = sum(row[pick] for row, pick in zip(costs, picks, strict=True))
        if lowest <= cost <= room:
            return picks
    return largest_picks(costs, scores, room)


def _most_expensive_picks(
    costs: list[list[int]],
    scores: list[list[float]],
) -> list[int]:
    """Return the most expensive candidate of each group, among equals the one of the best score."""
    picks = []
    for row, values in zip(costs, scores, strict=True):
        candidates = list(zip(row, values, strict=True))
        picks.append(candidates.index(max(candidates)))
    return picks


def _trace(
    history: Sequence[np.ndarray | dict[int, int]],
    steps: list[list[int]],
    position: int,
) -> list[int]:
    """Return the picks behind an entry of the last table: one per group, in order.

    Args:
        history: for each group, entry of its table -> the pick behind it.
        steps: how far each pick of a group moves from one table to the next.
        position: of the entry.
    """
    picks = []
    for picked, group_steps in zip(reversed(history), reversed(steps), strict=True):
        pick = int(picked[position])
        picks.append(pick)
        position -= group_steps[pick]
    return picks[::-1]


def largest_picks(
    costs: list[list[int]],
    scores: list[list[float]],
    room: int,
) -> list[int]:
    """Return the picks whose exact cost comes closest to `room` from below, the best of those.

    The set of all sums of costs is a Python integer: bit b is set if some picks cost b. Adding a
    group is one shift for each of its candidates. Costs are divided by their greatest common
    divisor; where there are still more than `REACHABLE` sums, they are rounded up, so that the
    picks fit in any case.
    """
    scale = max(math.gcd(*itertools.chain.from_iterable(costs)), 1)
    if room // scale > REACHABLE:
        scale = room // ROUNDED
    steps = []
    for row in costs:
        steps.append([-(-cost // scale) for cost in row])  # rounded up
    within_room = (1 << (room // scale + 1)) - 1  # bits 0 to room / scale
    reachable = [1]  # by the first g groups: without any, only the sum 0
    for row in steps:
        sums = 0
        for step in row:
            sums |= reachable[-1] << step
        reachable.append(sums & within_room)

    largest = reachable[-1].bit_length() - 1
    return _best_picks_at(steps, scores, reachable, largest)


def _best_picks_at(
    steps: list[list[int]],
    scores: list[list[float]],
    reachable: list[int],
    total: int,
) -> list[int]:
    """Return the best picks whose steps add up to exactly `total`.

    Among equal scores those are the best that are the last in the order of lists. The groups are
    gone through in loops: a network may have more submodules than Python has levels of recursion.

    Args:
        reachable: for g = 0, 1, ..., G the sums of the first g groups, as in `largest_picks`.
        total: one of the sums of all groups.
    """
    # For G, G - 1, ..., 0 the sums of the first groups from which `total` can be completed.
    wanted = [{total}]
    for row, sums in zip(reversed(steps), reversed(reachable[:-1]), strict=True):
        befores = set()
        for after in wanted[-1]:
            for step in row:
                before = after - step
                if before >= 0 and sums >> before & 1:
                    befores.add(before)
        wanted.append(befores)
    # Sum of the first groups -> the best score with that sum, then one group more in every turn.
    best = {0: 0.0}
    history: list[dict[int, int]] = []  # for each group: sum -> the pick behind its best score
    for afters in reversed(wanted[:-1]):
        group = len(history)
        above = {}
        picked = {}
        for after in afters:
            for index, step in enumerate(steps[group]):
                before = after - step
                if before not in best:
                    continue
                score = best[before] + scores[group][index]
                if after in above and score < above[after]:
                    continue
                if after in above and score == above[after]:
                    rival = after - steps[group][picked[after]]
                    here = _trace(history, steps[:group], before)
                    there = _trace(history, steps[:group], rival)
                    # the later index is the larger one where all picks before it are equal
                    if here < there:
                        continue
                above[after] = score
                picked[after] = index
        best = above
        history.append(picked)
    return _trace(history, steps, total)
