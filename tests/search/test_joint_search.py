"""Widths, depth and tokens searched together under one budget: what is observed, chosen, cut,
stored and refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import (
    invented_table,
    non_uniform_vit,
    randomize_masks_,
    search_config,
    tiny_images,
    tiny_swin,
    tiny_vit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import searcher
from torch.utils.flop_counter import FlopCounterMode

from ofb_hf import (
    SubnetSpec,
    SwinBiMaskConfig,
    ViTBiMaskConfig,
    compress,
    count_macs,
    install_bi_masks,
    read_subnet,
)
from ofb_hf.choice.schedule_candidates import (
    candidate_schedules,
    reducing_layers,
    schedule_loss,
    schedule_of,
)
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.counting import evaluate_terms
from ofb_hf.families.description import macs_of, quantities
from ofb_hf.families.registry import describe
from ofb_hf.families.token_reduction import scheduled
from ofb_hf.models.modeling_ofb_vit import merge_tokens, rank_tokens
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.release.stock import pad_to_stock
from ofb_hf.search.searched_tokens import TokenProbe, merging_changes, tried_counts
from ofb_hf.search.shrinking import shrink_
from ofb_hf.tokens.schedules import full_schedule, schedule_cost
from ofb_hf.training.history import HistoryCallback, read_history
from ofb_hf.workflow.arguments import SearchArguments
from ofb_hf.workflow.plan import describe_space

# Whole searches: together they take too long for `make quick`.
pytestmark = pytest.mark.slow


def joint_config(**changes):
    """A search over widths and tokens."""
    return search_config(**({"target_macs": 0.4, "search_tokens": True} | changes))


def observed_supernet(seed=0, shape=None, **changes):
    """A supernet that is to believe it has observed units and tokens: random numbers, fewer tokens
    worth more."""
    supernet = install_bi_masks(
        tiny_vit(seed, **({"num_hidden_layers": 3} | (shape or {}))), joint_config(**changes)
    )
    randomize_masks_(supernet, seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in [
        *(mask.first_order for mask in supernet.bi_masks),
        supernet.tokens.first_order[1:-1],
    ]:
        buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return supernet


def flops(model):
    """Twice the MACs, as torch counts them."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tiny_images(1, model.config.image_size))
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------- observing


def test_what_merging_would_change_is_the_gradient_along_the_way_to_the_merged_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens, gradient = torch.randn(2, 3, 9, 5, generator=generator, dtype=torch.float64)
    importance = torch.rand(3, 8, generator=generator, dtype=torch.float64)
    changes = merging_changes(tokens, gradient, importance, [2, 4, 8])
    assert changes.shape == (3, 3)
    order = rank_tokens(importance, 9)
    for count, row in zip([2, 4, 8], changes, strict=True):
        for image in range(3):
            ranked, slope = tokens[image, order[image]], gradient[image, order[image]]
            merged, _ = merge_tokens(ranked[None], torch.ones(1, 9), count)
            # Where each token went: the token of the merged ones that holds it.
            similarity = torch.cosine_similarity(ranked[:, None], ranked[None, 1:count], dim=-1)
            place = torch.tensor(
                [i if i < count else int(similarity[i].argmax()) + 1 for i in range(9)]
            )
            torch.testing.assert_close(row[image], (slope * (merged[0, place] - ranked)).sum())


def test_a_probe_changes_nothing_and_sees_every_backward_pass():
    model, images = tiny_vit(num_hidden_layers=3), tiny_images(4)
    supernet = install_bi_masks(model, joint_config())
    before = supernet(images).logits
    supernet.watch_tokens_(True)
    with supernet.separate_images():
        watched = supernet(images)
        torch.testing.assert_close(watched.logits, before)
        assert supernet.changes_of_images()[1].abs().sum() == 0
        watched.logits.square().mean().backward()
        seen = supernet.changes_of_images()[1].view(4, 3, -1)
        assert (seen[:, 1] != 0).all()
        # the first layer has no probe, and patches of the last one are not read
        assert (seen[:, [0, 2]] == 0).all()
        assert supernet.changes_of_images()[1].abs().sum() == 0  # what was seen is seen once
    supernet.watch_tokens_(False)
    assert not any(isinstance(module, TokenProbe) for module in supernet.modules())


