"""Token schedules for milliseconds: the same cost path as for MACs, with other coefficients."""

import copy
import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import (
    decided,
    invented_table,
    non_uniform_vit,
    randomize_masks_,
    search_config,
    tiny_images,
    tiny_vit,
    vit_config,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import arguments, rows

from ofb_hf import (
    OFBViTConfig,
    OFBViTForImageClassification,
    SubnetSpec,
    compress,
    install_bi_masks,
    read_subnet,
)
from ofb_hf.choice.schedule_candidates import _layer_costs, candidate_schedules, reducing_layers
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.counting import count_macs, evaluate_terms
from ofb_hf.cost.latency import PICOSECONDS, count_latency
from ofb_hf.families.description import macs_of, quantities
from ofb_hf.families.registry import describe, family_of
from ofb_hf.families.token_reduction import layer_parts, scheduled
from ofb_hf.token_search.learned_counts import TokenSearchConfig, expected_cost, learned_reductions
from ofb_hf.token_search.trainer import TokenTrainer
from ofb_hf.tokens.schedules import (
    fixed_rate_schedule,
    full_schedule,
    rounded_schedule,
    schedule_cost,
)
from ofb_hf.workflow.latency_table import _fitted, _points, _reduce_tokens_, sample_sizes


def falling(draw, layers, tokens):
    """A random schedule whose counts do not rise."""
    counts = sorted(
        draw(st.lists(st.integers(2, tokens), min_size=2 * layers, max_size=2 * layers)),
        reverse=True,
    )
    return [[tokens, tokens], *map(list, zip(counts[2::2], counts[3::2], strict=True))]


def searched(share, model=None, **changes):
    """A search for a share of the milliseconds that an invented table predicts, and that table."""
    model = model or tiny_vit(num_hidden_layers=4)
    table = invented_table(model, changes.pop("seed", 0))
    milliseconds = share * count_latency(model, table) / PICOSECONDS
    return TokenSearchConfig(
        target_latency_ms=milliseconds, latency_table=table.to_dict(), **changes
    ), table


# --------------------------------------------------------------------------------- one way to count


@given(st.data(), st.integers(0, 100))
def test_layers_sum_to_the_whole(data, seed):
    """By whole numbers, by arrays, by tensors, and as the model that obeys the schedule: one cost,
    MACs or time."""
    model = tiny_vit(num_hidden_layers=4)
    config, table, schedule = model.config, invented_table(model, seed), falling(data.draw, 4, 17)
    amounts, entering = quantities(describe(config).sizes), [17, *(left for _, left in schedule)]
    cut = OFBViTForImageClassification.from_dense(model, token_schedule=schedule)
    tensors = [
        [torch.tensor(float(count), dtype=torch.float64) for count in pair] for pair in schedule
    ]
    for cost, whole in ((macs_of, count_macs(cut)), (table.terms_of, count_latency(cut, table))):
        ends = cost(part for part in describe(config).parts if part.name in ("stem", "head"))
        merges = [left < kept for kept, left in schedule]
        layers = [
            evaluate_terms(
                cost(layer_parts(config, layer, before, *pair, any(merges[:layer]))), amounts
            )
            for layer, (before, pair) in enumerate(zip(entering, schedule, strict=False))
        ]
        assert evaluate_terms(ends, amounts) + sum(layers) == whole
        assert schedule_cost(config, schedule, cost) == whole
        assert schedule_cost(config, tensors, cost).item() == pytest.approx(whole, rel=1e-5)
        every = np.arange(2, 18)
        for layer, (before, (kept, left)) in enumerate(zip(entering, schedule, strict=False)):
            if kept == (before if layer < 3 else left) and any(merges[:layer]) == (before < 17):
                table_of_layer = _layer_costs(layer, config, amounts, every, cost)
                assert table_of_layer[before - 2, left - 2] == layers[layer]
    assert count_latency(model, table, SubnetSpec({}, schedule)) == count_latency(cut, table)


def test_attention_weighs_its_tokens_only_behind_a_merging():
    """Tokens that were dropped leave the others as they were: one patch each, and nothing to add to
    the map."""
    config, table = (
        tiny_vit(num_hidden_layers=5).config,
        invented_table(tiny_vit(num_hidden_layers=5)),
    )
    for kind, products in table.coefficients.items():
        products |= dict.fromkeys(products, 0) | ({"weighing": 7} if "attention" in kind else {})
    dropping = [[17, 17], [12, 12], [9, 9], [9, 9], [2, 2]]
    merging = [[17, 17], [12, 12], [9, 7], [7, 7], [2, 2]]
    for schedule, layers in ((dropping, 0), (merging, 2)):
        tensors = [[torch.tensor(float(count)) for count in pair] for pair in schedule]
        assert schedule_cost(config, schedule, table.terms_of) == 7 * layers
        assert schedule_cost(config, tensors, table.terms_of) == 7 * layers
        model = OFBViTForImageClassification.from_dense(
            tiny_vit(num_hidden_layers=5), token_schedule=schedule
        )
        seen = []
        for layer in model.vit.layers:
            layer.attention.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[1] is not None)
            )
        model(tiny_images())
        assert sum(seen) == layers


