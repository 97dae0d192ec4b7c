"""Import paths of version 0.1 give the objects that are in the new places, with a warning."""

import importlib
import inspect
import json
import sys
from pathlib import Path

import pytest

from ofb_hf._moved import MOVED, RENAMED

# Old module -> the public names that it defined in version 0.1.
PUBLIC_NAMES = json.loads(
    (Path(__file__).parent / "golden" / "public_names_0_1.json").read_text(encoding="utf-8")
)


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
def test_errors_name_what_renamed_names_are_called_now(old):
    path, _, name = old.rpartition(".")
    if path in PUBLIC_NAMES:
        assert name in PUBLIC_NAMES[path]
    module = importlib.import_module(f"ofb_hf.{path}")
    new = RENAMED[old]
    explanation = rf"^ofb_hf\.{old} has been removed, and nothing"
    if new is not None:
        explanation = rf"^ofb_hf\.{old} is now ofb_hf\.{new};"
        found = importlib.import_module("ofb_hf")
        for part in new.split("."):
            found = getattr(found, part)
    with pytest.raises(AttributeError, match=explanation):
        getattr(module, name)
    with pytest.raises(ImportError, match=explanation):
        exec(f"from ofb_hf.{path} import {name}")
    assert not hasattr(module, name)
    # and only those
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        exec(f"from ofb_hf.{path} import no_such_name")


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
