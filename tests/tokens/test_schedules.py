"""Token schedules that are published, of a fixed rate, and learned hold their budget exactly."""

import itertools

import pytest
import torch
from factories import (
    SCHEDULE,
    decided,
    non_uniform_vit,
    randomize_weights_,
    scheduled_vit,
    search_config,
    tiny_images,
    tiny_swin,
    tiny_vit,
    vit_config,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import arguments, rows

from ofb_hf import OFBViTConfig, OFBViTForImageClassification, count_macs, install_bi_masks
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.families.description import UnsupportedArchitectureError
from ofb_hf.models.modeling_ofb_vit import merge_tokens
from ofb_hf.models.shapes import SHAPES
from ofb_hf.token_search.learned_counts import (
    LearnedCount,
    LearnedReduction,
    TokenSearchConfig,
    expected_cost,
    install_learned_counts,
    read_expected_counts,
)
from ofb_hf.token_search.trainer import TokenTrainer
from ofb_hf.tokens.published import PUBLISHED, published_schedule
from ofb_hf.tokens.schedules import (
    fixed_rate_schedule,
    full_schedule,
    num_tokens,
    ranking_layers,
    rounded_schedule,
    schedule_cost,
)

DEIT = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
# GMACs of the published schedules by the published formula, recomputed from the lists; and by our
# exact count, which knows 196 patches in the embedding, and adds the class token's row and the
# similarities.
RECOMPUTED = {
    "deit_tiny": {
        0.6: (0.6549, 0.6594),
        0.7: (0.7266, 0.7306),
        0.8: (0.8088, 0.8132),
        0.9: (0.9021, 0.9059),
        1.0: (1.0036, 1.0068),
    },
    "deit_small": {
        2.3: (2.3272, 2.3353),
        2.5: (2.5047, 2.5140),
        2.7: (2.7092, 2.7178),
        2.9: (2.9053, 2.9137),
        3.1: (3.1080, 3.1167),
    },
    "deit_base": {
        8.7: (8.7306, 8.7484),
        10.0: (9.9856, 10.0031),
        10.4: (10.4345, 10.4514),
        11.5: (11.5172, 11.5350),
        12.5: (12.5229, 12.5391),
    },
}
CASES = [(shape, gmacs) for shape, known in RECOMPUTED.items() for gmacs in known]


def deit_config(shape: str):
    """The config of a DeiT with 1000 classes."""
    return SHAPES[shape].config([str(label) for label in range(1000)])


def published_formula(width: int, schedule) -> float:
    """GMACs as the published code counts them: 197 tokens in the patch embedding, no more than
    matrices of weights and the attention map."""
    tokens, macs = 197, 197 * width * 3 * 16**2 + width * 1000
    for counts in schedule:
        macs += 4 * tokens * width**2 + 2 * tokens**2 * width
        tokens = min(tokens, *counts)
        macs += 8 * tokens * width**2
    return macs / 1e9


# ------------------------------------------------------------------------------ published schedules


@pytest.mark.parametrize(("shape", "gmacs"), CASES)
def test_published_schedules_cost_what_was_recomputed(shape, gmacs):
    schedule, (by_formula, exact) = (
        published_schedule(deit_config(shape), gmacs),
        RECOMPUTED[shape][gmacs],
    )
    assert round(published_formula(DEIT[shape], schedule), 4) == by_formula
    fields = {k: v for k, v in deit_config(shape).to_dict().items() if k != "model_type"}
    config = OFBViTConfig(**fields, token_schedule=schedule)
    assert round(count_macs(config) / 1e9, 4) == exact
    assert count_macs(config) == schedule_cost(deit_config(shape), config.token_schedule)


def test_every_published_schedule_is_there():
    assert {width: set(known) for width, known in PUBLISHED.items()} == {
        DEIT[shape]: set(known) for shape, known in RECOMPUTED.items()
    }


def test_schedules_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"gmacs is 4\.6.*\[2\.3, 2\.5, 2\.7, 2\.9, 3\.1\]"):
        published_schedule(deit_config("deit_small"), 4.6)
    with pytest.raises(
        ValueError, match=r"\(2, 17, 40\).*12 layers, 197 tokens and \[192, 384, 768\]"
    ):
        published_schedule(vit_config(), 2.9)