def test_all_tokens_cost_what_the_search_for_widths_counts():
    for model in (tiny_vit(num_hidden_layers=4), non_uniform_vit()):
        table = invented_table(model)
        kept = schedule_cost(model.config, full_schedule(model.config), table.terms_of)
        assert kept == count_latency(model, table)
        assert table.terms(scheduled(model.config, full_schedule(model.config))) == table.terms(
            describe(model.config)
        )


@given(st.lists(st.integers(2, 17), min_size=4, max_size=4), st.integers(0, 100))
def test_what_is_expected_of_whole_counts_is_what_they_cost(counts, seed):
    kept, merged, later, last = counts
    schedule = [[17, 17], [kept, merged], [later, last], [2, 2]]
    model = tiny_vit(num_hidden_layers=4)
    table, learner = invented_table(model, seed), decided(schedule)
    cut = OFBViTForImageClassification.from_dense(model, token_schedule=schedule)
    assert expected_cost(learner, table.terms_of).item() == pytest.approx(
        count_latency(cut, table), rel=1e-5
    )


def test_milliseconds_press_on_every_count():
    learner = decided([[17, 17], [12, 12], [7, 7], [2, 2]])
    for reduction, counts in zip(learned_reductions(learner), [(14, 12), (9, 7)], strict=True):
        # falling, so that each binds
        for proxy, count in zip((reduction.kept, reduction.merged), counts, strict=True):
            proxy.logits.data = -(proxy.candidates - count).abs()
    logits = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    cost = expected_cost(learner, invented_table(tiny_vit(num_hidden_layers=4)).terms_of)
    gradients = torch.autograd.grad(cost, logits)
    assert len(gradients) == 4
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_random_networks_tell_what_others_take():
    """Times that a table makes up are found again: the products differ enough over what is
    measured."""
    config = OFBViTForImageClassification.from_dense(
        tiny_vit(num_hidden_layers=6, image_size=32)
    ).config
    truth, family = invented_table(tiny_vit(num_hidden_layers=6, image_size=32)), family_of(config)
    family.pin(config)
    sizes = describe(config).sizes

    def networks(seed):
        rng, configs = random.Random(seed), [copy.deepcopy(config) for _ in range(24)]
        for each, units in zip(
            configs, sample_sizes(search_config().search_space(config), sizes, 24, rng), strict=True
        ):
            family.resize(each, units)
        _reduce_tokens_(configs, config, rng)
        assert sum(each.token_schedule is not None for each in configs) == 12
        return [SimpleNamespace(config=each) for each in configs]

    def milliseconds_of(part, each):
        return (
            evaluate_terms(truth.terms_of([part]), quantities(describe(each.config).sizes))
            / PICOSECONDS
        )

    seen = networks(0)
    times = [
        {part.name: [milliseconds_of(part, each)] for part in describe(each.config).parts}
        for each in seen
    ]
    coefficients, residuals = _fitted(_points(seen, times))
    found = replace(truth, coefficients=coefficients)
    assert set(coefficients) == set(truth.coefficients)
    assert max(residual["worst"] for residual in residuals.values()) < 0.01
    for each in networks(1):
        assert count_latency(each.config, found) == pytest.approx(
            count_latency(each.config, truth), rel=0.01
        )


