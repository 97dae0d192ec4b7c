"""Token schedules in the shape of published ones, for any plain ViT."""

from itertools import accumulate, pairwise

import pytest
from factories import tiny_vit, vit_config, vit_shapes
from hypothesis import given, settings

from ofb_hf import OFBViTForImageClassification
from ofb_hf.models.shapes import SHAPES
from ofb_hf.tokens.graded_schedules import graded_schedules
from ofb_hf.tokens.published import PUBLISHED, published_schedule
from ofb_hf.tokens.schedules import full_schedule, num_tokens, schedule_cost


@settings(deadline=None, max_examples=25)
@given(vit_shapes())
def test_costs_fall_from_all_tokens_to_one_patch(shape):
    changes, _ = shape
    config = vit_config(**changes)
    schedules = graded_schedules(config)
    assert schedules[0] == full_schedule(config)
    costs = [schedule_cost(config, schedule) for schedule in schedules]
    assert all(before >= after for before, after in pairwise(costs))
    for schedule in schedules:
        counts = [num_tokens(config), *(count for pair in schedule for count in pair)]
        assert all(before >= after >= 2 for before, after in pairwise(counts))
        # The first layer hands on all tokens, and the model can follow the rest.
        assert schedule[0] == [num_tokens(config)] * 2
        config_of_ours = OFBViTForImageClassification.from_dense(tiny_vit(**changes)).config
        config_of_ours.stored_schedule(schedule)


@pytest.mark.parametrize("fraction", [0.95, 0.7, 0.431, 0.2])
def test_the_largest_schedule_within_a_budget_is_the_last(fraction):
    config = SHAPES["deit_tiny"].config(["cat", "dog"])
    dense = schedule_cost(config, full_schedule(config))
    target = int(fraction * dense)
    costs = [schedule_cost(config, each) for each in graded_schedules(config, target)]
    *others, within = costs
    # With fewer tokens the widths could not use the budget up.
    assert target - 0.005 * dense <= within <= target
    assert all(cost > target for cost in others)


@pytest.mark.parametrize(("shape", "width"), [("deit_tiny", 192), ("deit_small", 384)])
def test_published_schedules_are_among_them(shape, width):
    config = SHAPES[shape].config(["cat", "dog"])
    schedules = [schedule[:-1] for schedule in graded_schedules(config)]
    for gmacs in PUBLISHED[width]:
        # Some published counts rise, where all that enter are meant.
        counts = [count for pair in published_schedule(config, gmacs) for count in pair]
        falling = list(accumulate(counts, min))
        meant = [[kept, left] for kept, left in batched(falling)]
        # The last layer, behind which no patch is read, keeps one instead of two.
        assert meant[:-1] in schedules


def batched(counts):
    return zip(counts[::2], counts[1::2], strict=True)


def test_layers_without_attention_hand_on_all_tokens():
    model = OFBViTForImageClassification.from_dense(tiny_vit(num_hidden_layers=6))
    config = model.config
    sizes = [5, 0, 5, 5, 0, 5]
    config.num_attention_heads_per_layer = sizes
    config.head_dim_per_layer = [8 if heads else 0 for heads in sizes]
    for schedule in graded_schedules(config):
        entering = num_tokens(config)
        for layer, (kept, left) in enumerate(schedule):
            if not sizes[layer]:
                assert kept == left == entering
            entering = left
