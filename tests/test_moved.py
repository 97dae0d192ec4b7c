"""Import paths of version 0.1 give the objects that are in the new places, with a warning."""

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

from ofb_hf._moved import MOVED

# Old module -> the public names that it defined in version 0.1.
PUBLIC_NAMES = json.loads(
    (Path(__file__).parent / "golden" / "public_names_0_1.json").read_text(encoding="utf-8")
)
# Names that have another name now, or none, on purpose: old module and name -> the new ones, None
# if nothing has taken the place of the name.
RENAMED = {
    "architectures.BLOCK_HALVES": None,
    "architectures.CLASSIFIERS": None,
    "architectures.VIT_LAYERS": "families.vit.LAYERS",
    "architectures.vit_layer_parts": "families.token_reduction.layer_parts",
    "architectures.vit_parts": "families.token_reduction.schedule_parts",
    "architectures.vit_query_parameters": "families.vit.query_parameters",
    "architectures.with_vit_layers": "families.vit.with_layers",
    "candidates.candidate_options": "choice.scores.scored_candidates",
    "candidates.first_order_options": "choice.scores.first_order_candidates",
    "choices.Choices": "search.decisions.Decisions",
    "losses.budget_loss": None,
    "network.hub_refusals_in_words": "data.access.explained_hub_refusals",
    "plots.plot_family": "pictures.plots.plot_accuracy_over_cost",
    "schedule.budget_share": None,
    "searched_tokens.ROUNDS": None,
    "settlement.Option": "choice.problem.Candidate",
    "settlement.RELAXATION_STEPS": "choice.relaxation.STEPS",
    "settlement.Settlement": "choice.problem.Choice",
    "settlement.settle": "choice.knapsack.best_choice",
    "staging.is_ours": "release.folder.is_published_file",
    "token_choice.best_in_family": "choice.schedule_candidates.best_schedule",
    "token_choice.schedule_family": "choice.schedule_candidates.candidate_schedules",
    "token_choice.spread_over_family": "choice.schedule_candidates.spread_choices",
    "token_measure.nearest_settlement": "search.trial_cuts.nearest_choice",
    "token_pictures.GREY": "pictures.token_maps.DIMMED",
    "unit_groups.block_params": "families.blocks.Block",
    "workflow.family.run": "workflow.several_budgets.run_several_budgets",
    "workflow.tokens.run": "workflow.search_tokens.run_search_tokens",
    "workflow.tokens.subnet_of": "workflow.inputs.load_subnet",
}


def names_that_stay(old: str) -> list[str]:
    """Return the public names of an old module that were not renamed."""
    return [name for name in PUBLIC_NAMES[old] if f"{old}.{name}" not in RENAMED]


def homes_of(old: str) -> list:
    """Return the modules in which the names of an old one are now."""
    return [importlib.import_module(f"ofb_hf.{home}") for home in MOVED[old]]


def test_every_moved_module_is_on_record():
    assert set(PUBLIC_NAMES) == {*MOVED, "tokens"}
    assert sum(map(len, PUBLIC_NAMES.values())) > 300


@pytest.mark.parametrize("old", MOVED)
def test_the_old_path_warns_and_names_the_new_one(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"ofb_hf.{old}", raising=False)
    new = rf"ofb_hf\.{old} moved to ofb_hf\.{MOVED[old][0]};"
    with pytest.warns(DeprecationWarning, match=new):
        importlib.import_module(f"ofb_hf.{old}")


@pytest.mark.parametrize("old", MOVED)
def test_the_old_path_gives_the_objects_of_the_new_one(old):
    module = importlib.import_module(f"ofb_hf.{old}")
    for name in names_that_stay(old):
        value = getattr(module, name, None)
        assert value is not None, f"{old}.{name} is gone; was it renamed on purpose?"
        assert any(getattr(home, name, None) is value for home in homes_of(old))
        if inspect.isclass(value) or inspect.isfunction(value):
            # where it is defined, not a second object of the same name
            home = importlib.import_module(value.__module__)
            assert getattr(home, name) is value
            assert home.__name__.startswith("ofb_hf.")


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_names_are_found_under_the_new_one(old):
    path, _, name = old.rpartition(".")
    assert name in PUBLIC_NAMES[path]
    module = importlib.import_module(f"ofb_hf.{path}")
    with pytest.raises(AttributeError, match=f"moved to .*{name}"):
        getattr(module, name)
    new = RENAMED[old]
    if new is not None:
        home, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(f"ofb_hf.{home}"), name)


def test_names_are_imported_from_old_paths():
    """What code of version 0.1 does, as Python does it."""
    from ofb_hf.bi_mask import BiMask
    from ofb_hf.export import export_onnx
    from ofb_hf.token_pictures import draw_tokens

    import ofb_hf.masks.bi_mask
    import ofb_hf.pictures.token_maps
    import ofb_hf.release.export

    assert BiMask is ofb_hf.masks.bi_mask.BiMask
    assert draw_tokens is ofb_hf.pictures.token_maps.draw_tokens
    assert export_onnx is ofb_hf.release.export.export_onnx


def test_tokens_is_a_package_with_all_names_that_the_module_had():
    tokens = importlib.import_module("ofb_hf.tokens")
    assert [name for name in PUBLIC_NAMES["tokens"] if not hasattr(tokens, name)] == []
    assert set(PUBLIC_NAMES["tokens"]) <= set(tokens.__all__)
    assert tokens.settle_schedule is tokens.rounded_schedule
