"""Layers that choose their sizes together: one alpha, importance of each, and a stock checkpoint at
the end."""

import json

import pytest
import torch
from factories import (
    FAMILIES,
    randomize_masks_,
    search_config,
    settle_randomly_,
    tiny_images,
    tiny_model,
    tiny_supernet,
)
from invariants import assert_equal_states
from runs import searcher
from torch._dynamo.utils import counters
from transformers import AutoModelForImageClassification, TrainerCallback, ViTForImageClassification

from ofb_hf import compress, count_macs, count_params, install_bi_masks, read_subnet
from ofb_hf.choice.scores import scored_candidates, search_scores
from ofb_hf.masks.bi_mask import TiedBiMask
from ofb_hf.release.stock import pad_to_stock
from ofb_hf.search.shrinking import shrink_
from ofb_hf.space.configuration import BiMaskConfig
from ofb_hf.space.search_space import SearchSpace, SubmoduleSpace

both_families = pytest.mark.parametrize("family", FAMILIES)
TIED = {
    "vit": {"layers.1.attention": "layers.0.attention", "layers.1.mlp": "layers.0.mlp"},
    "swin": {
        "stages.0.blocks.1.attention": "stages.0.blocks.0.attention",
        "stages.0.blocks.1.mlp": "stages.0.blocks.0.mlp",
    },
}


def uniform(family: str, **overrides) -> BiMaskConfig:
    """A search over awkward candidates whose layers choose together."""
    return search_config(family, uniform_across_layers=True, **overrides)


@both_families
def test_layers_of_a_kind_and_size_share_one_choice(family):
    supernet = tiny_supernet(family=family, uniform_across_layers=True)
    assert {space.name: space.tied_to for space in supernet.space if space.tied_to} == TIED[family]
    assert SearchSpace.from_json(supernet.space.to_json()) == supernet.space
    alone = tiny_supernet(family=family)
    fewer = sum(alone.named_masks[name].alpha.numel() for name in TIED[family])
    assert supernet.space.num_candidates == alone.space.num_candidates - fewer
    names = {name for name, _ in supernet.named_parameters() if name.endswith(".alpha")}
    assert (
        len(names) == len(supernet.decisions.groups) == len(supernet.bi_masks) - len(TIED[family])
    )
    for name, leader in TIED[family].items():
        assert supernet.named_masks[name].alpha is supernet.named_masks[leader].alpha


@both_families
@pytest.mark.parametrize("seed", range(5))
def test_sizes_are_equal_units_are_not_and_the_budget_holds(family, seed):
    target = 0.3 + 0.12 * seed
    supernet = install_bi_masks(tiny_model(family), uniform(family, target_macs=target))
    randomize_masks_(supernet, seed)
    if seed % 2:
        supernet.decisions.retire_candidates()
        shrink_(supernet)
    subnet = read_subnet(supernet)
    for name, leader in TIED[family].items():
        assert subnet.size(name) == subnet.size(leader)
        full = supernet.dense_sizes[name] in (subnet.size(name), (subnet.size(name),))
        assert full or subnet.kept[name] != subnet.kept[leader]
    assert (
        count_macs(compress(supernet)) == supernet.decisions.best_choice().cost <= supernet.target
    )


@both_families
def test_the_choice_is_the_best_of_all_common_ones(family):
    """Every combination of common sizes is scored and counted by other means."""
    config = uniform(
        family, target_macs=0.5, head_candidates=[2, 3, 4, 5] if family == "vit" else [2, 4]
    )
    supernet = install_bi_masks(tiny_model(family), config)
    randomize_masks_(supernet, seed=3)
    best = supernet.decisions.best_choice()

    def scores(mask):
        return search_scores(mask, supernet.decisions.terms, supernet.dense_sizes)

    alone = {mask.name: scored_candidates([[mask]], scores) for mask in supernet.bi_masks}
    worth: dict[str, dict] = {}
    for name, leader in supernet.decisions.leaders.items():
        for option in alone[name][name]:
            scores = worth.setdefault(leader, {})
            scores[option.size] = scores.get(option.size, 0.0) + option.score
    generator, seen, dense = torch.Generator().manual_seed(0), 0, tiny_model(family).config
    subnet = read_subnet(supernet)
    for _ in range(3000):
        picks = {
            n: list(r)[int(torch.randint(len(r), (1,), generator=generator))]
            for n, r in worth.items()
        }
        sizes = {name: picks[leader] for name, leader in supernet.decisions.leaders.items()}
        cost = count_macs(dense, _first_units(subnet, sizes))
        if 0.98 * supernet.target <= cost <= supernet.target:
            seen += 1
            assert sum(worth[name][size] for name, size in picks.items()) <= best.score + 1e-4
    assert seen > 5


