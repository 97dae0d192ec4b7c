"""The budget holds, it is used, and nothing better fits: checked against brute force and exact
reachable costs."""

import itertools
import math
import random

import pytest
import torch
from factories import (
    FAMILIES,
    random_candidate,
    randomize_masks_,
    search_config,
    tiny_images,
    tiny_model,
    tiny_supernet,
    tiny_vit,
)
from hypothesis import given
from hypothesis import strategies as st

from ofb_hf import compress, count_macs, count_params, install_bi_masks, read_subnet
from ofb_hf.choice.knapsack import best_choice
from ofb_hf.choice.picks import BINS, largest_picks
from ofb_hf.choice.problem import Candidate
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.families.description import Term
from ofb_hf.search.shrinking import shrink_
from ofb_hf.search.supernet import Supernet

TIGHTNESS = 0.98


# Seeds below draw searches on a budget of MACs, those from here on of parameters.
MACS_SEEDS = 30


def cost_of(terms: tuple[Term, ...], units: dict[str, int]) -> int:
    """A sum of products of sizes, spelled out."""
    total = 0
    for term in terms:
        product = term.coefficient
        for name in term.factors:
            product *= units[name]
        total += product
    return total


def brute_force(
    candidates: dict[str, list[Candidate]],
    terms: tuple[Term, ...],
    fixed: dict[str, int],
    needed=(),
):
    """Every choice that keeps units of something needed, with its cost and score."""
    for picks in itertools.product(*candidates.values()):
        choice = dict(zip(candidates, picks, strict=True))
        if needed and not any(choice[name].units for name in needed):
            continue
        units = fixed | {name: candidate.units for name, candidate in choice.items()}
        yield cost_of(terms, units), sum(candidate.score for candidate in picks)