def test_merging_is_tried_from_one_patch_to_all_but_one():
    assert tried_counts(3) == [2]
    for tokens in (5, 17, 197):
        counts = tried_counts(tokens)
        assert counts[0] == 2
        assert counts == sorted(set(counts))
        assert counts[-1] == tokens - 1


# ---------------------------------------------------------------------------------------- schedules


@given(st.integers(0, 1000), st.sets(st.integers(1, 4)))
def test_a_family_goes_from_all_tokens_to_the_fewest(seed, reducing):
    config = tiny_vit(num_hidden_layers=5).config
    generator = np.random.default_rng(seed)
    curves = np.sort(generator.exponential(size=(5, 18)), axis=1)[:, ::-1].copy()
    curves[:, 17] = 0
    family = candidate_schedules(
        config, quantities({"embeddings": (40,), **block_sizes(5)}), curves, reducing
    )
    assert family[0] == full_schedule(config)
    assert all(set(reducing_layers(schedule, 17)) <= reducing for schedule in family)
    for schedule in family:
        counts = [17, *itertools.chain.from_iterable(schedule)]
        assert counts == sorted(counts, reverse=True)
        assert schedule_loss(curves, schedule) >= 0
    singles = [schedule_of([17] * layer + [2] * (5 - layer), 17) for layer in sorted(reducing)]
    assert all(schedule in family for schedule in singles)
    macs = [schedule_cost(config, schedule) for schedule in family]
    assert min(macs) == min(
        schedule_cost(config, schedule) for schedule in (family[0], *singles[:1])
    )


def block_sizes(layers):
    """Sizes of the blocks of `vit_config`."""
    return {
        f"layers.{i}.{half}": size
        for i in range(layers)
        for half, size in (("attention", (5, 8)), ("mlp", (72,)))
    }


@settings(max_examples=20)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from([0, 1, 10**3, 10**6]))
def test_the_cheapest_schedule_of_any_widths_is_in_the_family(seed, timed, price):
    """In MACs, and in milliseconds whatever a reduction costs by itself; with and without MLPs."""
    model, generator = tiny_vit(num_hidden_layers=4), np.random.default_rng(seed)
    table = invented_table(model, seed)
    table.coefficients["stages.0.reduction"]["presence"] *= price
    sizes = {"embeddings": (int(generator.integers(1, 41)),)}
    for layer in range(4):
        sizes[f"layers.{layer}.attention"] = tuple(map(int, generator.integers(1, [6, 9])))
        sizes[f"layers.{layer}.mlp"] = (int(generator.choice([0, 1, 20, 72])),)
    config, amounts = model.config, quantities(sizes)
    cost = table.terms_of if timed else macs_of

    def costs(schedule):
        return evaluate_terms(cost(scheduled(config, schedule).parts), amounts)

    curves = np.sort(generator.exponential(size=(4, 18)), axis=1)[:, ::-1].copy()
    family = candidate_schedules(config, amounts, curves, {1, 2, 3}, cost)
    assert min(map(costs, family)) == min(map(costs, falling_schedules({1, 2, 3}, 4)))


def falling_schedules(reducing, layers):
    """Schedules of 17 tokens that reduce in these layers only, to numbers from all over the
    range."""
    for counts in itertools.combinations_with_replacement((17, 16, 12, 9, 5, 3, 2), len(reducing)):
        at, left = dict(zip(sorted(reducing), counts, strict=True)), [17]
        for layer in range(layers):
            left.append(at.get(layer, left[-1]))
        yield schedule_of(left[1:], 17)


