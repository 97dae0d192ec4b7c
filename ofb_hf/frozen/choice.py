"""Which units, and how many tokens, a frozen network keeps under a budget."""

import functools
import math
from collections.abc import Callable

from transformers import PreTrainedModel

from ..choice.error_curves import ErrorCurve
from ..choice.problem import Candidate, Candidates, Choice
from ..choice.schedule_candidates import attention_of, reducing_layers
from ..choice.widths import WidthChoice
from ..cost.budget import UnreachableBudgetError
from ..cost.counting import evaluate_terms
from ..families.description import quantities
from ..families.registry import describe
from ..families.subnet import Kept, SubnetSpec, all_units
from ..families.token_reduction import scheduled
from ..space.configuration import BiMaskConfig
from ..space.search_space import SearchSpace, SubmoduleSpace
from ..tokens.graded_schedules import graded_schedules
from ..tokens.schedules import Schedule, num_tokens

# From the last token schedule to the next one that is tried: neighbours differ too little to tell.
FIRST_STRIDE = 2


def chosen_subnet(
    model: PreTrainedModel,
    config: BiMaskConfig,
    space: SearchSpace,
    curves: dict[str, ErrorCurve],
    tokens: bool = False,
    distance: Callable[[SubnetSpec], float] = lambda subnet: 0.0,
) -> SubnetSpec:
    """Return the subnet whose errors add up to least within the budget.

    How much of the budget tokens should give up is not added up but tried: with each token schedule
    that is considered, the best widths are chosen for the rest of the budget.

    Args:
        model: the classifier to cut, in the basis that the curves are about.
        config: the budget.
        space: candidate sizes.
        curves: of every submodule of the space.
        tokens: whether to choose a token schedule; otherwise that of the model stays.
        distance: how far a subnet, cut and fitted, predicts from what the model does.

    Raises:
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible cost.
    """
    problem = _Problem(model, config, space, curves)
    if not tokens:
        return problem.subnet()
    schedules = graded_schedules(model.config, problem.target, config.terms_of)

    @functools.cache
    def tried(index: int) -> tuple[float, SubnetSpec | UnreachableBudgetError]:
        try:
            subnet = problem.subnet(schedules[index])
        except UnreachableBudgetError as refusal:
            return math.inf, refusal
        return distance(subnet), subnet

    best = _lowest(len(schedules), lambda index: tried(index)[0])
    _, subnet = tried(best)
    if isinstance(subnet, UnreachableBudgetError):
        raise subnet
    return subnet


class _Problem:
    """The best widths under a budget, with any token schedule; arguments as of `chosen_subnet`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: BiMaskConfig,
        space: SearchSpace,
        curves: dict[str, ErrorCurve],
    ):
        self.model_config = model.config
        self.config = config
        self.curves = curves
        self.architecture = describe(model.config)
        sizes = self.architecture.sizes
        self.target = config.target(
            evaluate_terms(config.terms(self.architecture), quantities(sizes))
        )
        self.widths = WidthChoice(space, self.architecture, self.target, config.show)
        self.candidates = _candidates(space, curves)

    def subnet(self, schedule: Schedule | None = None) -> SubnetSpec:
        """Return the best subnet.

        Args:
            schedule: of its tokens; None = that of the model stays.

        Raises:
            UnreachableBudgetError: if no subnet with these tokens fits the budget.
        """
        if schedule is None:
            terms = self.config.terms(self.architecture)
            return SubnetSpec(self._kept(self.widths.best(self.candidates, terms)))
        reducing = reducing_layers(schedule, num_tokens(self.model_config))
        # they cannot be left out, for tokens are ranked by them
        ranking = [attention_of(layer) for layer in reducing]
        terms = self.config.terms(scheduled(self.model_config, schedule))
        choice = self.widths.best(self.candidates, terms, ranking)
        return SubnetSpec(self._kept(choice), self.model_config.stored_schedule(schedule))

    def _kept(self, choice: Choice) -> dict[str, Kept]:
        """Return the units of a choice, all of them where nothing was to be chosen."""
        kept: dict[str, Kept] = {}
        for name, shape in self.architecture.sizes.items():
            kept[name] = all_units(shape)
        for name, candidate in choice.candidates.items():
            kept[name] = _kept_units(candidate.size, self.curves[name])
        return kept


def _lowest(length: int, value: Callable[[int], float]) -> int:
    """Return about where a value is lowest that falls and then rises along a list.

    It is looked for from the end of the list in growing steps, then in halved ones around the best.
    """
    best, stride = length - 1, FIRST_STRIDE
    while best >= stride and value(best - stride) < value(best):
        best -= stride
        stride *= 2
    while stride > 1:
        stride //= 2
        nearby = [index for index in (best, best - stride, best + stride) if 0 <= index < length]
        best = min(nearby, key=value)
    return best


def _candidates(space: SearchSpace, curves: dict[str, ErrorCurve]) -> Candidates:
    """Return the candidates of all leaders; what they are worth is what nobody tied loses."""
    groups: dict[str, list[SubmoduleSpace]] = {}
    for each in space:
        groups.setdefault(each.tied_to or each.name, []).append(each)
    candidates: Candidates = {}
    for leader, group in groups.items():
        row = []
        for size in group[0].sizes:
            lost = sum(curves[each.name].errors[size] for each in group)
            row.append(Candidate(size, -lost))
        candidates[leader] = row
    return candidates


def _kept_units(size: tuple[int, ...], curve: ErrorCurve) -> Kept:
    """Return the units of a size, ascending; by head for a grid."""
    if len(size) == 1:
        return curve.remaining(size[0])
    heads, channels = size
    if not heads:
        return {}
    return {head: tuple(range(channels)) for head in curve.remaining(heads, channels)}
