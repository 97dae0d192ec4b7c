"""Token schedules that a search under one budget has to consider, and the best of them.

If cost has a price, the best schedule is a shortest path through the layers. Falling prices give a
list of schedules, from all tokens to the fewest; each leaves another budget to the widths. Which of
them makes the best network depends on the widths: a token reduction has a cost of its own, and
saves next to nothing where the layers behind it are narrow or removed.
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
from ..families.token_reduction import layer_parts
from ..tokens.schedules import Cost, Schedule, num_tokens
from .problem import Choice

SMALLEST_COUNT = 2  # the class token and a patch
# Prices for which a schedule is found, evenly spaced on a logarithmic scale.
PRICES = 40
LOWEST_PRICE, HIGHEST_PRICE = 1e-6, 1e2
# A list of more schedules than SHORT is searched in steps of STRIDE first.
SHORT = 24
STRIDE = 4
# Choices, at most, that are compared where their loss can be measured.
ALTERNATIVES = 16
# Neighbours in the list whose costs are further apart than this fraction of the dense cost get
# other schedules between them.
LARGEST_GAP = 0.02


def attention_of(layer: int) -> str:
    """Return the name of the submodule by which a layer of a ViT ranks its tokens."""
    return f"layers.{layer}.attention"


def schedule_of(
    leaving: list[int],
    tokens: int,
) -> Schedule:
    """Return the schedule that merges tokens down to these counts.

    The last layer drops them instead: its patches are not read any more.

    Args:
        leaving: tokens that leave each layer, none more than the one before.
        tokens: tokens that enter the first layer.
    """
    schedule = []
    entering = tokens
    for left in leaving[:-1]:
        schedule.append([entering, left])  # tokens after dropping and after merging
        entering = left
    return [*schedule, [leaving[-1], leaving[-1]]]


def reducing_layers(
    schedule: Schedule,
    tokens: int,
) -> list[int]:
    """Return the layers that hand on fewer tokens than they get."""
    reducing = []
    entering = tokens
    for layer, (_, leaving) in enumerate(schedule):
        if leaving < entering:
            reducing.append(layer)
        entering = leaving
    return reducing


def schedule_loss(
    curves: np.ndarray,
    schedule: Schedule,
) -> float:
    """Return what a schedule loses: the sum of what each layer adds by going from n to n' tokens.

    Args:
        curves: (layers, tokens + 1), what a layer loses by going from all tokens to n.
        schedule: a token schedule of all layers.
    """
    loss = 0.0
    entering = curves.shape[1] - 1
    for layer, (_, leaving) in enumerate(schedule):
        loss += float(curves[layer, leaving] - curves[layer, entering])
        entering = leaving
    return loss


def candidate_schedules(
    config: ViTConfig,
    amounts: Mapping[str, int],
    curves: np.ndarray,
    reducing: Collection[int],
    cost: Cost = macs_of,
) -> list[Schedule]:
    """Return the schedules worth considering: from all tokens to the fewest, and single reductions.

    Whatever the widths, the cheapest schedule is one of these: that of all tokens, or one that goes
    down to one patch at once. (Merging into a single patch costs no more than merging into several,
    and leaves less to do.)

    Args:
        config: of the model.
        amounts: the quantities that cost terms multiply, for widths that the result may have.
        curves: as for `schedule_loss`, falling with n.
        reducing: layers that may reduce their tokens.
        cost: returns the cost terms of forward parts.
    """
    tokens = num_tokens(config)
    num_layers = config.num_hidden_layers
    counts = np.arange(SMALLEST_COUNT, tokens + 1)  # (N,)
    losses = []  # of each layer, (N, N)
    costs = []  # of each layer, (N, N)
    for layer in range(num_layers):
        impossible = _impossible(counts, reduces=layer in reducing)
        curve = curves[layer][counts]  # (N,)
        loss = curve[None] - curve[:, None]  # (N, N), rows: tokens that enter
        losses.append(np.where(impossible, np.inf, loss))
        layer_costs = _layer_costs(layer, config, amounts, counts, cost)
        costs.append(np.where(impossible, np.inf, layer_costs))
    # All tokens everywhere: the last entry of each table.
    dense_cost = sum(float(layer_costs[-1, -1]) for layer_costs in costs)

    def cost_fraction(leaving: list[int]) -> float:
        """Return the cost of a schedule as a fraction of that of all tokens."""
        at = [count - SMALLEST_COUNT for count in (tokens, *leaving)]
        pairs = itertools.pairwise(at)
        steps = zip(costs, pairs, strict=True)
        return sum(float(layer_costs[pair]) for layer_costs, pair in steps) / dense_cost

    # From "tokens cost nothing" to "tokens are worth nothing", in units of the losses.
    prices = np.geomspace(LOWEST_PRICE, HIGHEST_PRICE, PRICES)
    largest_loss = max(float(curves.max()), 1e-12)
    prices = prices * largest_loss / dense_cost
    found = [[tokens] * num_layers]
    for price in prices:
        tables = [loss + price * priced for loss, priced in zip(losses, costs, strict=True)]
        leaving = _shortest_path(tables, counts)
        if leaving not in found:
            found.append(leaving)
    singles = []  # down to one patch at once, in one of the layers
    for layer in sorted(reducing):
        singles.append([tokens] * layer + [SMALLEST_COUNT] * (num_layers - layer))
    found += [leaving for leaving in singles[:1] if leaving not in found]
    found = _filled_in(found, cost_fraction)
    found += [leaving for leaving in singles if leaving not in found]
    return [schedule_of(leaving, tokens) for leaving in found]


def _layer_costs(
    layer: int,
    config: ViTConfig,
    amounts: Mapping[str, int],
    counts: np.ndarray,
    cost: Cost,
) -> np.ndarray:
    """Return the cost of a layer for each pair of tokens that enter and leave it, (N, N)."""
    entering = counts[:, None]
    leaving = counts[None]
    # Only the last layer drops tokens. Before it all tokens stay until they are merged, and those
    # that have been merged carry weights in the attention.
    is_last = layer == config.num_hidden_layers - 1
    kept = leaving if is_last else entering
    weighs = entering < num_tokens(config)
    parts = layer_parts(config, layer, entering, kept, leaving, weighs)
    found = evaluate_terms(cost(parts), amounts)
    return np.broadcast_to(found, (len(counts), len(counts))).astype(float)


def _impossible(
    counts: np.ndarray,
    reduces: bool,
) -> np.ndarray:
    """Return which pairs of tokens that enter and leave a layer cannot be, bool (N, N)."""
    entering = counts[:, None]
    leaving = counts[None]
    return leaving > entering if reduces else leaving != entering


def _shortest_path(
    tables: list[np.ndarray],
    counts: np.ndarray,
) -> list[int]:
    """Return the counts after each layer that cost least in all, if all tokens enter the first.

    Args:
        tables: of each layer, the length of a step from one count to another, (N, N).
        counts: ascending, (N,).
    """
    best = np.full(len(counts), np.inf)  # length of the shortest path to each count
    best[-1] = 0.0
    origins = []  # of each layer, the count that the shortest path comes from, (N,)
    for table in tables:
        total = best[:, None] + table
        origins.append(total.argmin(0))
        best = total.min(0)
    path = []
    at = int(best.argmin())
    for origin in reversed(origins):
        path.append(int(counts[at]))
        at = int(origin[at])
    return path[::-1]


def _filled_in(
    found: list[list[int]],
    cost_fraction: Callable[[list[int]], float],
) -> list[list[int]]:
    """Return the counts of schedules with others between neighbours whose costs are far apart."""
    filled = found[:1]
    for before, after in itertools.pairwise(found):
        gap = abs(cost_fraction(before) - cost_fraction(after))
        steps = int(gap / LARGEST_GAP) + 1
        for step in range(1, steps + 1):
            between = []
            for start, end in zip(before, after, strict=True):
                change = (end - start) * step / steps
                between.append(round(start + change))
            if between not in filled:
                filled.append(between)
    return filled


def best_schedule(
    schedules: list[Schedule],
    solve: Callable[[Schedule], Choice],
    curves: np.ndarray,
    lowest: float,
) -> Choice:
    """Return the schedule that is worth most together with the widths that its budget allows.

    Of a long list every fourth schedule is tried, then others closer and closer around the best
    one: along the list the worth rises and falls once, or nearly so.

    Args:
        schedules: from all tokens to the fewest, at least one.
        solve: returns the best widths under a schedule; raises UnreachableBudgetError if none fit.
        curves: as for `schedule_loss`, in the unit of the choices' scores.
        lowest: cost from which on the budget counts as used.

    Returns:
        A choice with its `token_schedule`; what the tokens lose is subtracted from its score.

    Raises:
        UnreachableBudgetError: if widths fit under no schedule, naming the cost of the smallest
            network of all.
    """

    @functools.cache
    def solved(index: int) -> Choice | UnreachableBudgetError:
        return _with_widths(schedules[index], solve, curves)

    def rank(index: int) -> tuple[bool, bool, float]:
        found = solved(index)
        if isinstance(found, UnreachableBudgetError):
            return False, False, -found.smallest
        within = found.cost >= lowest
        return True, within, found.score if within else found.cost

    every = range(len(schedules))
    stride = 1 if len(schedules) <= SHORT else STRIDE
    best = max([*every[::stride], every[-1]], key=rank)
    if isinstance(solved(best), UnreachableBudgetError):
        # Few schedules let the widths fit, or none: some may lie between those that were tried.
        best = max(every, key=rank)
        if isinstance(solved(best), UnreachableBudgetError):
            raise solved(best)
    while stride > 1:
        stride //= 2
        nearby = [index for index in (best, best - stride, best + stride) if index in every]
        best = max(nearby, key=rank)
    return solved(best)


def spread_choices(
    schedules: list[Schedule],
    solve: Callable[[Schedule], Choice],
    curves: np.ndarray,
    lowest: float,
) -> list[Choice]:
    """Return choices that use the budget, evenly from the whole list and in its order.

    Args:
        schedules, solve, curves, lowest: as for `best_schedule`.

    Returns:
        `ALTERNATIVES` choices at most.
    """
    stride = -(-len(schedules) // ALTERNATIVES)  # rounded up
    choices = []
    for schedule in schedules[::stride]:
        found = _with_widths(schedule, solve, curves)
        if isinstance(found, Choice) and found.cost >= lowest:
            choices.append(found)
    return choices


def _with_widths(
    schedule: Schedule,
    solve: Callable[[Schedule], Choice],
    curves: np.ndarray,
) -> Choice | UnreachableBudgetError:
    """Return a schedule with the best widths, or the error if no widths fit next to its tokens."""
    try:
        widths = solve(schedule)
    except UnreachableBudgetError as refusal:
        return refusal
    score = widths.score - schedule_loss(curves, schedule)
    return replace(widths, score=score, token_schedule=schedule)