# ----------------------------------------------------------------------------------------- choosing


@settings(max_examples=12)
@given(
    st.integers(0, 1000),
    st.floats(0.25, 0.9),
    st.sampled_from([False, True, "attention"]),
    st.booleans(),
)
def test_the_budget_holds_and_is_used_and_costs_are_exact(seed, share, depth, large):
    shape = {"image_size": 32} if large else {}
    supernet = observed_supernet(seed, shape, target_macs=share, search_depth=depth)
    dense = compress_dense(supernet)
    supernet.decisions.estimate_importance_()
    subnet, small = read_subnet(supernet), compress(supernet)
    assert 0.98 * supernet.target <= count_macs(small) <= supernet.target
    assert flops(small) == 2 * count_macs(small)
    assert count_macs(dense, subnet) == count_macs(small)
    assert SubnetSpec.from_json(subnet.to_json()) == subnet
    schedule = small.config.token_schedule
    assert subnet.token_schedule == schedule
    assert supernet.decisions.token_schedule == (schedule or full_schedule(small.config))
    assert slice_model(dense, subnet).config.to_dict() == small.config.to_dict()


def compress_dense(supernet):
    """A classifier of the dense widths."""
    model = type(supernet.model)(supernet.config)
    model.load_state_dict(
        {k: v for k, v in supernet.model.state_dict().items() if not k.endswith("mask_token")}
    )
    return model


def test_all_tokens_are_no_schedule_wherever_they_were_decided_on():
    """In the supernet, in what is cut from it, in the subnet and its JSON, and in cuts by the
    subnet's indices."""
    supernet = observed_supernet(target_macs=0.9)
    dense, every = compress_dense(supernet), full_schedule(supernet.config)
    supernet.decisions.decide_tokens_(every)
    subnet, small = read_subnet(supernet), compress(supernet)
    assert supernet.decisions.token_schedule == every  # it is decided, though
    assert small.config.token_schedule is subnet.token_schedule is None
    assert "token_schedule" not in subnet.to_json()
    assert (
        slice_model(dense, SubnetSpec(subnet.kept, every)).config.to_dict()
        == small.config.to_dict()
    )
    supernet.decisions.settle_()
    shrink_(supernet)
    assert supernet.tokens.acts
    assert supernet.config.token_schedule is supernet.fold().config.token_schedule is None
    # no schedule stands in the way of that
    assert pad_to_stock(small)(tiny_images()).logits.shape == (2, 3)


def test_expected_macs_of_one_choice_are_those_of_the_result():
    supernet = observed_supernet()
    supernet.decisions.estimate_importance_()
    choice = supernet.decisions.best_choice()
    with torch.no_grad():
        for mask in supernet.bi_masks:
            mask.alpha.fill_(-60.0)
            mask.alpha[mask.index_of(choice.candidates[mask.name].size)] = 60.0
    expected = supernet.decisions.expected_macs(supernet.sizes("sparsity"))
    assert choice.cost == count_macs(compress(supernet))
    assert expected.item() == pytest.approx(choice.cost, rel=1e-6)
    assert supernet.decisions.expected_cost(supernet.sizes("sparsity")).item() == expected.item()


def test_tokens_that_are_worth_nothing_go_and_units_stay():
    supernet = observed_supernet(target_macs=0.7)
    supernet.tokens.first_order.mul_(1e-9)
    supernet.decisions.estimate_importance_()
    tokens_only = count_macs(
        compress_dense(supernet), SubnetSpec({}, supernet.decisions.token_schedule)
    )
    assert tokens_only <= 1.02 * supernet.target
    precious = observed_supernet(target_macs=0.7)
    precious.tokens.first_order.mul_(1e9)
    precious.decisions.estimate_importance_()
    assert reducing_layers(precious.decisions.token_schedule, 17) == [2]  # where it costs nothing