# ------------------------------------------------------------------------------------- whole counts


@pytest.mark.slow
@given(st.floats(0.3, 0.95), st.integers(0, 1000), st.data())
def test_settled_schedules_hold_the_milliseconds_to_the_picosecond(share, seed, data):
    model = tiny_vit(num_hidden_layers=5, image_size=32)  # 65 tokens
    config, table = model.config, invented_table(model, seed)
    smallest = schedule_cost(config, [[65, 65], *[[2, 2]] * 4], table.terms_of)
    dense = count_latency(model, table)
    target = max(int(share * dense), smallest)
    expected = [[data.draw(st.floats(2, 65)), data.draw(st.floats(2, 65))] for _ in range(3)]
    schedule = rounded_schedule(config, expected, target, table.terms_of)
    cost = schedule_cost(config, schedule, table.terms_of)
    assert cost <= target
    assert schedule[0] == [65, 65]
    for layer in reducing_layers(schedule, 65):  # none of them costs more than it saves
        before = schedule[layer - 1][1]
        passing = [*schedule[:layer], [before, before], *schedule[layer + 1 :]]
        assert schedule_cost(config, passing, table.terms_of) >= cost


def test_the_next_token_would_exceed_the_milliseconds():
    model = tiny_vit(num_hidden_layers=3, image_size=32)  # one layer learns
    table = invented_table(model)
    config, dense = model.config, count_latency(model, table)
    for share in (0.6, 0.7, 0.8):
        target = int(share * dense)
        _, [kept, left], last = rounded_schedule(config, [[30.0, 20.0]], target, table.terms_of)
        assert schedule_cost(config, [[65, 65], [kept, left], last], table.terms_of) <= target
        assert (
            schedule_cost(config, [[65, 65], [kept + 1, left + 1], [2, 2]], table.terms_of) > target
        )


def test_small_reductions_give_way_to_a_large_one_where_each_has_a_price():
    model = tiny_vit(num_hidden_layers=6, image_size=32)
    table = invented_table(model)
    learned = [[60.0, 55.0], [50.0, 45.0], [40.0, 35.0], [30.0, 25.0]]
    table.coefficients["stages.0.reduction"]["presence"] = 0
    free = rounded_schedule(
        model.config, learned, int(0.7 * count_latency(model, table)), table.terms_of
    )
    table.coefficients["stages.0.reduction"]["presence"] = int(0.08 * count_latency(model, table))
    dear = rounded_schedule(
        model.config, learned, int(0.7 * count_latency(model, table)), table.terms_of
    )
    assert len(reducing_layers(dear, 65)) < len(reducing_layers(free, 65))


def test_the_last_layer_drops_only_where_that_saves_something():
    model = tiny_vit(num_hidden_layers=4, image_size=32)
    table = invented_table(model)
    last = {}
    for price in (0, 10**12):
        table.coefficients["stages.0.reduction"]["presence"] = price
        dense = count_latency(model, table)
        last[price] = rounded_schedule(
            model.config, [[60.0, 50.0], [40.0, 30.0]], dense, table.terms_of
        )[-1]
    assert last[0] == [2, 2]
    assert last[10**12] == [65, 65]  # and nothing else is reduced


def test_fixed_rates_hold_milliseconds_too():
    model = tiny_vit(num_hidden_layers=4, image_size=32)
    table = invented_table(model)
    target = int(0.8 * count_latency(model, table))
    schedule = fixed_rate_schedule(model.config, target, cost=table.terms_of)
    assert schedule_cost(model.config, schedule, table.terms_of) <= target


# ----------------------------------------------------------------------------------------- refusals


