"""Which token schedules a search under one budget has to consider, and the best of them with the
widths beside it.

Under a price on what they cost the best schedule is a shortest path through the layers. Falling
prices give a family of schedules, from all tokens to the fewest; each leaves the widths a budget of
their own. Which of them makes the cheapest network depends on the widths: a reduction has a price,
and next to nothing to save where the layers behind it are narrow or gone.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
from transformers import ViTConfig

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import evaluate_terms
from ..families.description import macs_of
from ..families.vit import vit_layer_parts
from ..tokens.schedules import Cost, Schedule, num_tokens
from .knapsack import Choice

SMALLEST_COUNT = 2  # the class token and a patch
PRICES = 40
# A family of more schedules than this is looked at in such steps first.
SHORT, STRIDE = 24, 4
# So many members of a family, at most, are held against each other where it can be measured what
# they lose.
ALTERNATIVES = 16
# Neighbours in a family whose costs are further apart than this share of the dense cost get others
# between them.
LARGEST_GAP = 0.02


def attention_of(layer: int) -> str:
    """The submodule by which a layer of a ViT ranks its tokens."""
    return f"layers.{layer}.attention"


def schedule_of(left: list[int], tokens: int) -> Schedule:
    """The schedule that merges down to these counts; the last layer drops, for nobody reads its
    patches.

    Args:
        left: tokens that leave each layer, none more than before. tokens: that enter the first one.
    """
    entering = [tokens, *left]
    return [[before, after] for before, after in zip(entering[:-2], left[:-1], strict=True)] + [
        [left[-1]] * 2
    ]


def reducing_layers(schedule: Schedule, tokens: int) -> list[int]:
    """The layers that hand on fewer tokens than they get."""
    entering = [tokens, *(left for _, left in schedule)]
    return [layer for layer, (_, left) in enumerate(schedule) if left < entering[layer]]


def schedule_loss(curves: np.ndarray, schedule: Schedule) -> float:
    """What a schedule loses: in each layer, what going from the tokens that come in to those that
    are left adds.

    Args:
        curves: (layers, tokens + 1), what a layer loses by going from all tokens to n.
    """
    entering = [curves.shape[1] - 1, *(left for _, left in schedule)]
    pairs = enumerate(zip(entering, schedule, strict=False))
    return sum(
        float(curves[layer, left] - curves[layer, before]) for layer, (before, (_, left)) in pairs
    )


def candidate_schedules(
    config: ViTConfig,
    amounts: Mapping[str, int],
    curves: np.ndarray,
    reducing: Collection[int],
    cost: Cost = macs_of,
) -> list[Schedule]:
    """Schedules that are worth considering: from all tokens to the fewest, then single reductions
    that are not among them.

    Whatever the widths, the cheapest schedule is one of these: that of all tokens, or one that goes
    down to one patch at once. (Merging into a single patch costs no more than merging into several,
    and leaves less to do.)

    Args:
        config: of the model.
        amounts: the quantities that cost terms multiply, for widths that the result may have.
        curves: as for `schedule_loss`, falling with n.
        reducing: layers that may reduce their tokens.
        cost: what counts.
    """
    tokens, layers = num_tokens(config), range(config.num_hidden_layers)
    counts = np.arange(SMALLEST_COUNT, tokens + 1)
    costs = [_layer_costs(layer, config, amounts, counts, cost) for layer in layers]
    tables = [
        _layer_table(curves[layer], costs[layer], counts, layer in reducing) for layer in layers
    ]
    unit = sum(float(priced[-1, -1]) for _, priced in tables)  # all tokens everywhere
    prices = np.geomspace(1e-6, 1e2, PRICES) * max(float(curves.max()), 1e-12) / unit
    family = [[tokens] * len(layers)]
    for price in prices:
        left = _shortest_path([loss + price * priced for loss, priced in tables], counts)
        if left not in family:
            family.append(left)
    singles = [
        [tokens] * layer + [SMALLEST_COUNT] * (len(layers) - layer) for layer in sorted(reducing)
    ]
    family += [left for left in singles[:1] if left not in family]

    def share(left: list[int]) -> float:
        at = [count - SMALLEST_COUNT for count in (tokens, *left)]
        return (
            sum(float(table[1][a, b]) for table, a, b in zip(tables, at, at[1:], strict=False))
            / unit
        )

    family = _filled_in(family, share)
    family += [left for left in singles if left not in family]
    return [schedule_of(left, tokens) for left in family]


def _layer_costs(
    layer: int, config: ViTConfig, amounts: Mapping[str, int], counts: np.ndarray, cost: Cost
) -> np.ndarray:
    """Of each pair of tokens that come in and that are left, (counts, counts)."""
    before, after = counts[:, None], counts[None]
    kept = before if layer < config.num_hidden_layers - 1 else after
    weighs = before < num_tokens(config)  # whatever is gone was merged: only the last layer drops
    found = evaluate_terms(cost(vit_layer_parts(layer, before, kept, after, weighs)), amounts)
    return np.broadcast_to(found, (len(counts), len(counts))).astype(float)


def _layer_table(
    curve: np.ndarray, costs: np.ndarray, counts: np.ndarray, reduces: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What a layer loses and costs for each of these pairs, infinite for those that cannot be."""
    before, after = counts[:, None], counts[None]
    impossible = after > before if reduces else after != before
    return np.where(impossible, np.inf, curve[after] - curve[before]), np.where(
        impossible, np.inf, costs
    )