NON_UNIFORM = {  # candidates for `non_uniform_vit`
    "embedding_candidates": [13, 30],
    "head_candidates": [1, 2, 3, 5],
    "head_dim_candidates": [2, 3, 4, 7, 11],
    "mlp_candidates": [5, 19, 23, 31, 64],
}


def smallest_by_trying(model, config):
    """What the smallest network of a search costs: the smallest of all sizes and schedules that are
    allowed."""
    architecture, space = describe(model.config), config.search_space(model.config)
    attentions = [name for name in architecture.attentions if all(architecture.sizes[name])]
    sizes = {s.name: (s.sizes[0], next(size for size in s.sizes if all(size))) for s in space}
    reducing, costs = {int(name.split(".")[1]) for name in attentions} - {0}, []
    for schedule in falling_schedules(reducing, model.config.num_hidden_layers):
        terms = config.terms(scheduled(model.config, schedule))
        needed = {f"layers.{layer}.attention" for layer in reducing_layers(schedule, 17)}
        for present in [needed] if needed else [{name} for name in attentions]:
            chosen = {
                name: some if name in present else fewest for name, (fewest, some) in sizes.items()
            }
            costs.append(evaluate_terms(terms, quantities(architecture.sizes | chosen)))
    return min(costs)


@pytest.mark.parametrize(
    "price", [None, 0, 10**4], ids=["macs", "cheap reductions", "dear reductions"]
)
@pytest.mark.parametrize("depth", [False, True, "attention", "mlp"])
@pytest.mark.parametrize("is_stock", [True, False])
def test_budgets_are_refused_below_the_smallest_network_and_nowhere_else(is_stock, depth, price):
    """Which is never larger than that of a search for widths alone."""
    model = tiny_vit(num_hidden_layers=3) if is_stock else non_uniform_vit()
    candidates = {} if is_stock else NON_UNIFORM
    fields, config, smallest = {"target_macs": 2}, {}, {}
    if price is not None:
        table = invented_table(model)
        table.coefficients["stages.0.reduction"]["presence"] *= price
        fields = {"target_macs": None, "target_latency_ms": 1e-9, "latency_table": table.to_dict()}
    for tokens in (False, True):
        config[tokens] = search_config(
            search_tokens=tokens, search_depth=depth, **candidates | fields
        )
        with pytest.raises(UnreachableBudgetError, match="smallest subnet") as refused:
            install_bi_masks(model, config[tokens])
        smallest[tokens] = refused.value.smallest
    assert smallest[True] <= smallest[False]
    assert smallest[True] == smallest_by_trying(model, config[True])
    name, _ = config[True].budget
    exactly = replace(config[True], **{name: config[True].absolute(smallest[True])})
    small = compress(install_bi_masks(model, exactly))
    assert (
        evaluate_terms(
            exactly.terms(describe(small.config)), quantities(describe(small.config).sizes)
        )
        == smallest[True]
    )
    assert describe_space(model, config[True])["macs"] == count_macs(small)


# ----------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A joint search with depth, and where it saved checkpoints."""
    folder = tmp_path_factory.mktemp("joint")
    return run(folder, save_strategy="steps", save_steps=4), folder


