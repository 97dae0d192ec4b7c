"""Token schedules as data: what they cost, fixed-rate ones, and whole counts near learned ones.

A token schedule holds two counts for each layer, class token included: the tokens kept after
dropping, and the tokens that leave the layer after merging. What a model does with a token schedule
is in `models/`; how one is learned, in `token_search/`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from transformers import ViTConfig

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import evaluate_terms
from ..families.description import Part, Term, UnsupportedArchitectureError, macs_of, quantities
from ..families.registry import describe
from ..families.token_reduction import require_class_token, schedule_parts

# [[kept after dropping, left after merging], ...], one pair for each layer.
Schedule = list[list[int]]
# The same with expectations, or with scalar tensors, instead of whole numbers.
Counts = list[list[Any]]
# What forward parts cost: MACs (`macs_of`), or picoseconds (`LatencyTable.terms_of`).
Cost = Callable[[Iterable[Part]], tuple[Term, ...]]

SMALLEST = [2, 2]  # the class token and one patch
# A bisection brings a schedule this near to its budget, in tokens per layer; what rounding leaves
# of the budget is then used up token by token.
FINENESS = 1 / 64


def num_tokens(config: ViTConfig) -> int:
    """Return the number of tokens of one image, class token included."""
    require_class_token(config)
    rows, columns = describe(config).patch_grid
    return rows * columns + 1


def full_schedule(config: ViTConfig) -> Schedule:
    """Return the token schedule that keeps all tokens."""
    tokens = num_tokens(config)
    return [[tokens, tokens] for _ in range(config.num_hidden_layers)]


def ranking_layers(config: ViTConfig) -> list[int]:
    """Return the layers that have an attention, by which tokens can be ranked."""
    require_class_token(config)
    sizes = describe(config).sizes
    ranking = []
    for layer in range(config.num_hidden_layers):
        heads_and_channels = sizes[f"layers.{layer}.attention"]
        if math.prod(heads_and_channels) > 0:
            ranking.append(layer)
    return ranking


def learning_layers(config: ViTConfig) -> list[int]:
    """Return the layers that learn how many tokens to keep: all with attention except the first.

    The first layer with attention keeps all tokens. The last one is in the list, but has nothing to
    learn: it keeps one patch, because no attention reads the others.

    Raises:
        UnsupportedArchitectureError: for models without a class token, and for models with
            attention in fewer than three layers.
    """
    layers = ranking_layers(config)
    if len(layers) < 3:
        raise UnsupportedArchitectureError(
            f"num_hidden_layers is {config.num_hidden_layers}, with attention in layers {layers}; "
            "the first of them keeps all tokens and the last one patch, so tokens are searched in "
            "models with attention in at least 3 layers. Give a token_schedule by hand."
        )
    return layers[1:]


def learned_schedule(config: ViTConfig, counts: Counts, last: list[int] = SMALLEST) -> Counts:
    """Return the token schedule with these counts in the layers that learn them.

    The other layers hand on all tokens that enter them.

    Args:
        counts: [kept after dropping, left after merging] of all `learning_layers` but the last.
        last: the same for the last one.
    """
    _, *layers = ranking_layers(config)
    # The first layer with attention keeps all tokens, as the layers without attention do.
    pairs = [*counts, last]
    pair_of = dict(zip(layers, pairs, strict=True))
    entering = num_tokens(config)
    schedule: Counts = []
    for layer in range(config.num_hidden_layers):
        kept = left = entering
        if layer in pair_of:
            kept, left = pair_of[layer]
        schedule.append([kept, left])
        entering = left
    return schedule


def schedule_cost(config: ViTConfig, schedule: Counts, cost: Cost = macs_of) -> Any:
    """Return what a model costs under a token schedule; equals `count_cost` of the reduced model.

    Args:
        config: of the model.
        schedule: counts that do not rise from layer to layer: whole numbers for an exact cost, or
            scalar tensors for a cost to differentiate.
        cost: what counts.
    """
    return _cost_under(config, cost)(schedule)


def _cost_under(config: ViTConfig, cost: Cost) -> Callable[[Counts], Any]:
    """Return `schedule_cost` as a function of the schedule alone; the model is read only once."""
    amounts = quantities(describe(config).sizes)

    def cost_of(schedule: Counts) -> Any:
        terms = cost(schedule_parts(config, schedule))
        return evaluate_terms(terms, amounts)

    return cost_of


def fixed_rate_schedule(
    config: ViTConfig, target: int, merge: bool = True, cost: Cost = macs_of
) -> Schedule:
    """Return the largest schedule within the budget that takes the same number from every layer.

    The first layer keeps all tokens. A layer without attention cannot rank tokens, so it hands on
    all that enter it, and the next layer with attention takes away what this one should have.

    Args:
        config: of the model.
        target: budget in what `cost` counts.
        merge: whether tokens are merged (ToMe, arXiv:2210.09461) or dropped.
        cost: what counts.

    Raises:
        UnreachableBudgetError: if no schedule of this kind fits.
    """
    tokens = num_tokens(config)
    attends = ranking_layers(config)

    def schedule_at(rate: float) -> Schedule:
        schedule = [[tokens, tokens]]
        for layer in range(1, config.num_hidden_layers):
            entering = schedule[-1][1]
            left = entering
            # From the number of tokens of the image, not from those that enter: so later layers
            # make up for those without attention, and rounding errors do not add up.
            if layer in attends:
                left = max(2, round(tokens - rate * layer))
            kept = entering if merge else left  # merging drops nothing first
            schedule.append([kept, left])
        return schedule

    rate = _smallest_fitting(
        _cost_under(config, cost), target, schedule_at, low=0.0, high=float(tokens)
    )
    return schedule_at(rate)


def smallest_schedule(config: ViTConfig, cost: Cost = macs_of) -> Schedule:
    """Return the cheapest schedule that `rounded_schedule` can give.

    It keeps one patch from the first `learning_layers` on, without reductions that cost more than
    they save.
    """
    whole = _WholeCounts(config, cost)
    counts = whole.worthwhile([SMALLEST] * whole.num_layers)
    return whole.token_schedule(counts)


def rounded_schedule(
    config: ViTConfig, expected: Counts, target: int, cost: Cost = macs_of
) -> Schedule:
    """Return whole counts near learned ones, whose cost is at most the budget.

    All counts are lowered by the same amount until they fit, or raised where there is room. Then
    single tokens are given back, first where rounding took most. No count rises above the next
    whole number, so where tokens are few, or token reduction is dear, some of the budget may remain
    unused.

    Args:
        config: of the model.
        expected: learned [kept, left] of all `learning_layers` but the last, as expectations.
        target: budget in what `cost` counts.
        cost: what counts.

    Raises:
        UnreachableBudgetError: if no schedule fits.
    """
    whole = _WholeCounts(config, cost)

    def counts_at(amount: float) -> Schedule:
        return whole.nearest(_lowered(expected, amount))

    tokens = float(whole.tokens)
    amount = _smallest_fitting(whole.cost, target, counts_at, low=-tokens, high=tokens)
    wanted = _lowered(expected, amount)
    counts = counts_at(amount)
    previous = None
    # A reduction that is left out saves cost. That may buy tokens elsewhere, after which another
    # reduction may not be worth its price. Counts only rise, so this ends.
    while counts != previous:
        previous = counts
        counts = whole.filled_up(counts, wanted, target)
        counts = whole.worthwhile(counts)
    return whole.token_schedule(counts)


class _WholeCounts:
    """Whole counts near learned ones: which schedule they stand for, its cost, what improves it.

    All methods take counts as a list with one [kept, left] for each of `learning_layers`, the last
    one included. Counts may rise from layer to layer; what they stand for does not.

    Args:
        config: of the model.
        cost: what counts.
    """

    def __init__(self, config: ViTConfig, cost: Cost):
        self.config = config
        self.tokens = num_tokens(config)
        self.num_layers = len(learning_layers(config))
        self._cost_of = _cost_under(config, cost)

    def token_schedule(self, counts: Schedule) -> Schedule:
        """Return the token schedule of the model that these counts stand for."""
        *falling, last = _falling(counts, self.tokens)
        return learned_schedule(self.config, falling, last)

    def cost(self, counts: Schedule) -> int:
        """Return what the model costs under these counts."""
        return self._cost_of(self.token_schedule(counts))

    def nearest(self, expected: Counts) -> Schedule:
        """Return the whole counts nearest to expected ones, without useless reductions.

        Args:
            expected: [kept, left] of all layers but the last, which keeps one patch.
        """
        rounded = []
        for kept, left in expected:
            rounded.append([_rounded(kept), _rounded(left)])
        counts = _falling(rounded, self.tokens)
        return self.worthwhile([*counts, SMALLEST])

    def worthwhile(self, counts: Schedule) -> Schedule:
        """Return the counts without reductions that cost more than they save.

        A reduction has a price of its own, above all in time: a few large ones may pay where many
        small ones do not. A layer whose reduction is left out counts all tokens.
        """
        # Greedy: the best reduction to leave out, then the next best, while it saves anything.
        while True:
            alternatives = self._without_one_reduction(counts)
            cheapest = min(alternatives, key=self.cost, default=counts)
            if self.cost(cheapest) >= self.cost(counts):
                return counts
            counts = cheapest

    def _without_one_reduction(self, counts: Schedule) -> list[Schedule]:
        """Return the counts without one of the reductions, for each reduction in two ways.

        The layers between it and the next one keep their counts, and so may catch up on it; or they
        let all tokens pass as well.
        """
        entering = _entering(counts, self.tokens)
        ends = []  # where what is left out may end: at the next reduction, or behind all layers
        for layer in range(len(counts)):
            if entering[layer + 1] < entering[layer]:
                ends.append(layer)
        ends.append(len(counts))
        alternatives = []
        for layer, following in itertools.pairwise(ends):
            for end in {layer + 1, following}:  # a set: they may be the same
                # As many tokens as can come in: `_falling` lowers it to those that do.
                passing = [[self.tokens, self.tokens]] * (end - layer)
                before = counts[:layer]
                behind = counts[end:]
                alternatives.append(before + passing + behind)
        return alternatives

    def filled_up(self, counts: Schedule, wanted: Counts, target: int) -> Schedule:
        """Return the counts plus single tokens, as long as the budget allows one more.

        The next token goes where the count is furthest below the wanted one.

        Args:
            counts: whole counts that fit.
            wanted: expected counts of all layers but the last; no count rises above the whole
                number after its expectation.
            target: the budget.
        """
        counts = [list(pair) for pair in counts]
        while True:
            entering = _entering(counts, self.tokens)
            candidates = []
            for layer, wanted_pair in enumerate(wanted):
                for place in (0, 1):  # kept, left
                    missing = wanted_pair[place] - counts[layer][place]
                    if missing <= -1:  # one more would be above the next whole number
                        continue
                    more = [list(pair) for pair in counts]
                    more[layer][place] += 1
                    kept, left = more[layer]
                    falls = entering[layer] >= kept >= left
                    if falls and self.cost(more) <= target:
                        candidates.append((missing, layer, place))
            if not candidates:
                return counts
            _, layer, place = max(candidates)
            counts[layer][place] += 1


def _lowered(counts: Counts, amount: float) -> Counts:
    """Return the counts minus an amount, which may be negative."""
    return [[kept - amount, left - amount] for kept, left in counts]


def _rounded(count: float) -> int:
    """Return the nearest whole count; halves go up, and one patch always remains."""
    return max(2, math.floor(count + 0.5))


def _falling(counts: Schedule, tokens: int) -> Schedule:
    """Return what the counts stand for: no count exceeds the one before it.

    Args:
        counts: [kept, left] of some layers.
        tokens: that enter the first of them.
    """
    falling = []
    entering = tokens
    for kept, left in counts:
        kept = min(entering, kept)
        entering = min(kept, left)
        falling.append([kept, entering])
    return falling


def _entering(counts: Schedule, tokens: int) -> list[int]:
    """Return the tokens that enter each layer, and at the end those that leave the last one."""
    entering = [tokens]
    for _, left in _falling(counts, tokens):
        entering.append(left)
    return entering


def _smallest_fitting(
    cost_of: Callable[[Schedule], int],
    target: int,
    schedule_at: Callable[[float], Schedule],
    low: float,
    high: float,
) -> float:
    """Return the smallest rate whose schedule fits, up to `FINENESS`; the schedule of it does fit.

    Args:
        cost_of: cost of a schedule.
        target: the budget.
        schedule_at: schedule at a rate; its cost falls with the rate.
        low: smallest rate to consider.
        high: largest one.

    Raises:
        UnreachableBudgetError: if not even the schedule at the largest rate fits.
    """
    smallest = cost_of(schedule_at(high))
    if smallest > target:
        raise UnreachableBudgetError(
            f"no token schedule of this kind costs at most {target:,}; the smallest one costs "
            f"{smallest:,}. Raise the budget to at least that.",
            smallest,
        )
    if cost_of(schedule_at(low)) <= target:
        return low
    while high - low > FINENESS:
        middle = (low + high) / 2
        if cost_of(schedule_at(middle)) <= target:
            high = middle
        else:
            low = middle
    return high
