"""Token schedules: published ones (DiffRate, arXiv:2305.17997), fixed-rate ones, and whole counts
near learned ones.

A schedule says for each layer how many tokens are left after dropping and after merging, class
token included. What a model does with it is in `models/`; how one is learned, in
`learned_tokens.py`.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, ViTConfig

from ..cost.budget import UnreachableBudgetError
from ..cost.counting import evaluate_terms
from ..families.description import Part, Term, UnsupportedArchitectureError, macs_of, quantities
from ..families.registry import describe
from ..families.vit import vit_parts

Schedule = list[list[int]]
# What is counted of parts of the forward pass: `macs_of`, or picoseconds (`LatencyTable.terms_of`).
Cost = Callable[[Iterable[Part]], tuple[Term, ...]]

SMALLEST = [2, 2]  # the class token and one patch
# How near a schedule is brought to its budget before single tokens are counted, in tokens per
# layer.
FINENESS = 1 / 64


def require_class_token(model: nn.Module | PreTrainedConfig) -> None:
    """Raises `UnsupportedArchitectureError` unless tokens of the model, or of one with this config,
    can be ranked by its class token."""
    if getattr(getattr(model, "config", model), "model_type", None) not in ("vit", "ofb_vit"):
        raise UnsupportedArchitectureError(
            f"got a {type(model).__name__}; tokens are ranked by the attention of a class token, "
            f"which among the "
            "supported families only ViT has. (Swin has none, and its windows need the whole grid.)"
        )


def num_tokens(config: ViTConfig) -> int:
    """Tokens of one image, class token included."""
    require_class_token(config)
    return math.prod(describe(config).patch_grid) + 1


def full_schedule(config: ViTConfig) -> Schedule:
    """The schedule that keeps all tokens."""
    return [[num_tokens(config)] * 2 for _ in range(config.num_hidden_layers)]


def ranking_layers(config: ViTConfig) -> list[int]:
    """The layers that have an attention to rank tokens by."""
    require_class_token(config)
    sizes = describe(config).sizes
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if math.prod(sizes[f"layers.{layer}.attention"])
    ]


def learning_layers(config: ViTConfig) -> list[int]:
    """The layers that learn how many tokens to keep: those with attention but for the first, which
    keeps all tokens.

    The last of them has nothing to learn: it drops to one patch, for no attention reads the others.

    Raises:
        UnsupportedArchitectureError: for models without a class token, and with attention in fewer
            than three layers.
    """
    if len(layers := ranking_layers(config)) < 3:
        raise UnsupportedArchitectureError(
            f"num_hidden_layers is {config.num_hidden_layers}, with attention in layers {layers}; "
            f"the first of them "
            "keeps all tokens and the last one patch, so tokens are searched in models with "
            "attention in at least 3 "
            "layers. Give a token_schedule by hand."
        )
    return layers[1:]


def learned_schedule(
    config: ViTConfig, counts: list[list[Any]], last: list[int] = SMALLEST
) -> list[list[Any]]:
    """The schedule with these counts in the layers that learn them. Other layers hand on what they
    get.

    Args:
        counts: [kept after dropping, kept after merging] of each of them but the last.
        last: the same of that one.
    """
    _, *layers = ranking_layers(config)
    given = dict(zip(layers, [*counts, last], strict=True))
    schedule: list[list[Any]] = []
    for layer in range(config.num_hidden_layers):
        left = schedule[-1][1] if schedule else num_tokens(config)
        schedule.append(list(given.get(layer, (left, left))))
    return schedule


def schedule_cost(config: ViTConfig, schedule: list[list[Any]], cost: Cost = macs_of) -> Any:
    """What a model costs under a schedule whose counts do not rise; `count_cost` of the model that
    obeys it.

    Args:
        schedule: whole numbers, for exact costs, or scalar tensors, for a cost to differentiate.
        cost: what counts.
    """
    return _counter(config, cost)(schedule)


def _counter(config: ViTConfig, cost: Cost) -> Callable[[list[list[Any]]], Any]:
    """`schedule_cost` for many schedules of one model."""
    amounts = quantities(describe(config).sizes)
    return lambda schedule: evaluate_terms(cost(vit_parts(config, schedule)), amounts)


def fixed_rate_schedule(
    config: ViTConfig, target: int, merge: bool = True, cost: Cost = macs_of
) -> Schedule:
    """As many tokens fewer in every layer but the first, by merging (ToMe, arXiv:2210.09461) or
    dropping.

    Args:
        target: budget in what `cost` counts; the schedule is the largest of its kind that fits.

    Raises:
        UnreachableBudgetError: where none fits.
    """

    tokens, attends = num_tokens(config), ranking_layers(config)

    def at(rate: float) -> Schedule:
        schedule = [[tokens, tokens]]
        for layer in range(1, config.num_hidden_layers):
            # Where there is no attention, there is nothing to rank tokens by: all that come in go
            # on.
            left = max(2, round(tokens - rate * layer)) if layer in attends else schedule[-1][1]
            schedule.append([schedule[-1][1] if merge else left, left])
        return schedule

    return at(_smallest_rate(_counter(config, cost), target, at, 0.0, float(tokens)))


def smallest_schedule(config: ViTConfig, cost: Cost = macs_of) -> Schedule:
    """One patch from the first layer that learns on, without reductions that cost more than they
    save: the least that `rounded_schedule` can come to."""
    settling = _Settling(config, cost)
    return settling.meant(settling.worthwhile([SMALLEST] * settling.layers))


def rounded_schedule(
    config: ViTConfig, expected: list[list[float]], target: int, cost: Cost = macs_of
) -> Schedule:
    """Whole counts near learned ones, whose cost is at most the budget.

    All counts are lowered alike until they fit, or raised alike where there is room; then single
    tokens are given back where rounding took most. No count rises beyond the whole number after it,
    so where counts are few, or reductions dear, some of the budget may stay unused.

    Args:
        expected: learned (kept, merged), as expectations, of the layers that learn them
            (`learned_schedule`).
        target: budget in what `cost` counts.

    Raises:
        UnreachableBudgetError: where no schedule fits.
    """
    settling, tokens = _Settling(config, cost), num_tokens(config)

    def at(removed: float) -> Schedule:
        rounded = [
            [max(2, math.floor(count - removed + 0.5)) for count in counts] for counts in expected
        ]
        return settling.worthwhile([*_falling(rounded, tokens), SMALLEST])

    removed = _smallest_rate(settling.count, target, at, -float(tokens), float(tokens))
    wanted = [[count - removed for count in counts] for counts in expected]
    learned, best = [], at(removed)
    while best != learned:
        learned, best = (
            best,
            settling.worthwhile(_filled(settling.count, best, wanted, target, tokens)),
        )
    return settling.meant(best)


class _Settling:
    """Whole counts of the layers that learn them, the last of these included: what they mean and
    cost."""

    def __init__(self, config: ViTConfig, cost: Cost):
        self.config, self.tokens, self.counted = config, num_tokens(config), _counter(config, cost)
        self.layers = len(learning_layers(config))

    def meant(self, learned: Schedule) -> Schedule:
        """The schedule of the model."""
        *counts, last = _falling(learned, self.tokens)
        return learned_schedule(self.config, counts, last)

    def count(self, learned: Schedule) -> int:
        """What the model costs under it."""
        return self.counted(self.meant(learned))

    def worthwhile(self, learned: Schedule) -> Schedule:
        """The counts without reductions that cost more than they save; such layers have all tokens,
        and let them pass.

        A reduction has a price of its own, in time above all: a few large ones may be worth it
        where many small ones are not.
        """
        while True:
            cheapest = min(self._with_one_less(learned), key=self.count, default=learned)
            if self.count(cheapest) >= self.count(learned):
                return learned
            learned = cheapest

    def _with_one_less(self, learned: Schedule) -> list[Schedule]:
        """The counts without one of the reductions; the layers behind it, up to the next one, may
        make up for it, or let all tokens pass as well."""
        left = [self.tokens, *(merged for _, merged in _falling(learned, self.tokens))]
        reducing = [layer for layer in range(len(learned)) if left[layer + 1] < left[layer]]
        fewer = []
        for layer, following in itertools.pairwise([*reducing, len(learned)]):
            for end in {layer + 1, following}:
                passing = [[self.tokens, self.tokens]] * (end - layer)
                fewer.append([*learned[:layer], *passing, *learned[end:]])
        return fewer


def _falling(counts: Schedule, tokens: int) -> Schedule:
    """The counts that are meant: no more than before. `tokens` enter the first layer."""
    left, falling = tokens, []
    for kept, merged in counts:
        kept = min(left, kept)
        left = min(kept, merged)
        falling.append([kept, left])
    return falling


def _smallest_rate(
    count: Callable[[Schedule], int],
    target: int,
    at: Callable[[float], Schedule],
    low: float,
    high: float,
) -> float:
    """Where the schedules between two rates begin to fit; the schedule of what is returned does."""
    if (smallest := count(at(high))) > target:
        raise UnreachableBudgetError(
            f"no token schedule of this kind costs at most {target:,}, the smallest costs "
            f"{smallest:,}; raise the "
            "budget to at least that.",
            smallest,
        )
    if count(at(low)) <= target:
        return low
    while high - low > FINENESS:
        middle = (low + high) / 2
        low, high = (low, middle) if count(at(middle)) <= target else (middle, high)
    return high


def _filled(
    count: Callable[[Schedule], int],
    learned: Schedule,
    wanted: list[list[float]],
    target: int,
    tokens: int,
) -> Schedule:
    """The counts with single tokens given back while the budget allows it, first where rounding
    took most.

    Args:
        count: cost under whole counts of the layers that learn them. learned: these counts.
        wanted: of the same layers; no count rises above the whole number after it.
        tokens: that enter the first of them.
    """
    learned = [list(pair) for pair in learned]
    while True:
        options, entering = [], [tokens, *(left for _, left in _falling(learned, tokens))]
        for layer, counts in enumerate(wanted):
            for place in (0, 1):
                more = [list(pair) for pair in learned]
                more[layer][place] += 1
                falls = entering[layer] >= more[layer][0] >= more[layer][1]
                missing = counts[place] - learned[layer][place]
                if falls and missing > -1 and count(more) <= target:
                    options.append((missing, layer, place))
        if not options:
            return learned
        _, layer, place = max(options)
        learned[layer][place] += 1