def run(folder, checkpoint=None, **changes):
    """A joint search of a tiny model of four layers."""
    config = joint_config(search_depth=True, target_macs=0.45)
    trainer = searcher(folder, config, tiny_vit(num_hidden_layers=4).train(), **changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_a_search_ends_with_fewer_units_and_fewer_tokens(finished):
    trainer, _ = finished
    supernet, small = trainer.supernet.eval(), trainer.compress().eval()
    assert 0.98 * supernet.target <= count_macs(small) <= supernet.target
    assert (
        small.config.token_schedule
        == supernet.config.token_schedule
        == supernet.decisions.token_schedule
    )
    assert supernet.decisions.is_settled
    assert bool(supernet.tokens.acts)
    assert supernet.pmim_decoder is None
    images = tiny_images(8)
    with torch.no_grad():
        torch.testing.assert_close(supernet(images).logits, small(images).logits, rtol=0, atol=1e-5)
    assert not any(name.startswith("pmim_decoder") for name in supernet.state_dict())


@pytest.mark.parametrize("step", [4, 12, 20])
def test_a_resumed_search_ends_where_the_uninterrupted_one_does(finished, step, tmp_path):
    """From among the observing steps, from between choice of tokens and choice, and from after
    it."""
    trainer, folder = finished
    again = run(tmp_path, str(folder / f"checkpoint-{step}"))
    ours, theirs = again.supernet.state_dict(), trainer.supernet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert again.read_subnet() == trainer.read_subnet()


def test_small_micro_batches_observe_what_large_ones_do(tmp_path):
    """Of the same images: the scale of the loss is that of the units', so both are counted in the
    same money."""
    found = []
    for batch, accumulate in ((8, 1), (4, 2)):
        changes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "max_steps": 4,
        }
        trainer = searcher(
            tmp_path / str(batch), joint_config(), tiny_vit(num_hidden_layers=3).train(), **changes
        )
        trainer.train()
        units = sum(float(mask.first_order.sum()) for mask in trainer.supernet.bi_masks)
        found.append(trainer.supernet.tokens.first_order / units)
    assert found[0].sum() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-9)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_params": 0.5}, "target_params is 0.5.*give target_macs"),
        ({"preset": "paper"}, "importance_hold is 0, .*give importance_hold"),
        ({"pmim_until_settled": False}, "pmim_until_settled is False"),
        ({"prune_during_search": False}, "prune_during_search is False.*vote"),
    ],
)
def test_what_cannot_go_together_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match=f"search_tokens is True.*{message}"):
        ViTBiMaskConfig(**{"preset": "bi_mask", "search_tokens": True} | fields)


def test_models_without_a_class_token_and_families_are_refused():
    with pytest.raises(ValueError, match=r"SwinConfig has no class token"):
        install_bi_masks(tiny_swin(), SwinBiMaskConfig(preset="bi_mask", search_tokens=True))
    with pytest.raises(
        ValueError, match=r"search_tokens is True and target_macs is \[0.7, 0.5\].*one budget"
    ):
        SearchArguments(search_tokens=True, target_macs=["0.7,0.5"])


def test_layers_that_have_lost_their_attention_already_let_tokens_pass():
    model = non_uniform_vit()  # without attention in the fourth and the last of six layers
    supernet = install_bi_masks(
        model, ViTBiMaskConfig(preset="bi_mask", target_macs=0.6, multiple_of=1, search_tokens=True)
    )
    for mask in supernet.bi_masks:
        mask.first_order.fill_(1.0)  # and tokens are worth nothing
    supernet.decisions.estimate_importance_()
    reducing = reducing_layers(read_subnet(supernet).token_schedule, 17)
    assert reducing
    assert set(reducing) <= {1, 2, 4}
    assert 0.98 * supernet.target <= count_macs(compress(supernet)) <= supernet.target


def test_schedules_of_counts():
    assert schedule_of([9, 7, 7, 2], 9) == [[9, 9], [9, 7], [7, 7], [2, 2]]
    assert reducing_layers([[9, 9], [9, 7], [7, 7], [2, 2]], 9) == [1, 3]


def test_history_says_what_is_left(tmp_path):
    history = HistoryCallback(tmp_path / "history.jsonl", "search")
    config = joint_config(target_macs=0.45)
    trainer = searcher(tmp_path, config, tiny_vit(num_hidden_layers=3).train(), callbacks=[history])
    trainer.train()
    left = [row.get("tokens") for row in read_history(tmp_path / "history.jsonl")]
    assert left[0] is None
    assert left[-1] == [merged for _, merged in trainer.supernet.decisions.token_schedule]