def test_milliseconds_out_of_reach_are_refused_with_those_that_are_not():
    config, table = searched(0.001)
    model = tiny_vit(num_hidden_layers=4).config
    with pytest.raises(
        UnreachableBudgetError, match=r"target_latency_ms is .* costs ([\d,.]+) ms; raise"
    ) as refusal:
        config.target_for(model)
    smallest = TokenSearchConfig(
        target_latency_ms=refusal.value.smallest / PICOSECONDS, latency_table=config.latency_table
    )
    assert smallest.target_for(model) == refusal.value.smallest
    with pytest.raises(ValueError, match=r"more than the [\d,.]+ ms of the model itself"):
        searched(1.01)[0].target_for(model)
    table.coefficients["stages.0.reduction"]["presence"] = 10**12
    dear = TokenSearchConfig(target_latency_ms=1e-3, latency_table=table.to_dict())
    with pytest.raises(
        UnreachableBudgetError, match="fewer gain nothing here; more images in a batch"
    ) as refusal:
        dear.target_for(model)
    assert refusal.value.smallest == count_latency(tiny_vit(num_hidden_layers=4), table)


def test_refusals_show_every_picosecond():
    config, _ = searched(0.001)
    model = tiny_vit(num_hidden_layers=4).config
    with pytest.raises(UnreachableBudgetError) as refusal:
        config.target_for(model)
    below = TokenSearchConfig(
        target_latency_ms=(refusal.value.smallest - 1) / PICOSECONDS,
        latency_table=config.latency_table,
    )
    with pytest.raises(UnreachableBudgetError) as refusal:
        below.target_for(model)
    target, smallest = map(float, re.findall(r"([\d.]+) ms", str(refusal.value)))
    assert round((smallest - target) * PICOSECONDS) == 1


def test_larger_batches_are_no_advice_for_macs():
    # only what is not searched is left to cost anything, beside attentions of one channel
    config = OFBViTConfig(
        **{
            name: value
            for name, value in vit_config(num_hidden_layers=3).to_dict().items()
            if name != "model_type"
        },
        num_attention_heads_per_layer=[1] * 3,
        head_dim_per_layer=[1] * 3,
        intermediate_size_per_layer=[0] * 3,
    )
    with pytest.raises(UnreachableBudgetError, match="below the smallest") as refusal:
        TokenSearchConfig(target_macs=2).target_for(config)
    assert "batch" not in str(refusal.value)


def test_tables_that_do_not_fit_are_refused():
    config, table = searched(0.7)
    with pytest.raises(ValueError, match=r"latency table is of tiny.*differ in"):
        config.target_for(vit_config(num_hidden_layers=5))
    del table.coefficients["stages.0.reduction"]
    widths_alone, joint = (
        {"latency_table": table.to_dict(), "search_tokens": tokens} for tokens in (False, True)
    )
    install_bi_masks(tiny_vit(num_hidden_layers=4), search_config(**widths_alone))
    with pytest.raises(ValueError, match=r"has no .* for 'stages.0.reduction'; measure one"):
        install_bi_masks(tiny_vit(num_hidden_layers=4), search_config(**joint))
    for budget in ({"target_latency_ms": 1e-3}, {"target_macs": 0.7}):
        unmeasured = TokenSearchConfig(latency_table=table.to_dict(), **budget)
        with pytest.raises(ValueError, match=r"has no .* for 'stages.0.reduction'; measure one"):
            unmeasured.target_for(vit_config(num_hidden_layers=4))
    older = invented_table(tiny_vit(num_hidden_layers=4))
    older.coefficients["stages.0.mlp"] = {"presence": 1, "width": 1, "units": 1, "width x units": 1}
    with pytest.raises(
        ValueError, match=r"has no .*'tokens x width'.* for 'stages.0.mlp'; measure one"
    ):
        search_config(latency_table=older.to_dict()).search_space(vit_config(num_hidden_layers=4))


def test_budgets_are_checked_as_those_of_a_search_for_widths():
    table = invented_table(tiny_vit(num_hidden_layers=4)).to_dict()
    assert TokenSearchConfig().budget == ("target_macs", 0.7)
    with pytest.raises(ValueError, match=r"target_macs=0.5 and target_latency_ms=5.*one budget"):
        TokenSearchConfig(target_macs=0.5, target_latency_ms=5, latency_table=table)
    with pytest.raises(ValueError, match=r"latency_table is not given.*ofb-hf latency-table"):
        TokenSearchConfig(target_latency_ms=5)
    with pytest.raises(ValueError, match="milliseconds above 0"):
        TokenSearchConfig(target_latency_ms=0, latency_table=table)