# ------------------------------------------------------------------------------------- whole counts


@given(st.floats(0.5, 0.8), st.data())
def test_settled_schedules_hold_the_budget_and_use_it(share, data):
    config = vit_config(image_size=32, num_hidden_layers=4)  # 65 tokens
    target = int(share * count_macs(config))
    count = st.floats(2, 65)
    expected = [[data.draw(count), data.draw(count)] for _ in range(2)]
    schedule = rounded_schedule(config, expected, target)
    assert OFBViTForImageClassification(
        OFBViTConfig(**fields_of(config), token_schedule=schedule)
    ).config.token_schedule
    assert (schedule[0], schedule[3]) == ([65, 65], [2, 2])
    assert 0.98 * target <= schedule_cost(config, schedule) <= target


def fields_of(config):
    """Return the fields of a stock config that `OFBViTConfig` takes."""
    return {name: value for name, value in config.to_dict().items() if name != "model_type"}


@pytest.mark.parametrize("merge", [True, False])
def test_fixed_rates_take_as_many_tokens_in_every_layer(merge):
    config = vit_config(image_size=32, num_hidden_layers=4)
    schedule = fixed_rate_schedule(config, int(0.8 * count_macs(config)), merge)
    left = [after for _, after in schedule]
    steps = [a - b for a, b in itertools.pairwise(left)]
    assert max(steps) - min(steps) <= 1
    assert all((kept == after) != merge for kept, after in schedule[1:])
    assert 0.95 <= schedule_cost(config, schedule) / (0.8 * count_macs(config)) <= 1