def _shortest_path(tables: list[np.ndarray], counts: np.ndarray) -> list[int]:
    """The counts after each layer that cost least in all, coming from the last of the counts."""
    best = np.full(len(counts), np.inf)
    best[-1], origins = 0.0, []
    for table in tables:
        total = best[:, None] + table
        origins.append(total.argmin(0))
        best = total.min(0)
    at, left = int(best.argmin()), []
    for origin in reversed(origins):
        left.append(int(counts[at]))
        at = int(origin[at])
    return left[::-1]


def _filled_in(family: list[list[int]], share: Callable[[list[int]], float]) -> list[list[int]]:
    """The family with more members where two neighbours are far from each other."""
    filled = family[:1]
    for before, after in itertools.pairwise(family):
        steps = int(abs(share(before) - share(after)) / LARGEST_GAP) + 1
        for step in range(1, steps + 1):
            between = [
                round(a + (b - a) * step / steps) for a, b in zip(before, after, strict=True)
            ]
            if between not in filled:
                filled.append(between)
    return filled


def best_schedule(
    family: list[Schedule],
    solve: Callable[[Schedule], Choice],
    curves: np.ndarray,
    lowest: float,
) -> Choice:
    """The schedule that is worth most together with the widths that its budget allows.

    Of a long family looks at every fourth schedule, then closer around the best: worth rises and
    falls once, or nearly.

    Args:
        solve: the best widths under a schedule; raises UnreachableBudgetError where none fit.
        curves: as for `schedule_loss`, in the unit of the choices' scores.
        lowest: cost from which on the budget counts as used.

    Returns:
        A choice with its `token_schedule`, and what the tokens lose taken off its score.

    Raises:
        UnreachableBudgetError: if the widths fit under no schedule, naming what the smallest
            network of all costs.
    """

    @functools.cache
    def at(index: int) -> Choice | UnreachableBudgetError:
        return _with_widths(family[index], solve, curves)

    def rank(index: int) -> tuple[bool, bool, float]:
        found = at(index)
        if isinstance(found, UnreachableBudgetError):
            return False, False, -found.smallest
        within = found.cost >= lowest
        return True, within, found.score if within else found.cost

    every = range(len(family))
    stride = 1 if len(family) <= SHORT else STRIDE
    best = max([*every[::stride], every[-1]], key=rank)
    if not rank(best)[0]:  # few schedules let the widths fit, or none
        best = max(every, key=rank)
        if not rank(best)[0]:
            raise at(best)
    while stride > 1:
        stride //= 2
        best = max(
            (index for index in (best, best - stride, best + stride) if index in every), key=rank
        )
    return at(best)


def spread_choices(
    family: list[Schedule],
    solve: Callable[[Schedule], Choice],
    curves: np.ndarray,
    lowest: float,
) -> list[Choice]:
    """Settlements from all parts of a family, in its order, that use the budget; arguments as for
    `best_schedule`."""
    stride = -(-len(family) // ALTERNATIVES)
    found = [_with_widths(schedule, solve, curves) for schedule in family[::stride]]
    return [each for each in found if isinstance(each, Choice) and each.cost >= lowest]


def _with_widths(
    schedule: Schedule, solve: Callable[[Schedule], Choice], curves: np.ndarray
) -> Choice | UnreachableBudgetError:
    """A schedule with the best widths beside it; or the refusal, if it leaves too many tokens for
    any."""
    try:
        widths = solve(schedule)
    except UnreachableBudgetError as refusal:
        return refusal
    return replace(
        widths, score=widths.score - schedule_loss(curves, schedule), token_schedule=schedule
    )