def _first_units(subnet, sizes):
    """The subnet with the first units of these submodules."""
    kept = {
        n: {h: tuple(range(s[1])) for h in range(s[0])} if len(s) == 2 else tuple(range(s[0]))
        for n, s in sizes.items()
    }
    return type(subnet)(subnet.kept | kept)


@both_families
def test_masked_equals_sliced(family):
    supernet = tiny_supernet(family=family, dtype=torch.float64, uniform_across_layers=True)
    settle_randomly_(supernet, seed=1)
    images = tiny_images(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            supernet.fold()(images).logits, supernet(images).logits, rtol=0, atol=1e-10
        )


@both_families
def test_the_tied_learn_one_alpha_and_their_own_importance(family):
    supernet = tiny_supernet(family=family, uniform_across_layers=True)
    (supernet(tiny_images()).logits.square().sum() + supernet.one_hot_loss()).backward()
    for mask in supernet.bi_masks:
        for parameter in (mask.alpha, mask.importance_logits):
            assert parameter.grad.abs().sum() > 0, mask.name


def test_alpha_is_fitted_to_the_mean_importance_of_the_tied():
    supernet = tiny_supernet(uniform_across_layers=True)
    leader, follower = (supernet.named_masks[f"layers.{layer}.mlp"] for layer in (0, 1))
    supernet.decisions.fit_alpha_()
    together = leader.alpha.clone()
    leader.fit_alpha_(curve=(leader.importance_by_rank() + follower.importance_by_rank()) / 2)
    assert torch.equal(leader.alpha, together)
    leader.fit_alpha_()
    assert not torch.allclose(leader.alpha, together)


@both_families
@pytest.mark.parametrize("prune_during_search", [True, False])
def test_a_search_ends_uniform_within_its_budget(tmp_path, family, prune_during_search):
    trainer = searcher(
        tmp_path,
        uniform(family, target_macs=0.6, prune_during_search=prune_during_search),
        family=family,
    )
    trainer.train()
    small = compress(trainer.supernet)
    assert count_macs(small) <= trainer.supernet.target
    for name, leader in TIED[family].items():
        assert read_subnet(trainer.supernet).size(name) == read_subnet(trainer.supernet).size(
            leader
        )
    assert trainer.supernet.decisions.is_settled
    assert isinstance(trainer.supernet.named_masks[next(iter(TIED[family]))], TiedBiMask)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", pytest.param("swin", marks=pytest.mark.thorough)])
def test_a_compiled_search_is_the_eager_one(tmp_path, family):
    settings = {"config": uniform(family, target_macs=0.6), "family": family, "max_steps": 20}
    eager = searcher(tmp_path / "eager", **settings)
    eager.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = searcher(
        tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **settings
    )
    compiled.train()
    assert_equal_states(eager.supernet.state_dict(), compiled.supernet.state_dict())
    assert counters["graph_break"] == {}
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 16, 19])
def test_an_interrupted_search_ends_like_the_straight_one(tmp_path, stop):
    config = uniform("vit", target_macs=0.6)
    straight = searcher(tmp_path / "straight", config)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop
            return control

    settings = {"config": config, "save_strategy": "steps", "save_steps": stop}
    searcher(tmp_path / "cut", callbacks=[Stop()], **settings).train()
    resumed = searcher(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert_equal_states(resumed.supernet.state_dict(), straight.supernet.state_dict())


def test_the_result_is_a_stock_checkpoint_of_its_own_size(tmp_path):
    trainer = searcher(tmp_path / "run", uniform("vit", target_macs=0.5))
    trainer.train()
    small = compress(trainer.supernet).eval()
    assert small.config.head_dim_per_layer[0] < 8, (
        "narrower heads than the dense model's, whose scale they keep"
    )
    pad_to_stock(small).save_pretrained(tmp_path / "stock")
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "stock")
    assert type(stock) is ViTForImageClassification
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "vit"
    assert count_params(stock) == count_params(small)
    assert count_macs(stock) == count_macs(small)
    with torch.no_grad():
        torch.testing.assert_close(
            stock(tiny_images()).logits, small(tiny_images()).logits, rtol=0, atol=1e-5
        )


def _space(name: str, tied_to: str | None = None, units: int = 8) -> SubmoduleSpace:
    return SubmoduleSpace(name, "mlp", num_units=units, candidate_sizes=(4, units), tied_to=tied_to)


@pytest.mark.parametrize(
    "spaces",
    [
        [_space("a", tied_to="b"), _space("b")],
        [_space("a"), _space("b", tied_to="a", units=9)],
        [_space("a"), _space("b", tied_to="a"), _space("c", tied_to="b")],
        [_space("a", tied_to="a")],
    ],
    ids=["later", "other size", "chain", "itself"],
)
def test_ties_that_cannot_be_are_refused(spaces):
    with pytest.raises(ValueError, match="is tied to"):
        SearchSpace(tuple(spaces))
