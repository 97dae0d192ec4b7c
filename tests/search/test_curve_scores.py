"""A search that takes its importance from error curves."""

import pytest
import torch
from factories import search_config, tiny_images, tiny_model, tiny_vit
from invariants import assert_equal_states
from runs import searcher
from transformers import TrainerCallback

from ofb_hf import count_macs, install_bi_masks
from ofb_hf.pruning.equivalent_basis import equivalent_basis
from ofb_hf.search.curve_scores import score_by_error_curves_

CURVES = {"basis": "equivalent", "importance_source": "error_curves"}


def supernet_of(model):
    images = tiny_images(32).split(8)
    rewritten = equivalent_basis(model, images)
    supernet = install_bi_masks(rewritten, search_config(target_macs=0.6, **CURVES))
    with torch.no_grad():  # as after a step of a search
        score_by_error_curves_(supernet, images, seed=0)
    return supernet


def test_units_that_do_nothing_are_worth_nothing():
    model = tiny_vit()
    with torch.no_grad():
        model.get_submodule("vit.layers.1.mlp").fc2.weight[:, 8:] = 0.0
    masks = {mask.name: mask for mask in supernet_of(model).bi_masks}
    mask = masks["layers.1.mlp"]
    scores = mask.first_order
    # As many as can be removed.
    removable = len(scores) - int(mask.candidate_axes[0].min())
    assert int((scores < 1e-3 * scores.max()).sum()) == removable
    assert (scores[:8] == scores.max()).all()


def test_first_channels_are_worth_most():
    for mask in supernet_of(tiny_vit()).bi_masks:
        if mask.first_order.dim() == 2:
            assert (mask.first_order.diff(dim=1) <= 0).all(), mask.name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "others"), [("vit", {}), ("swin", {"search_embedding": False})])
def test_a_search_decides_by_error_curves(tmp_path, family, others):
    model = tiny_model(family)
    config = search_config(family, target_macs=0.6, **CURVES, **others)
    trainer = searcher(tmp_path / "one", config, model, family=family)
    trainer.train()
    assert count_macs(trainer.compress()) <= 0.6 * count_macs(model)
    other = search_config(family, target_macs=0.6, basis="equivalent", **others)
    by_gradients = searcher(tmp_path / "two", other, model, family=family)
    by_gradients.train()
    pairs = zip(trainer.supernet.bi_masks, by_gradients.supernet.bi_masks, strict=True)
    assert any(not torch.equal(one.first_order, two.first_order) for one, two in pairs)


@pytest.mark.slow
def test_a_search_that_is_resumed_before_the_curves_are_measured_is_the_same(tmp_path):
    config = search_config(target_macs=0.6, **CURVES)
    straight = searcher(tmp_path / "straight", config)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1
            return control

    settings = {"save_strategy": "steps", "save_steps": 1}
    searcher(tmp_path / "cut", config, callbacks=[Stop()], **settings).train()
    resumed = searcher(tmp_path / "cut", config, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_states(straight.compress().state_dict(), resumed.compress().state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_source": "curves"}, "allowed are 'gradients' and 'error_curves'"),
        ({"importance_source": "error_curves"}, "basis 'given'.*Give basis=\"equivalent\""),
        ({**CURVES, "search_tokens": True}, "tokens are ranked by gradients"),
        ({**CURVES, "importance_hold": 0.0, "importance_learning_rate": 0.1}, "importance_hold"),
    ],
)
def test_what_cannot_be_served_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        search_config(target_macs=0.6, **settings)


def test_a_width_without_a_curve_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match=r"stages\.0.* has no error curve"):
        searcher(tmp_path, search_config("swin", target_macs=0.6, **CURVES), family="swin")
