"""A search whose choice is made before its first step, as `ofb-hf compress` makes it."""

import copy
import json

import pytest
import torch
from factories import SEARCHES, search_config, tiny_model
from runs import arguments, rows

from ofb_hf import OFBTrainer, compress_frozen, count_macs
from ofb_hf.families.registry import describe
from ofb_hf.search.rewriting import images_for_basis
from ofb_hf.search.supernet import install_bi_masks

SAVES = {"save_strategy": "steps", "save_steps": 1}
FAMILIES = pytest.mark.parametrize("family", ["vit", "swin"])


def first(family="vit", **fields):
    return search_config(family, preset="default", **{"target_macs": 0.6} | fields)


def search(folder, config, family="vit", model=None, data=None, **changes):
    return OFBTrainer(
        model if model is not None else tiny_model(family).train(),
        arguments(folder, **changes),
        config,
        train_dataset=data or rows(),
        eval_dataset=rows(8, seed=5),
    )


def begun(trainer):
    """The network of a search when its first step begins."""
    seen = []
    step = trainer.begin_search_step

    def look():
        if not seen:
            seen.append(copy.deepcopy(trainer.supernet.model))
        step()

    trainer.begin_search_step = look
    trainer.train()
    return seen[0].eval()


@FAMILIES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"search_depth": True},
        {"uniform_across_layers": True},
        {"search_mlp": False},
        {"basis": "heads", "search_embedding": False},
        {"basis": "given", "search_embedding": False},
        {"target_macs": None, "target_params": 0.7},
    ],
    ids=str,
)
def test_a_search_begins_with_what_compress_gives(tmp_path, family, fields):
    config = first(family, **fields)
    model = tiny_model(family).eval()
    trainer = search(tmp_path, config, family, model, max_steps=1)
    found = begun(trainer)
    assert trainer.supernet.is_folded

    images = list(images_for_basis(rows(), trainer.args))
    settings = {name: value for name, value in config.to_dict().items() if value is not None}
    for name in ("preset", "importance_source", "settle_at"):
        settings.pop(name)
    wanted = compress_frozen(model, images, seed=trainer.args.seed, **settings)
    assert describe(found.config).sizes == describe(wanted.model.config).sizes
    pixels = images[0]
    with torch.no_grad():
        given, expected = found(pixels).logits, wanted.model(pixels).logits
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)
    assert trainer.read_subnet().kept == wanted.subnet.kept
    small = trainer.compress()
    assert count_macs(small) == count_macs(found)


def test_tokens_are_chosen_with_widths(tmp_path):
    config = first(search_tokens=True, target_macs=0.5)
    trainer = search(tmp_path, config, max_steps=2)
    trainer.train()
    small = trainer.compress()
    dense = tiny_model("vit")
    assert count_macs(small) <= 0.5 * count_macs(dense)
    assert small.config.token_schedule == trainer.read_subnet().token_schedule


@FAMILIES
def test_a_resumed_search_equals_one_that_was_not_interrupted(tmp_path, family):
    whole = search(tmp_path / "a", first(family), family, max_steps=4, **SAVES | {"save_steps": 2})
    whole.train()
    resumed = search(tmp_path / "b", first(family), family, max_steps=4)

    def never(*args, **kwargs):
        raise AssertionError("chosen twice")

    resumed.settle_first = never
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = whole.compress().state_dict(), resumed.compress().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_average_begins_with_the_fitted_weights(tmp_path):
    trainer = search(tmp_path, first(), max_steps=1, ema_decay=0.999, learning_rate=0.0)
    found = begun(trainer)
    for name, tensor in trainer.compress().state_dict().items():
        torch.testing.assert_close(tensor, found.state_dict()[name], msg=name)


def test_patches_are_hidden_to_the_end_where_that_is_asked_for(tmp_path):
    config = first(pmim=True, pmim_until_settled=False)
    trainer = search(tmp_path, config, max_steps=3, logging_steps=1)
    trainer.train()
    losses = [row["pmim"] for row in trainer.state.log_history if "pmim" in row]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)


def test_nothing_is_fitted_where_that_is_not_wanted(tmp_path):
    fitted = begun(search(tmp_path / "a", first(), max_steps=1))
    cut = begun(search(tmp_path / "b", first(compensate=False), max_steps=1))
    assert describe(fitted.config).sizes == describe(cut.config).sizes
    pairs = zip(fitted.parameters(), cut.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_a_space_that_no_curve_covers_is_refused(tmp_path):
    """Residual widths are cut in a rotated basis only."""
    config = SEARCHES["swin"](search_attention=False, search_mlp=False, basis="given")
    with pytest.raises(ValueError, match=r"error curves can cut none of stages\.0\.width"):
        search(tmp_path, config, "swin")
    config = SEARCHES["swin"](embedding_candidates=[10, 20, 40], basis="heads")
    with pytest.raises(ValueError, match=r"embedding_candidates is \[10, 20, 40\], but in basis"):
        search(tmp_path, config, "swin")


def test_an_unreachable_budget_is_refused_before_any_image_is_read(tmp_path):
    class Unread:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise AssertionError("read")

    with pytest.raises(ValueError, match="below the smallest subnet"):
        search(tmp_path, first(target_macs=0.001), data=Unread())


def test_a_supernet_of_this_kind_needs_a_rewritten_network():
    with pytest.raises(ValueError, match="basis is 'equivalent', but the model is not"):
        install_bi_masks(tiny_model("vit"), first())


def test_the_stored_config_says_how_it_was_chosen(tmp_path):
    trainer = search(tmp_path, first(), max_steps=2, **SAVES)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-2" / "bi_mask_config.json").read_text())
    assert saved["settle_at"] == 0
    assert saved["importance_source"] == "error_curves"
