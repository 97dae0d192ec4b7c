"""Several residual widths, as Swin has them: more combinations than can be tried, so a relaxation
says where to look.

Problems here are caterpillars, the shape of Swin's costs: a chain of widths, each with an attention
and an MLP that cost in proportion to it, heads that cost something of their own, and merging that
ties each width to the next.
"""

import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
from factories import CANDIDATES_OF, random_candidate, randomize_masks_, search_config, tiny_swin
from hypothesis import given
from hypothesis import strategies as st
from transformers import SwinConfig

from ofb_hf import (
    SwinBiMaskConfig,
    compress,
    count_macs,
    count_params,
    install_bi_masks,
    read_subnet,
)
from ofb_hf.choice import knapsack
from ofb_hf.choice.knapsack import best_choice
from ofb_hf.choice.problem import Candidate, Choice, Problem
from ofb_hf.choice.relaxation import Relaxation
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.counting import evaluate_terms
from ofb_hf.families.description import Term, heads_of, presence_of, quantities
from ofb_hf.families.registry import describe
from ofb_hf.search.shrinking import shrink_
from ofb_hf.search.supernet import Supernet

TIGHTNESS = 0.98

Space = tuple[dict[str, list[Candidate]], tuple[Term, ...], dict[str, int]]


@pytest.fixture
def _relaxed(monkeypatch):
    """Every choice of widths starts from the relaxation, however few combinations there are."""
    monkeypatch.setattr(knapsack, "MAX_COMBINATIONS", 0)