# ----------------------------------------------------------------------------------------- training


def token_trainer(folder, config, **changes):
    """A short search for the token counts of a tiny model."""
    model = tiny_vit(num_hidden_layers=4)
    return TokenTrainer(
        model, arguments(folder, **changes), config, train_dataset=rows(), eval_dataset=rows(8)
    )


def test_training_moves_the_counts_to_the_milliseconds(tmp_path):
    config, table = searched(0.75, token_learning_rate=0.3)
    trainer = token_trainer(tmp_path, config)
    trainer.train()
    assert abs(expected_cost(trainer.learner, table.terms_of).item() / trainer.target - 1) < 0.1
    result = trainer.scheduled()
    assert (
        count_latency(result, table)
        <= trainer.target
        == round(config.target_latency_ms * PICOSECONDS)
    )
    logged = [row for row in trainer.state.log_history if "expected_latency_ms" in row]
    assert logged[-1]["expected_latency_ms"] == pytest.approx(config.target_latency_ms, rel=0.1)
    assert all("expected_macs" in row for row in logged)


def test_a_run_with_another_table_or_target_is_not_resumed(tmp_path):
    config, _ = searched(0.75)
    token_trainer(tmp_path, config, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    assert token_trainer(tmp_path, config, max_steps=2).train(resume_from_checkpoint=checkpoint)
    for other, name in (
        (searched(0.8)[0], "target_latency_ms"),
        (searched(0.75, seed=1)[0], "latency_table"),
    ):
        with pytest.raises(ValueError, match=f"another search.*{name}") as refusal:
            token_trainer(tmp_path, other).train(resume_from_checkpoint=checkpoint)
        assert "coefficients" not in str(refusal.value)  # that there is another table is enough
    assert "points" not in json.loads(
        (tmp_path / "checkpoint-2" / "token_search_config.json").read_text()
    )


# -------------------------------------------------------------------------- with widths beside them


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_widths_and_tokens_hold_milliseconds_together(seed, depth):
    model = tiny_vit(seed, num_hidden_layers=3, image_size=32)
    table = invented_table(model, seed)
    target = 0.6 * count_latency(model, table) / PICOSECONDS
    budget = {"target_macs": None, "target_latency_ms": target, "latency_table": table.to_dict()}
    supernet = install_bi_masks(
        model, search_config(search_tokens=True, search_depth=depth, **budget)
    )
    randomize_masks_(supernet, seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in [
        *(mask.first_order for mask in supernet.bi_masks),
        supernet.tokens.first_order[1:-1],
    ]:
        buffer.copy_(torch.rand(buffer.shape, generator=generator))
    supernet.decisions.estimate_importance_()
    choice, small = supernet.decisions.best_choice(), compress(supernet)
    assert choice.cost == count_latency(small, table)
    assert (
        0.9 * supernet.target
        <= count_latency(small, table)
        <= supernet.target
        == round(target * PICOSECONDS)
    )
    schedule = small.config.token_schedule
    assert schedule is None or reducing_layers(schedule, 65)
    assert read_subnet(supernet).token_schedule == schedule


def test_a_family_for_milliseconds_leaves_small_reductions_out():
    model = tiny_vit(num_hidden_layers=5)
    # later tokens are worth less
    curves = np.linspace(1, 0, 18)[None] ** 3 * np.geomspace(1, 0.01, 5)[:, None]
    amounts = quantities(describe(model.config).sizes)

    def reductions(price):
        table = invented_table(model)
        table.coefficients["stages.0.reduction"]["presence"] = price
        family = candidate_schedules(model.config, amounts, curves, range(1, 5), table.terms_of)
        return max(len(reducing_layers(schedule, 17)) for schedule in family)

    assert reductions(10**12) < reductions(0)