def reachable_costs(supernet: Supernet, config) -> set[int]:
    """Every cost that some subnet of a ViT's search space has, from first principles.

    With the residual width given, attentions and MLPs contribute independent sums, so the set of
    all totals is built one submodule at a time.
    """
    tokens = (config.image_size // config.patch_size) ** 2 + 1
    pixels = config.num_channels * config.patch_size**2
    units = {
        mask.name: sorted({o.units for o in supernet.decisions.candidates()[mask.name]})
        for mask in supernet.bi_masks
    }
    for name, shape in supernet.dense_sizes.items():
        units.setdefault(name, [math.prod(shape)])
    by_params = supernet.bi_mask_config.budget[0] == "target_params"
    layers, labels, biases = range(config.num_hidden_layers), config.num_labels, 3 * config.qkv_bias
    totals = set()
    for e in units["embeddings"]:
        if by_params:
            base = e * (pixels + 1) + e + tokens * e + 2 * e + labels * (e + 1)
            per_half, per_attention_unit, per_mlp_unit = 3 * e, 4 * e + biases, 2 * e + 1
        else:
            base = (tokens - 1) * pixels * e + labels * e
            per_half, per_attention_unit, per_mlp_unit = (
                0,
                4 * tokens * e + 2 * tokens**2,
                2 * tokens * e,
            )
        sums = {(base, False)}  # and whether there is an attention yet: a network needs one
        for layer in layers:
            attentions, mlps = units[f"layers.{layer}.attention"], units[f"layers.{layer}.mlp"]
            sums = {
                (s + per_half * (a > 0) + per_attention_unit * a, seen or a > 0)
                for s, seen in sums
                for a in attentions
            }
            sums = {
                (s + per_half * (f > 0) + per_mlp_unit * f, seen) for s, seen in sums for f in mlps
            }
        totals |= {total for total, seen in sums if seen}
    return totals


# ------------------------------------------------------------------------ the choice on its own


@st.composite
def problems(draw: st.DrawFn, largest: int = 12) -> tuple:
    """One shared width, up to four parts whose cost is a product with it or not, and scores; all
    small integers. Last, the parts of which one has to stay."""
    parts = [f"part{index}" for index in range(draw(st.integers(0, 4)))]
    score = st.floats(-5, 5, allow_nan=False)
    candidates = {
        name: [
            Candidate((units,), draw(score))
            for units in sorted(draw(st.sets(st.integers(low, 6), min_size=1)))
        ]
        for name, low in [("width", 1), *((part, 0) for part in parts)]
    }
    needed = [name for name in parts if draw(st.booleans())]
    needed = (
        needed if any(candidate.units for name in needed for candidate in candidates[name]) else []
    )
    coefficient = st.integers(1, largest)
    terms = [
        Term(draw(coefficient)),
        Term(draw(coefficient), ("width",)),
        Term(draw(coefficient), ("width", "fixed")),
    ]
    for name in parts:
        terms.append(Term(draw(coefficient), ("width", name)))
        terms.append(Term(draw(coefficient), (name,)))
    return (
        candidates,
        tuple(terms),
        {"fixed": draw(st.integers(1, 5))},
        draw(st.floats(0, 1.1)),
        needed,
    )


def target_of(problem: tuple, fraction: float) -> int:
    """A budget between the smallest and the largest cost of a problem (or a bit above)."""
    costs = [cost for cost, _ in brute_force(*problem)]
    return int(min(costs) + fraction * (max(costs) - min(costs)))


@given(problems())
def test_small_problems_are_solved_exactly(problem):
    """Nothing is rounded where there are fewer cost units than bins: the best choice of all, or the
    largest below."""
    candidates, terms, fixed, fraction, needed = problem
    target = target_of((candidates, terms, fixed, needed), fraction)
    everything = [
        (cost, score)
        for cost, score in brute_force(candidates, terms, fixed, needed)
        if cost <= target
    ]
    inside = [score for cost, score in everything if cost >= math.ceil(TIGHTNESS * target)]
    choice = best_choice(candidates, terms, fixed, target, tightness=TIGHTNESS, needed=needed)
    assert not needed or any(choice.candidates[name].units for name in needed)
    units = fixed | {name: candidate.units for name, candidate in choice.candidates.items()}
    assert target < BINS or target - min(cost for cost, _ in everything) < BINS
    assert list(choice.candidates) == list(candidates)
    assert choice.cost == cost_of(terms, units) <= target
    assert choice.score == pytest.approx(
        sum(candidate.score for candidate in choice.candidates.values())
    )
    if inside:
        assert choice.cost >= TIGHTNESS * target
        assert choice.score == pytest.approx(max(inside))
    else:
        assert choice.cost == max(cost for cost, _ in everything)


@given(problems(largest=10**6))
def test_large_problems_are_solved_up_to_the_rounding_of_costs(problem):
    """Costs are rounded to 1 / BINS of the room, so the answer beats all that keep a bin per
    submodule away from both ends of the band, whatever it is allowed to do in between; feasibility
    is never given up for it."""
    candidates, terms, fixed, fraction, needed = problem
    target = target_of((candidates, terms, fixed, needed), fraction)
    everything = [
        (cost, score)
        for cost, score in brute_force(candidates, terms, fixed, needed)
        if cost <= target
    ]
    inside = [(cost, score) for cost, score in everything if cost >= math.ceil(TIGHTNESS * target)]
    choice = best_choice(candidates, terms, fixed, target, tightness=TIGHTNESS, needed=needed)
    assert choice.cost <= target
    if not inside:
        assert choice.cost == max(cost for cost, _ in everything)
        return
    assert choice.cost >= TIGHTNESS * target
    slack = len(candidates) * (target / BINS + 1)
    clear = [
        score for cost, score in inside if TIGHTNESS * target + slack <= cost <= target - slack
    ]
    assert choice.score <= max(score for _, score in inside) + 1e-9
    assert not clear or choice.score >= max(clear) - 1e-9


def test_a_budget_below_the_smallest_subnet_is_refused_with_the_smallest_value():
    candidates = {
        "width": [Candidate((3,), 0.0), Candidate((5,), 9.0)],
        "mlp": [Candidate((2,), 0.0), Candidate((7,), 0.0)],
    }
    terms = (Term(1000), Term(10, ("width", "mlp")))
    with pytest.raises(UnreachableBudgetError, match=r"1,059.*1,060"):
        best_choice(candidates, terms, {}, 1059)
    choice = best_choice(candidates, terms, {}, 1060)
    assert choice.cost == 1060
    assert {name: candidate.size for name, candidate in choice.candidates.items()} == {
        "width": (3,),
        "mlp": (2,),
    }


@pytest.mark.parametrize(
    "target", [1200, 1210, 5000], ids=["in the band", "below the band", "all below the band"]
)
def test_among_equal_costs_the_better_score_wins(target):
    """2 heads of 6 cost what 4 heads of 3 cost. Not reaching the band is no reason to forget which
    is better."""
    grid = [
        Candidate((2, 6), 1.0),
        Candidate((4, 3), 5.0),
        Candidate((3, 4), 3.0),
        Candidate((1, 1), 9.0),
    ]
    grid += [Candidate((5, 6), 9.0)] if target == 1210 else []
    band = 0.98 if target != 1210 else 0.999
    assert best_choice({"a": grid}, (Term(100, ("a",)),), {}, target, tightness=band).candidates[
        "a"
    ].size == (4, 3)


@pytest.mark.parametrize("favourite", ["a", "b", "c"])
def test_in_a_coarse_space_the_score_says_who_gets_what_is_left(favourite):
    """Three equal submodules, no choice within the band, room for one wide one: the one that needs
    it most gets it."""
    candidates = {
        name: [Candidate((10,), 0.0), Candidate((20,), 3.0 if name == favourite else 1.0)]
        for name in "abc"
    }
    terms = tuple(Term(7, (name,)) for name in "abc")
    choice = best_choice(candidates, terms, {}, 7 * 45)
    assert choice.cost == 7 * 40
    assert choice.candidates[favourite].size == (20,)


def best_of_the_largest(costs, scores, room):
    """What `largest_picks` promises, spelled out: (score, picks) of the largest sum that fits."""
    found = []
    for picks in itertools.product(*map(range, map(len, costs))):
        cost, score = 0, 0.0
        for group, pick in enumerate(picks):
            cost += costs[group][pick]
            score += scores[group][pick]
        if cost <= room:
            found.append((cost, score, picks))
    return list(max(found)[2])


@given(st.integers(0, 2**32 - 1))
def test_the_largest_sum_is_picked_with_the_best_score_and_the_last_of_equal_picks(seed):
    """Bit for bit: scores add up from the first group on, and few values make many of them tie."""
    generator = random.Random(seed)
    values = generator.choice([[0.1, 0.2, 0.3], [1.0], [generator.random() for _ in range(9)]])
    costs, scores = [], []
    for _ in range(generator.randint(1, 6)):
        count = generator.randint(1, 4)
        costs.append([generator.randint(0, 9) for _ in range(count)])
        scores.append([generator.choice(values) for _ in range(count)])
    room = generator.randint(sum(map(min, costs)), sum(map(max, costs)) + 1)
    assert largest_picks(costs, scores, room) == best_of_the_largest(costs, scores, room)


def test_two_thousand_submodules_are_no_recursion():
    count = 2000
    picks = largest_picks([[2, 3]] * count, [[0.0, 1.0]] * count, room=2 * count + 7)
    # all picks of this sum have the same score: these are the last in the order of lists
    assert picks == [1] * 7 + [0] * (count - 7)


# ------------------------------------------------------------------------- the budget of a supernet


def random_search(seed: int) -> tuple[Supernet, object]:
    """A random model with random candidates, a random reachable target, and random masks."""
    rng = random.Random(seed)
    heads, head_dim, mlp = rng.randint(1, 5), rng.randint(2, 9), rng.randint(8, 90)

    def sizes(full: int) -> list[int]:
        return sorted({full, *(rng.randint(1, full) for _ in range(rng.randint(1, 5)))})

    model = tiny_vit(
        seed,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=mlp,
        num_hidden_layers=rng.randint(1, 3),
        num_labels=rng.randint(2, 9),
        qkv_bias=rng.random() < 0.7,
    )
    candidates = {
        "embedding_candidates": sizes(heads * head_dim),
        "head_candidates": sizes(heads),
        "head_dim_candidates": sizes(head_dim),
        "mlp_candidates": sizes(mlp),
        "search_depth": [False, True, "attention", "mlp"][seed % 4],
    }
    budget, count = [("target_macs", count_macs), ("target_params", count_params)][
        seed >= MACS_SEEDS
    ]
    dense = count(model)
    reachable = reachable_costs(
        install_bi_masks(model, search_config(**candidates, **{budget: 1.0})), model.config
    )
    target = rng.randint(min(reachable), dense)
    config = search_config(
        **candidates, **{budget: target / dense if rng.random() < 0.5 else target}
    )
    supernet = install_bi_masks(model, config)
    randomize_masks_(supernet, seed, spread=rng.choice([0.1, 2.0, 8.0]))
    return supernet, model.config


@pytest.mark.parametrize("seed", range(MACS_SEEDS + 10))
def test_the_budget_holds_and_is_used(seed):
    """Within [0.98, 1] of the target; where not, no subnet of the space lies between the chosen one
    and the target."""
    supernet, config = random_search(seed)
    by_params = supernet.bi_mask_config.budget[0] == "target_params"
    count = count_params if by_params else count_macs
    if seed % 3 == 0 and supernet.decisions.retire_candidates():
        shrink_(supernet)
    cost = count(compress(supernet))
    subnet = read_subnet(supernet)
    assert cost == count(config, subnet)
    assert cost <= supernet.target
    if cost < TIGHTNESS * supernet.target:
        reachable = reachable_costs(supernet, config)
        assert cost in reachable
        assert cost == max(total for total in reachable if total <= supernet.target)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_one_up_to_the_rounding_of_costs(seed):
    supernet, _ = random_search(seed)
    fixed = {
        name: math.prod(s)
        for name, s in supernet.dense_sizes.items()
        if name not in supernet.named_masks
    }
    candidates = {
        name: rows[:: max(1, len(rows) // 3)]
        for name, rows in supernet.decisions.candidates().items()
    }
    floor = min(cost for cost, _ in brute_force(candidates, supernet.decisions.terms, fixed))
    target = max(supernet.target, floor)
    choice = best_choice(candidates, supernet.decisions.terms, fixed, target, tightness=TIGHTNESS)
    everything = [
        (cost, score)
        for cost, score in brute_force(candidates, supernet.decisions.terms, fixed)
        if cost <= target
    ]
    inside = [(cost, score) for cost, score in everything if cost >= math.ceil(TIGHTNESS * target)]
    if not inside:
        assert choice.cost == max(cost for cost, _ in everything)
        return
    slack = len(candidates) * (target / BINS + 1)
    clear = [
        score for cost, score in inside if TIGHTNESS * target + slack <= cost <= target - slack
    ]
    assert choice.score <= max(score for _, score in inside) + 1e-6
    assert not clear or choice.score >= max(clear) - 1e-6


@pytest.mark.parametrize("depth", [False, True, "attention"])
@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
def test_an_unreachable_budget_is_refused_before_training_and_names_the_smallest(budget, depth):
    """With depth, the smallest network has one attention left."""
    model = tiny_vit()
    count = count_macs if budget == "target_macs" else count_params

    def supernet(target: float) -> Supernet:
        return install_bi_masks(model, search_config(search_depth=depth, **{budget: target}))

    smallest = min(reachable_costs(supernet(1.0), model.config))
    with pytest.raises(UnreachableBudgetError, match=rf"{smallest:,}"):
        supernet(smallest - 1)
    with pytest.raises(ValueError, match=rf"{smallest:,}"):
        supernet(0.001)
    small = compress(supernet(smallest))
    assert count(small) == smallest
    assert sum(heads > 0 for heads in small.config.num_attention_heads_per_layer) == (
        1 if depth else 2
    )
    assert (sum(small.config.intermediate_size_per_layer) == 0) == (depth is True)


@pytest.mark.parametrize("budget", ["target_macs", "target_params"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fractions_and_absolute_targets_mean_the_same(family, budget):
    model = tiny_model(family)
    dense = (count_macs if budget == "target_macs" else count_params)(model)
    by_fraction = install_bi_masks(model, search_config(family, **{budget: 0.4}))
    absolute = install_bi_masks(model, search_config(family, **{budget: int(0.4 * dense)}))
    assert by_fraction.target == absolute.target == int(0.4 * dense)
    assert by_fraction.dense_cost == dense
    for supernet in (by_fraction, absolute):
        randomize_masks_(supernet, 3)
    assert read_subnet(by_fraction) == read_subnet(absolute)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_everything_keeps_a_network_of_nearly_that_size(family):
    supernet = tiny_supernet(family=family, target_macs=1.0)
    assert TIGHTNESS * supernet.dense_macs <= count_macs(compress(supernet)) <= supernet.dense_macs


def test_a_budget_beyond_the_model_itself_is_refused():
    with pytest.raises(
        ValueError, match=r"target_macs is 1,000,000,000,000, more than the [\d,]+ of the model"
    ):
        tiny_supernet(target_macs=10**12)


def test_importance_and_alpha_lead_the_choice():
    """At one price, the submodule whose units matter keeps more of them; alpha decides where
    importance is equal."""
    for led_by in ("importance", "alpha"):
        sizes = []
        for favourite in (0, 1):
            supernet = install_bi_masks(
                tiny_vit(), search_config(search_embedding=False, target_macs=0.75)
            )
            with torch.no_grad():
                for layer in (0, 1):
                    mask = supernet.named_masks[f"layers.{layer}.mlp"]
                    if led_by == "importance":
                        mask.importance_logits[30:] = 4.0 if layer == favourite else -6.0
                    else:
                        mask.alpha[-1 if layer == favourite else 0] = 30.0
            subnet = read_subnet(supernet)
            sizes.append((subnet.size("layers.0.mlp"), subnet.size("layers.1.mlp")))
        assert sizes[0][0] > sizes[0][1], led_by
        assert sizes[1][1] > sizes[1][0], led_by


@pytest.mark.parametrize("family", FAMILIES)
def test_a_settled_supernet_is_settled_for_good(family):
    supernet, images = tiny_supernet(family=family, target_macs=0.5), tiny_images()
    subnet = supernet.decisions.settle_()
    logits = supernet(images).logits.detach()
    assert supernet.decisions.is_settled
    assert supernet.decisions.retire_candidates() == 0
    assert supernet.decisions.settle_() == subnet == read_subnet(supernet)
    assert torch.equal(supernet(images).logits, logits)
    rng = random.Random(0)
    assert [random_candidate(mask, rng) for mask in supernet.bi_masks] == [
        m.largest_size() for m in supernet.bi_masks
    ]