def test_budgets_out_of_reach_are_refused():
    config = vit_config(num_hidden_layers=3)
    smallest = schedule_cost(config, [[17, 17], [2, 2], [2, 2]])
    assert TokenSearchConfig(target_macs=smallest).target_for(config) == smallest
    with pytest.raises(UnreachableBudgetError, match=f"{smallest - 1:,}.*{smallest:,}"):
        TokenSearchConfig(target_macs=smallest - 1).target_for(config)
    with pytest.raises(ValueError, match="more than the"):
        TokenSearchConfig(target_macs=count_macs(config) + 1).target_for(config)
    for field in ("target_macs", "token_granularity", "token_learning_rate", "token_macs_weight"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            TokenSearchConfig(**{field: 0})
    with pytest.raises(UnreachableBudgetError, match="no token schedule"):
        fixed_rate_schedule(config, 1000)


# ----------------------------------------------------------------------------------- learned counts


@pytest.mark.parametrize(
    ("granularity", "candidates", "count"), [(1, 196, 100), (2, 98, 100), (4, 49, 101)]
)
def test_counts_start_where_the_published_proxy_starts(granularity, candidates, count):
    learned = LearnedCount(197, granularity)
    assert learned.logits.shape == (candidates,)
    assert learned().item() == count
    survival = learned.survival().detach()
    assert survival[0] == pytest.approx(1)
    assert (survival.diff() <= 1e-6).all()
    if granularity == 4:
        assert survival[5].item() == pytest.approx(48 / 49)
    assert survival.sum().item() == pytest.approx(learned.expected().item(), rel=1e-4)


def test_rounding_up_passes_the_gradient_of_the_expectation():
    learned = LearnedCount(17)
    torch.nn.init.normal_(learned.logits)
    (through,) = torch.autograd.grad(learned(), learned.logits)
    (expected,) = torch.autograd.grad(learned.expected(), learned.logits)
    torch.testing.assert_close(through, expected)
    assert learned().item() == learned().round().item() >= learned.expected().item()


@given(st.lists(st.integers(2, 17), min_size=4, max_size=4), st.integers(0, 1000))
def test_hidden_tokens_count_as_removed_ones(counts, seed):
    """Logits and cost with hidden tokens are those of the model from which they are removed."""
    kept, merged, later, last = counts
    schedule = [[17, 17], [kept, merged], [later, last], [2, 2]]
    learner, images = (
        decided(schedule, seed=seed, dtype=torch.float64),
        tiny_images(2, seed=seed, dtype=torch.float64),
    )
    model = scheduled_vit(schedule, num_hidden_layers=4, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(learner(images).logits, model(images).logits, rtol=0, atol=1e-3)
    assert expected_cost(learner).item() == pytest.approx(count_macs(model), rel=1e-6)
    exact = schedule_cost(model.config, model.config.token_schedule)
    assert exact == count_macs(model)


def test_the_gradients_of_counts_do_not_depend_on_rounding():
    """Hidden tokens have almost no size, but the gradient of their counts is complete."""
    images, gradients = tiny_images(4, size=32), {}
    for dtype in (torch.float32, torch.float64):
        model = install_learned_counts(tiny_vit(num_hidden_layers=4, image_size=32)).to(dtype)
        logits = [parameter for parameter in model.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(0)
        for parameter in logits:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        gradients[dtype] = torch.autograd.grad(
            model(images.to(dtype)).logits.square().sum(), logits
        )
    for single, double in zip(*gradients.values(), strict=True):
        assert (single - double).norm() < 1e-3 * double.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_hidden_token_passes_a_gradient_on(dtype):
    reduction = LearnedReduction(50).to(dtype)
    with torch.no_grad():
        reduction.kept.logits.copy_(torch.randn(49))
        reduction.merged.logits[0] = 1000  # all that are not dropped
    survival = reduction.kept.survival()
    reduction.kept.survival = lambda: survival
    _, sizes = reduction(torch.randn(1, 50, 8, dtype=dtype), None, torch.rand(1, 49, dtype=dtype))
    (gradient,) = torch.autograd.grad(sizes.sum(), survival)
    assert (sizes < 0.5).any()
    assert (gradient == 1).all()


def test_loss_and_cost_reach_every_count_and_no_weight():
    learner, images = install_learned_counts(tiny_vit(num_hidden_layers=4)).train(), tiny_images(4)
    learning = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    assert len(learning) == 4
    assert all(name.endswith(".logits") for name in learning)
    for loss in (learner(images, labels=torch.arange(4) % 3).loss, expected_cost(learner)):
        gradients = torch.autograd.grad(loss, list(learning.values()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        assert all(gradient.isfinite().all() for gradient in gradients)


FUNCTIONS = {
    "num_tokens": num_tokens,
    "full_schedule": full_schedule,
    "ranking_layers": ranking_layers,
    "fixed_rate_schedule": lambda config: fixed_rate_schedule(config, 10**6),
    "rounded_schedule": lambda config: rounded_schedule(config, [], 10**6),
    "target_for": TokenSearchConfig().target_for,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_configs_without_a_class_token_are_refused(name):
    with pytest.raises(UnsupportedArchitectureError, match=r"got a SwinConfig; .*class token"):
        FUNCTIONS[name](tiny_swin().config)


def test_models_without_a_class_token_and_with_few_attentions_are_refused():
    with pytest.raises(
        UnsupportedArchitectureError, match=r"SwinForImageClassification.*class token"
    ):
        install_learned_counts(tiny_swin())
    with pytest.raises(UnsupportedArchitectureError, match="num_hidden_layers is 2"):
        install_learned_counts(tiny_vit())
    for layers in (1, 2):
        for ask in (
            TokenSearchConfig().target_for,
            lambda config: rounded_schedule(config, [], 10**6),
        ):
            with pytest.raises(
                UnsupportedArchitectureError,
                match=f"num_hidden_layers is {layers}.*at least 3 layers",
            ):
                ask(vit_config(num_hidden_layers=layers))


def test_attention_that_takes_no_bias_is_refused_before_anything_is_learned():
    model = tiny_vit(num_hidden_layers=4, attn_implementation="flex_attention")
    with pytest.raises(
        ValueError, match=r"attn_implementation is 'flex_attention'.*one of \['eager', 'sdpa'\]"
    ):
        install_learned_counts(model)
    with pytest.raises(ValueError, match="attn_implementation is 'flex_attention'"):
        install_bi_masks(model, search_config(search_tokens=True))
    assert install_bi_masks(model, search_config()).target > 0  # with all tokens it may be any


@pytest.mark.parametrize("granularity", [16, 1000, 2.5, True, 0, "4"])
def test_gaps_that_leave_nothing_to_choose_are_refused(granularity):
    with pytest.raises(
        ValueError,
        match=f"token_granularity is {granularity!r}.*whole number.*below the 16 patches",
    ):
        install_learned_counts(tiny_vit(num_hidden_layers=4), granularity)
    learned = install_learned_counts(tiny_vit(num_hidden_layers=4), 15).vit.layers[1].reduction
    assert learned.kept.candidates.tolist() == [17, 2]
    if granularity not in (16, 1000):
        with pytest.raises(ValueError, match="token_granularity is"):
            TokenSearchConfig(token_granularity=granularity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_that_are_all_zero_make_no_nan(dtype):
    tokens = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens[:, [2, 7]] = 0
    merged, sizes = merge_tokens(tokens, torch.ones(1, 9), 5)
    assert merged.isfinite().all()
    assert (sizes >= 1).all()
    reduction = LearnedReduction(9)
    with torch.no_grad():
        reduction.merged.logits.copy_(torch.tensor([0.0, 0, 0, 0, 60, 0, 0, 0]))
    tokens, sizes = reduction(tokens, None, torch.linspace(1, 0, 8)[None])
    assert tokens.isfinite().all()
    assert sizes.isfinite().all()


# ----------------------------------------------------------------------------------------- training


def token_trainer(folder, model=None, callbacks=None, **changes):
    """A short search for the token counts of a tiny model."""
    config = TokenSearchConfig(target_macs=0.7, token_learning_rate=0.3)
    model = model if model is not None else tiny_vit(num_hidden_layers=4)
    return TokenTrainer(
        model,
        arguments(folder, **changes),
        config,
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=callbacks,
    )


def test_training_moves_the_counts_to_the_budget_and_nothing_else(tmp_path):
    model = tiny_vit(num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = token_trainer(tmp_path, model)
    start = read_expected_counts(trainer.learner)
    trainer.train()
    assert read_expected_counts(trainer.learner) != start
    assert abs(expected_cost(trainer.learner).item() / trainer.target - 1) < 0.1
    result = trainer.scheduled()
    assert result.config.token_schedule == trainer.schedule()
    # a token of a model this small is 2 %
    assert 0.95 * trainer.target <= count_macs(result) <= trainer.target
    state = result.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_checkpointing_changes_no_count_and_reentrant_checkpointing_is_refused(tmp_path):
    """It would learn from the budget alone: nothing that comes into a block needs a gradient."""
    counts = []
    for name, changes in (("plain", {}), ("checkpointing", {"gradient_checkpointing": True})):
        trainer = token_trainer(tmp_path / name, max_steps=3, **changes)
        trainer.train()
        counts.append(read_expected_counts(trainer.learner))
    assert counts[0] == counts[1]
    reentrant = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(
        ValueError, match=r"use_reentrant is True, but only token counts learn.*leave it at False"
    ):
        token_trainer(tmp_path / "reentrant", **reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.9}])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, ema):
    whole = token_trainer(tmp_path / "whole", **ema)
    whole.train()
    first = token_trainer(tmp_path / "parts", save_strategy="steps", save_steps=12, **ema)
    first.train()
    again = token_trainer(tmp_path / "parts", **ema)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-12"))
    ours, theirs = again.learner.state_dict(), whole.learner.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_wanted(tmp_path):
    token_trainer(tmp_path, save_strategy="steps", save_steps=12).train()
    with pytest.raises(ValueError, match="no weight average"):
        token_trainer(tmp_path, ema_decay=0.9).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-12")
        )


def test_another_budget_is_not_resumed(tmp_path):
    token_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    other = TokenSearchConfig(target_macs=0.8, token_learning_rate=0.3)
    again = TokenTrainer(
        tiny_vit(num_hidden_layers=4), arguments(tmp_path), other, train_dataset=rows()
    )
    with pytest.raises(ValueError, match=r"another search.*'target_macs': \(0.7, 0.8\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_tokens_are_searched_where_layers_have_lost_their_attention(tmp_path):
    """Attention in layers 0, 1, 2 and 4 of six: the first keeps all, 1 and 2 learn, and what 4
    might drop costs nothing any more, for no MLP is left behind it."""
    trainer = token_trainer(tmp_path, non_uniform_vit().train(), max_steps=6)
    trainer.train()
    assert len(read_expected_counts(trainer.learner)) == 2
    schedule, model = trainer.schedule(), trainer.scheduled().eval()
    assert schedule[0] == [17, 17]
    assert schedule[3] == [schedule[2][1]] * 2
    assert schedule[4] == schedule[5] == schedule[3]
    dropping = [*schedule[:4], [2, 2], [2, 2]]
    assert schedule_cost(model.config, dropping) > count_macs(model)
    assert 0.9 * trainer.target <= count_macs(model) <= trainer.target
    hidden = model(tiny_images(), output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in hidden[1:]] == [left for _, left in schedule]


def test_hidden_tokens_count_as_removed_ones_beside_missing_attentions():
    model = non_uniform_vit(dtype=torch.float64)
    learner, images = install_learned_counts(model), tiny_images(2, dtype=torch.float64)
    for layer, counts in ((1, (14, 11)), (2, (9, 6))):
        reduction = learner.vit.layers[layer].reduction
        for proxy, count in zip((reduction.kept, reduction.merged), counts, strict=True):
            proxy.logits.data[proxy.candidates == count] = 60.0
    schedule = [[17, 17], [14, 11], [9, 6], [6, 6], [2, 2], [2, 2]]
    cut = OFBViTForImageClassification.from_dense(model, token_schedule=schedule)
    torch.testing.assert_close(learner(images).logits, cut(images).logits, rtol=0, atol=1e-3)
    assert expected_cost(learner).item() == pytest.approx(count_macs(cut), rel=1e-6)


def test_fixed_rates_let_all_tokens_pass_where_nothing_ranks_them():
    config = non_uniform_vit().config
    for merge in (True, False):
        schedule = fixed_rate_schedule(
            config, int(0.8 * schedule_cost(config, full_schedule(config))), merge
        )
        model = OFBViTForImageClassification.from_dense(non_uniform_vit(), token_schedule=schedule)
        assert count_macs(model) == schedule_cost(config, schedule)


def test_tokens_are_searched_on_top_of_narrow_layers_and_an_old_schedule(tmp_path):
    config = OFBViTConfig(
        **fields_of(vit_config(num_hidden_layers=3)),
        intermediate_size_per_layer=[9, 30, 72],
        token_schedule=SCHEDULE,
    )
    model = OFBViTForImageClassification(config)
    randomize_weights_(model)
    trainer = token_trainer(tmp_path, model, max_steps=2)
    result = trainer.scheduled()
    assert trainer.dense_cost == schedule_cost(config, full_schedule(config)) > count_macs(model)
    assert count_macs(result) <= trainer.target == int(0.7 * trainer.dense_cost)
    assert result.config.intermediate_size_per_layer == [9, 30, 72]
