"""Which units, and how many tokens, a frozen network keeps under a budget."""

from collections.abc import Callable, Collection

from transformers import PreTrainedModel

from ..choice.error_curves import ErrorCurve
from ..choice.knapsack import best_choice
from ..choice.problem import Candidate, Choice
from ..cost.counting import evaluate_terms
from ..families.description import Architecture, quantities
from ..families.registry import describe
from ..families.subnet import Kept, SubnetSpec, all_units
from ..search.searched_tokens import SearchedTokens
from ..space.configuration import BiMaskConfig
from ..space.search_space import SearchSpace, SubmoduleSpace


def chosen_subnet(
    model: PreTrainedModel,
    config: BiMaskConfig,
    space: SearchSpace,
    curves: dict[str, ErrorCurve],
    tokens: SearchedTokens | None = None,
    nearest: Callable[[list[SubnetSpec]], int] | None = None,
) -> SubnetSpec:
    """Return the subnet whose errors add up to least within the budget.

    Args:
        model: the classifier to cut, in the basis that the curves are about.
        config: the budget.
        space: candidate sizes.
        curves: of every submodule of the space.
        tokens: what merging tokens costs in every layer, if tokens are chosen as well.
        nearest: returns which of several subnets, cut and fitted, predicts most nearly what the
            model does; they differ in how much of the budget the tokens give up.

    Raises:
        UnreachableBudgetError: if no subnet fits the budget, naming the smallest possible cost.
    """
    architecture = describe(model.config)
    dense_cost = evaluate_terms(config.terms(architecture), quantities(architecture.sizes))
    target = config.target(dense_cost)
    candidates = {one.name: _candidates(one, curves[one.name]) for one in space}
    fixed = {name: size for name, size in architecture.sizes.items() if name not in candidates}

    def solve(counted: Architecture, needed: Collection[str]) -> Choice:
        allowed = dict(candidates)
        for name in needed:
            if name in allowed:
                allowed[name] = [candidate for candidate in allowed[name] if candidate.units]
        return best_choice(
            allowed,
            config.terms(counted),
            quantities(fixed),
            target,
            needed=architecture.attentions,
            show=config.show,
        )

    def subnet_of(choice: Choice) -> SubnetSpec:
        kept: dict[str, Kept] = {}
        for name, shape in architecture.sizes.items():
            kept[name] = all_units(shape)
        for name, candidate in choice.candidates.items():
            kept[name] = _kept_units(candidate.size, curves[name])
        schedule = choice.token_schedule
        if schedule is not None:
            schedule = model.config.stored_schedule(schedule)
        return SubnetSpec(kept, schedule)

    if tokens is None:
        return subnet_of(solve(architecture, []))

    def choose(choices: list[Choice]) -> Choice:
        distinct: list[Choice] = []
        for choice in choices:
            if choice not in distinct:
                distinct.append(choice)
        if nearest is None or len(distinct) == 1:
            return distinct[0]
        return distinct[nearest([subnet_of(choice) for choice in distinct])]

    choice = tokens.best_choice(
        config=model.config,
        sizes=architecture.sizes,
        target=target,
        total=1.0,
        cost=config.terms_of,
        solve=solve,
        choose=choose,
    )
    return subnet_of(choice)


def _candidates(space: SubmoduleSpace, curve: ErrorCurve) -> list[Candidate]:
    """Return the candidates of a submodule; what they are worth is what they do not lose."""
    return [Candidate(size, -curve.errors[size]) for size in space.sizes]


def _kept_units(size: tuple[int, ...], curve: ErrorCurve) -> Kept:
    """Return the units of a size, ascending; by head for a grid."""
    if len(size) == 1:
        return curve.remaining(size[0])
    heads, channels = size
    if not heads:
        return {}
    return {head: tuple(range(channels)) for head in curve.remaining(heads, channels)}