def everything(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Exact cost and score of every choice there is, in the order of `itertools.product`."""
    candidates, terms, fixed = space
    costs = np.zeros([len(row) for row in candidates.values()], dtype=np.int64)
    scores, amounts = costs.astype(float), dict(fixed)
    for axis, (name, row) in enumerate(candidates.items()):
        shape = [-1 if other == axis else 1 for other in range(len(candidates))]
        scores = scores + np.array([candidate.score for candidate in row]).reshape(shape)
        values = [quantities({name: candidate.size}) for candidate in row]
        amounts |= {q: np.array([value[q] for value in values]).reshape(shape) for q in values[0]}
    for term in terms:
        costs = costs + term.coefficient * math.prod(amounts[factor] for factor in term.factors)
    return costs.ravel(), scores.ravel()


def worth(sizes: list[tuple[int, ...]], rng: random.Random) -> list[Candidate]:
    """Candidates as a search scores them: the more the better, less and less so, and somewhat at
    random."""
    weight, power = rng.uniform(0, 10), rng.uniform(0.3, 1)
    full = max(map(math.prod, sizes))
    return [
        Candidate(size, weight * (math.prod(size) / full) ** power + rng.uniform(-2, 0))
        for size in sizes
    ]


def caterpillar(seed: int, stages: int, most: int) -> Space:
    """A random problem with `most` candidates of each width at most, and about the same number of
    all others."""
    rng = random.Random(seed)

    def sizes(largest: int) -> list[int]:
        return sorted(rng.sample(range(1, largest + 1), rng.randint(2, most)))

    candidates, terms = {}, [Term(rng.randint(0, 500))]
    for stage in range(stages):
        width, attention, mlp = f"{stage}.width", f"{stage}.attention", f"{stage}.mlp"
        heads, dims = (
            sorted(rng.sample(range(1, 7), 2)),
            sorted(rng.sample(range(1, 9), rng.randint(1, 2))),
        )
        candidates[width] = worth([(size,) for size in sizes(40)], rng)
        candidates[attention] = worth([(h, d) for h in heads for d in dims], rng)
        candidates[mlp] = worth([(size,) for size in sizes(60)], rng)
        pairs = [(width,), (width, "fixed"), (width, attention), (attention,), (width, mlp), (mlp,)]
        terms += [Term(rng.randint(1, 40), pair) for pair in pairs]
        terms.append(Term(rng.randint(1, 200), (heads_of(attention),)))
        if stage:
            terms.append(Term(rng.randint(1, 40), (f"{stage - 1}.width", width)))
    return candidates, tuple(terms), {"fixed": rng.randint(1, 5)}


def settled_problems(
    shape: tuple[int, int], seeds: range
) -> Iterator[tuple[Choice, np.ndarray, np.ndarray, int]]:
    """Random problems with random targets, settled: (choice, costs and scores of all choices,
    target)."""
    for seed in seeds:
        space = caterpillar(seed, *shape)
        costs, scores = everything(space)
        fraction = random.Random(-seed).random() ** 1.5
        target = int(costs.min() + fraction * (costs.max() - costs.min()))
        yield best_choice(*space, target, tightness=TIGHTNESS), costs, scores, target


# ----------------------------------------------------------------------------------- the relaxation


@st.composite
def trees(draw: st.DrawFn) -> Space:
    """Up to six submodules tied together in a tree or in several, some of them grids whose heads
    cost something."""
    number, score, coefficient = st.integers(1, 9), st.floats(-50, 50), st.integers(1, 30)
    candidates: dict[str, list[Candidate]] = {}
    terms = [Term(draw(coefficient)), Term(draw(coefficient), ("fixed",))]
    for index in range(draw(st.integers(1, 6))):
        name = f"{draw(st.sampled_from('abc'))}{index}"
        size = st.tuples(number, number) if draw(st.booleans()) else st.tuples(number)
        sizes = draw(st.lists(size, min_size=1, max_size=3, unique=True))
        quantity = draw(st.sampled_from(list(quantities({name: sizes[0]}))))
        if candidates and draw(st.booleans()):
            parent = draw(st.sampled_from(sorted(candidates)))
            other = draw(st.sampled_from(list(quantities({parent: candidates[parent][0].size}))))
            for pair in draw(st.lists(st.permutations([quantity, other]), min_size=1, max_size=2)):
                terms.append(Term(draw(coefficient), tuple(pair)))
        candidates[name] = [Candidate(size, draw(score)) for size in sizes]
        terms += [
            Term(draw(coefficient), (quantity,)),
            Term(draw(coefficient), (quantity, "fixed")),
        ]
    return candidates, tuple(terms), {"fixed": draw(number)}


@given(trees(), st.floats(0, 10) | st.floats(0, 0.01))
def test_the_relaxation_is_exact_at_every_price(space, price):
    """No choice is worth more than score - price x cost of the one that it finds, and its cost is
    what it says."""
    candidates, terms, fixed = space
    choice, cost = Relaxation(Problem(*space, 0, 10**9)).solve(price)
    chosen = {name: candidate.size for name, candidate in choice.items()}
    assert cost == evaluate_terms(terms, fixed | quantities(chosen))
    assert all(choice[name] in row for name, row in candidates.items())
    costs, scores = everything(space)
    value = sum(candidate.score for candidate in choice.values()) - price * cost
    best = (scores - price * costs).max()
    assert value == pytest.approx(best, rel=1e-9, abs=1e-6)


def test_costs_that_tie_submodules_in_a_circle_are_refused():
    candidates = {name: [Candidate((1,), 0.0), Candidate((2,), 1.0)] for name in "abc"}
    terms = tuple(Term(1, pair) for pair in (("a", "b"), ("b", "c"), ("c", "a")))
    with pytest.raises(ValueError, match=r"\['a', 'b', 'c'\] together in a circle"):
        Relaxation(Problem(candidates, terms, {}, 0, 100)).solve(1.0)


# ----------------------------------------------------------------------- settling what it points to


@pytest.mark.usefixtures("_relaxed")
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 2)], ids=str)
def test_the_budget_holds_and_is_used_wherever_anything_uses_it(shape):
    """And where no choice lies in the band, the most expensive one below it is found."""
    for answer, costs, scores, target in settled_problems(shape, range(80)):
        below = costs[costs <= target]
        lowest = math.ceil(TIGHTNESS * target)
        assert answer.cost <= target
        assert answer.cost >= lowest if (below >= lowest).any() else answer.cost == below.max()
        found = (costs == answer.cost) & np.isclose(scores, answer.score)
        assert found.any()


@pytest.mark.slow
@pytest.mark.usefixtures("_relaxed")
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (3, 5)], ids=str)
def test_the_choice_is_seldom_far_from_the_best_one(shape):
    """Measured on 1,100 problems as coarse as these: 79 to 89 of 100 are solved exactly, on average
    1 to 2 % of the range of scores within the band are given away, in 1 of 100 problems 17 to 28 %,
    at worst 51 %."""
    lost = []
    for answer, costs, scores, target in settled_problems(shape, range(100, 180)):
        inside = scores[(costs <= target) & (costs >= TIGHTNESS * target)]
        if len(inside):
            lost.append((inside.max() - answer.score) / max(np.ptp(inside), 1e-9))
    assert len(lost) > 70
    assert min(lost) >= -1e-9
    assert np.mean(np.array(lost) < 1e-9) >= 0.75
    assert np.mean(lost) <= 0.035
    assert max(lost) <= 0.55


def test_the_choice_is_nearly_the_best_one_in_a_network_of_full_size():
    """Swin-T with its default candidates, 90,250 combinations of widths: no choice within the
    budget can be worth more than score - price x (cost - budget) of the relaxation at any price,
    and that is less than 0.2 % above the answer."""
    architecture, rng = describe(SwinConfig()), random.Random(0)
    dense = quantities(architecture.sizes)
    total = evaluate_terms(architecture.macs, dense)
    candidates = {}
    for space in SwinBiMaskConfig().search_space(SwinConfig()):
        touched = tuple(term for term in architecture.macs if space.name in term.factors)
        weight, power = 400 * evaluate_terms(touched, dense) / total, rng.uniform(0.3, 1)
        heads, dims = space.head_candidates or (1,), space.dim_candidates or space.candidate_sizes
        sizes = [(h, d) if space.is_grid else (d,) for h in heads for d in dims]
        candidates[space.name] = [
            Candidate(
                size, weight * (math.prod(size) / space.num_units) ** power + rng.uniform(-3, 0)
            )
            for size in sizes
        ]
    for fraction in (0.3, 0.5, 0.8):
        target = int(fraction * total)
        answer = best_choice(candidates, architecture.macs, {}, target)
        relaxation = Relaxation(Problem(candidates, architecture.macs, {}, 0, target))
        bounds, below, above = [], 0.0, 1e4 / total
        for _ in range(40):
            price = (below + above) / 2
            choice, cost = relaxation.solve(price)
            bounds.append(
                sum(candidate.score for candidate in choice.values()) - price * (cost - target)
            )
            below, above = (price, above) if cost > target else (below, price)
        assert TIGHTNESS * target <= answer.cost <= target
        assert 0.998 * min(bounds) <= answer.score <= min(bounds) + 1e-6


@pytest.mark.parametrize("relaxed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_an_unreachable_budget_is_refused_with_exactly_the_smallest_cost(
    seed, relaxed, monkeypatch
):
    monkeypatch.setattr(knapsack, "MAX_COMBINATIONS", 0 if relaxed else 10**9)
    space = caterpillar(seed, 4, 3)
    smallest = everything(space)[0].min()
    with pytest.raises(
        UnreachableBudgetError, match=rf"of {smallest - 1:,} is below .* costs {smallest:,};"
    ):
        best_choice(*space, int(smallest) - 1)
    assert best_choice(*space, int(smallest)).cost == smallest


def test_many_widths_are_searched_one_at_a_time():
    """More combinations of widths than can be tried, after all: the budget still holds and is
    used."""
    rng = random.Random(0)
    candidates, terms = {}, []
    for stage in range(4):
        candidates[f"width{stage}"] = [Candidate((8 * k,), rng.random() * k) for k in range(1, 10)]
        for block in range(2):
            name = f"stage{stage}.block{block}"
            candidates[name] = [Candidate((16 * k,), rng.random() * k) for k in range(1, 9)]
            terms.append(Term(7 + stage, (f"width{stage}", name)))
        if stage:
            terms.append(Term(3, (f"width{stage - 1}", f"width{stage}")))
    assert knapsack.MAX_COMBINATIONS_BELOW < 9**4
    smallest, largest = (
        evaluate_terms(tuple(terms), {name: rows[end].units for name, rows in candidates.items()})
        for end in (0, -1)
    )
    for fraction in (0.0, 0.05, 0.3, 0.8, 1.0):
        target = int(smallest + fraction * (largest - smallest))
        answer = best_choice(candidates, tuple(terms), {}, target)
        assert TIGHTNESS * target <= answer.cost <= target


# ------------------------------------------------------------------------- the budget of a supernet


def random_search(seed: int) -> tuple[Supernet, SwinConfig]:
    """A random Swin of 1 to 4 stages with random candidates and masks, and a random reachable
    budget."""
    rng = random.Random(seed)
    stages, heads, head_dim = rng.choice([1, 2, 3, 3, 4, 4]), rng.randint(1, 2), rng.randint(2, 7)
    ratio = rng.choice([1, 1.7, 3])
    widths = [heads * head_dim * 2**stage for stage in range(stages)]

    def sizes(full: list[int]) -> list[int]:
        return sorted({*full, *(rng.randint(1, max(full)) for _ in range(rng.randint(1, 5)))})

    model = tiny_swin(
        seed,
        embed_dim=widths[0],
        depths=[rng.randint(1, 2) for _ in widths],
        num_heads=[heads * 2**stage for stage in range(stages)],
        window_size=2,
        mlp_ratio=ratio,
        patch_size=1,
        num_labels=rng.randint(2, 9),
        qkv_bias=rng.random() < 0.7,
        use_absolute_embeddings=rng.random() < 0.5,
    )
    candidates = {
        "embedding_candidates": sizes(widths),
        "head_candidates": sizes([heads * 2**stage for stage in range(stages)]),
        "head_dim_candidates": sizes([head_dim]),
        "mlp_candidates": sizes([int(ratio * width) for width in widths]),
        "search_attention": rng.random() < 0.8,
        "search_mlp": rng.random() < 0.8,
    }
    for searched, names in CANDIDATES_OF.items():
        if not candidates.get(searched, True):
            candidates |= dict.fromkeys(names)
    budget = rng.choice(["target_macs", "target_params"])
    supernet = install_bi_masks(model, search_config("swin", **candidates, **{budget: 1.0}))
    sizes_of_all = supernet.dense_sizes | {
        name: min(row, key=lambda candidate: candidate.units).size
        for name, row in supernet.decisions.candidates().items()
    }
    smallest = evaluate_terms(supernet.decisions.terms, quantities(sizes_of_all))
    target = rng.randint(smallest, smallest + int(0.8 * (supernet.dense_cost - smallest)))
    supernet = install_bi_masks(model, search_config("swin", **candidates, **{budget: target}))
    randomize_masks_(supernet, seed, spread=rng.choice([0.1, 2.0, 8.0]))
    return supernet, model.config


def largest_reachable_cost(supernet: Supernet) -> int:
    """The largest cost within the budget that some subnet has, exactly.

    With the widths given, all other submodules contribute independent sums; bit c of a set means
    that sum c occurs.
    """
    sizes = {
        name: [candidate.size for candidate in row]
        for name, row in supernet.decisions.candidates().items()
    }
    for name, shape in supernet.dense_sizes.items():
        sizes.setdefault(name, [shape])
    widths = [name for name in sizes if name.endswith(".width")]
    best = 0
    for values in np.ndindex(*(len(sizes[name]) for name in widths)):
        known = quantities(
            {name: sizes[name][index] for name, index in zip(widths, values, strict=True)}
        )
        reachable = 1
        for name in set(sizes) - set(widths):
            own = {name, heads_of(name), presence_of(name)}
            terms = tuple(term for term in supernet.decisions.terms if own & set(term.factors))
            costs = {
                evaluate_terms(terms, known | quantities({name: size})) for size in sizes[name]
            }
            reachable = sum_of_sets(reachable, costs) & (1 << (supernet.target + 1)) - 1
        base = evaluate_terms(
            tuple(term for term in supernet.decisions.terms if set(term.factors) <= set(known)),
            known,
        )
        reachable = reachable << base & (1 << (supernet.target + 1)) - 1
        best = max(best, reachable.bit_length() - 1)
    return best


def sum_of_sets(reachable: int, costs: set[int]) -> int:
    """All sums of an element of a set of bits and a number."""
    total = 0
    for cost in costs:
        total |= reachable << cost
    return total


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_the_budget_of_a_swin_holds_and_is_used(seed, monkeypatch):
    """Within [0.98, 1] of the target; where not, no subnet of the space lies between the chosen one
    and the target."""
    if seed >= 20:
        monkeypatch.setattr(knapsack, "MAX_COMBINATIONS", 0)
    supernet, dense = random_search(seed)
    count = count_params if supernet.bi_mask_config.budget[0] == "target_params" else count_macs
    rng = random.Random(seed)
    for _ in range(seed % 3):
        supernet.decisions.retire_candidates()
        for mask in supernet.bi_masks:  # so that other candidates are the weak ones next time
            mask.alpha.data[mask.index_of(random_candidate(mask, rng))] += 3
    if seed % 2:
        shrink_(supernet)
    cost = count(compress(supernet))
    assert cost == count(dense, read_subnet(supernet))
    assert cost <= supernet.target
    if cost < TIGHTNESS * supernet.target:
        assert cost == largest_reachable_cost(supernet)
