"""Spaces and subnets are plain data: they survive JSON, and what cannot be is refused by name and
value."""

import dataclasses
import json
import re

import pytest
from factories import (
    AWKWARD,
    FAMILIES,
    SEARCHES,
    grid_spaces,
    plain_spaces,
    search_config,
    swin_config,
    tiny_model,
    vit_config,
)
from hypothesis import given
from hypothesis import strategies as st
from invariants import ours
from transformers import AutoModelForImageClassification, SwinConfig

from ofb_hf import SearchSpace, SubmoduleSpace, SubnetSpec, SwinBiMaskConfig, ViTBiMaskConfig
from ofb_hf.families.registry import describe
from ofb_hf.families.subnet import BASES, all_units
from ofb_hf.pruning.surgery import slice_model
from ofb_hf.space.presets import PRESETS

GRID = {"num_heads": 4, "head_dim": 6, "head_candidates": (2, 4), "dim_candidates": (3, 6)}


def bi_masks(**fields):
    """A search in which bi-masks decide."""
    return ViTBiMaskConfig(**{"preset": "bi_mask"} | fields)


@st.composite
def subnets(draw: st.DrawFn) -> SubnetSpec:
    """Any kept units of an embedding, an attention and an MLP."""
    indices = st.sets(st.integers(0, 50), max_size=8).map(lambda s: tuple(sorted(s)))
    heads, channels = draw(indices), draw(st.integers(1, 6))
    rows = st.sets(st.integers(0, 30), min_size=channels, max_size=channels).map(
        lambda s: tuple(sorted(s))
    )
    attention = {head: draw(rows) for head in heads}
    return SubnetSpec(
        {
            "embeddings": draw(indices),
            "layers.0.attention": attention,
            "layers.0.mlp": draw(indices),
        },
        basis=draw(st.sampled_from(BASES)),
    )


@given(plain_spaces(), grid_spaces())
def test_a_space_survives_json(plain, grid):
    space = SearchSpace((plain, grid))
    again = SearchSpace.from_json(space.to_json())
    assert again == space
    assert isinstance(again[plain.name].candidate_sizes, tuple)
    assert again[grid.name].unit_shape == (grid.num_heads, grid.head_dim)
    json.loads(space.to_json())


@given(subnets())
def test_a_subnet_survives_json(subnet):
    again = SubnetSpec.from_json(subnet.to_json())
    assert again == subnet
    assert again.kept == subnet.kept
    assert all(isinstance(head, int) for head in again.kept["layers.0.attention"])
    assert SubnetSpec.from_json(json.dumps(json.loads(subnet.to_json()))) == subnet


@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_space_survives_json(family):
    space = search_config(family).search_space(tiny_model(family).config)
    assert SearchSpace.from_json(space.to_json()) == space


def test_sizes_of_a_space():
    plain = SubmoduleSpace("m", "mlp", 9, (2, 5, 9))
    grid = SubmoduleSpace("a", "attention", **GRID)
    space = SearchSpace((plain, grid))
    assert (plain.is_grid, plain.unit_shape, plain.candidate_shape) == (False, (9,), (3,))
    assert (grid.is_grid, grid.num_units, grid.unit_shape, grid.candidate_shape) == (
        True,
        24,
        (4, 6),
        (2, 2),
    )
    assert (len(space), space.num_units, space.num_candidates) == (2, 33, 7)
    assert [submodule.name for submodule in space] == ["m", "a"]
    assert space["a"] is grid
    with pytest.raises(KeyError, match="'b'"):
        space["b"]


def test_a_space_in_which_nothing_is_a_candidate():
    plain = SubmoduleSpace("m", "mlp", 9, (0, 2, 9))
    grid = SubmoduleSpace(
        "a", "attention", **GRID | {"head_candidates": (0, 2, 4), "dim_candidates": (0, 3, 6)}
    )
    assert (
        plain.may_vanish,
        grid.may_vanish,
        SubmoduleSpace("a", "attention", **GRID).may_vanish,
    ) == (
        True,
        True,
        False,
    )
    assert plain.sizes == [(0,), (2,), (9,)]
    assert grid.sizes == [(0, 0), (2, 3), (2, 6), (4, 3), (4, 6)]
    assert SearchSpace((plain, grid)).num_candidates == 8


@pytest.mark.parametrize(
    ("depth", "kinds"),
    [(True, {"attention", "mlp"}), ("attention", {"attention"}), ("mlp", {"mlp"})],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_depth_adds_nothing_to_the_candidates_of_a_kind(family, depth, kinds):
    config, model = search_config(family, search_depth=depth), tiny_model(family)
    with_depth, without = (c.search_space(model.config) for c in (config, search_config(family)))
    assert {space.kind for space in with_depth if space.may_vanish} == kinds
    for space, other in zip(with_depth, without, strict=True):
        nothing = [tuple(0 for _ in space.unit_shape)] if space.kind in kinds else []
        assert space.sizes == nothing + other.sizes
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"search_depth": "heads"},
            "search_depth is 'heads'; allowed are True, False, 'attention' and 'mlp'",
        ),
        (
            {"search_depth": "mlp", "search_mlp": False},
            "search_depth is 'mlp', .* search_mlp False: nothing",
        ),
        ({"search_depth": True, "uniform_across_layers": True}, "all be left out together"),
    ],
)
def test_impossible_depths_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTBiMaskConfig(**fields)


def test_zero_among_given_candidates_is_refused_with_the_way_to_add_it():
    with pytest.raises(ValueError, match=r"mlp_candidates is \[0, 72\]; .*search_depth=True"):
        ViTBiMaskConfig(mlp_candidates=[0, 72]).search_space(vit_config())


@pytest.mark.parametrize("make", [ViTBiMaskConfig, SwinBiMaskConfig, vit_config, swin_config])
def test_unknown_bases_are_refused_by_name(make):
    """In the config of a search and in those of our models."""
    if make in (vit_config, swin_config):
        family = "vit" if make is vit_config else "swin"
        make = type(ours(family).config)
    with pytest.raises(
        ValueError, match=r"basis is 'fourier'; allowed are .*'heads', 'equivalent'"
    ):
        make(basis="fourier")


def test_a_file_of_an_earlier_version_searches_the_network_as_it_is(tmp_path):
    values = bi_masks().to_dict()
    assert values.pop("basis") == "given"
    assert values.pop("importance_source") == "gradients"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ViTBiMaskConfig.load(tmp_path / "config.json") == bi_masks()


def test_a_subnet_names_its_basis():
    subnet = SubnetSpec({"embeddings": (1, 5)}, basis="heads")
    assert json.loads(subnet.to_json())["basis"] == "heads"
    # Files of networks that were cut as they were given stay as they are.
    assert "basis" not in SubnetSpec({"embeddings": (1, 5)}).to_json()
    with pytest.raises(ValueError, match=r"basis is 'fourier'; allowed are 'given', 'heads', "):
        SubnetSpec.from_json('{"kept": {}, "basis": "fourier"}')


def test_units_are_counted_in_the_basis_of_the_first_cut():
    parent = SubnetSpec({"embeddings": (1, 4, 6)}, basis="equivalent")
    child = SubnetSpec({"embeddings": (0, 2)})
    assert child.within(parent) == SubnetSpec({"embeddings": (1, 6)}, basis="equivalent")
    for basis in ("given", "equivalent"):
        with pytest.raises(ValueError, match=r"'heads', which was rewritten after the cut"):
            dataclasses.replace(child, basis="heads").within(
                dataclasses.replace(parent, basis=basis)
            )


def test_a_model_keeps_its_basis_through_cuts_and_files(tmp_path):
    for family in FAMILIES:
        model = ours(family)
        assert "basis" not in json.loads(model.config.to_json_string())
        model.config.basis = "heads"
        units = {name: all_units(shape) for name, shape in describe(model.config).sizes.items()}
        small = slice_model(model, SubnetSpec(units, basis="heads"))
        small.save_pretrained(tmp_path / family)
        assert (
            AutoModelForImageClassification.from_pretrained(tmp_path / family).config.basis
            == small.config.basis
            == "heads"
        )
        with pytest.raises(ValueError, match=r"basis 'equivalent', but .* basis 'heads'"):
            slice_model(model, SubnetSpec(units, basis="equivalent"))


def test_sizes_of_a_subnet():
    subnet = SubnetSpec({"embeddings": (1, 5, 6), "a": {0: (2, 3), 4: (0, 9)}})
    assert subnet.size("embeddings") == 3
    assert subnet.size("a") == (2, 2)
    assert subnet.sizes == {"embeddings": 3, "a": (2, 2)}


def test_a_submodule_may_be_left_out():
    subnet = SubnetSpec({"embeddings": (1,), "layers.0.attention": {}, "layers.0.mlp": ()})
    assert subnet.sizes == {"embeddings": 1, "layers.0.attention": (0, 0), "layers.0.mlp": 0}
    assert SubnetSpec.from_json(subnet.to_json()) == subnet


def test_the_residual_stream_may_not_be_left_out():
    with pytest.raises(ValueError, match=r"kept\['embeddings'\] is empty; .*at least one"):
        slice_model(ours("vit"), SubnetSpec({"embeddings": ()}))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_units": 9, "candidate_sizes": (2, 5)}, ["'s'", "candidate_sizes", "5", "9"]),
        ({"num_units": 9, "candidate_sizes": (5, 2, 9)}, ["'s'", "candidate_sizes", "[5, 2, 9]"]),
        ({"num_units": 9, "candidate_sizes": (2, 2, 9)}, ["'s'", "candidate_sizes", "[2, 2, 9]"]),
        ({"num_units": 9, "candidate_sizes": (-1, 9)}, ["'s'", "candidate_sizes", "[-1, 9]"]),
        (
            {"num_units": 9, "candidate_sizes": (0, 9), "kind": "embedding"},
            ["'s'", "candidate_sizes", "[0, 9]"],
        ),
        (
            GRID | {"head_candidates": (0, 4)},
            ["'s'", "head_candidates=(0, 4)", "dim_candidates=(3, 6)"],
        ),
        ({"num_units": 9, "candidate_sizes": ()}, ["'s'", "candidate_sizes", "[]"]),
        ({"num_units": 9, "candidate_sizes": (2, 12)}, ["'s'", "candidate_sizes", "12", "9"]),
        ({}, ["'s'", "num_units", "num_heads"]),
        (GRID | {"head_dim": None}, ["'s'", "head_dim"]),
        (GRID | {"candidate_sizes": (2, 24)}, ["'s'", "candidate_sizes"]),
        (GRID | {"head_candidates": (2, 3)}, ["'s'", "head_candidates", "3", "4"]),
        (GRID | {"dim_candidates": (6, 3)}, ["'s'", "dim_candidates", "[6, 3]"]),
        (GRID | {"dim_candidates": ()}, ["'s'", "dim_candidates", "[]"]),
    ],
)
def test_impossible_spaces_are_refused_by_name_and_value(fields, names):
    with pytest.raises(ValueError, match=r"expected|must|takes|give") as error:
        SubmoduleSpace(**({"name": "s", "kind": "mlp"} | fields))
    for name in names:
        assert name in str(error.value)


def test_two_submodules_of_one_name_are_refused():
    one = SubmoduleSpace("m", "mlp", 9, (9,))
    with pytest.raises(ValueError, match=r"\['m', 'm'\]"):
        SearchSpace((one, one))


@pytest.mark.parametrize(
    ("kept", "names"),
    [
        ({"mlp": (3, 1)}, ["'mlp'", "[3, 1]"]),
        ({"mlp": (1, 1)}, ["'mlp'", "[1, 1]"]),
        ({"mlp": (-1, 2)}, ["'mlp'", "[-1, 2]"]),
        ({"a": {0: ()}}, ["'a'", "[]"]),
        ({"a": {1: (0,), 0: (1,)}}, ["'a'", "[1, 0]"]),
        ({"a": {0: (4, 2)}}, ["'a'", "[4, 2]"]),
        ({"a": {0: (0, 1), 2: (0,)}}, ["'a'", "[2, 1]"]),
    ],
)
def test_impossible_subnets_are_refused_by_name_and_value(kept, names):
    with pytest.raises(ValueError, match=r"expected|must") as error:
        SubnetSpec({"embeddings": (0, 1)} | kept)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "no json", '{"other": {}}', "3", '{"kept": 3}', '{"kept": {"a": 3}}']
)
def test_text_that_is_no_subnet_is_refused(text):
    with pytest.raises(ValueError, match="not a subnet"):
        SubnetSpec.from_json(text)


# ------------------------------------------------------------------------- from a config to a space


def test_awkward_candidates_reach_the_space():
    space = search_config().search_space(vit_config())
    given = AWKWARD["vit"]
    assert list(space["embeddings"].candidate_sizes) == given["embedding_candidates"]
    assert list(space["layers.1.attention"].head_candidates) == given["head_candidates"]
    assert list(space["layers.1.attention"].dim_candidates) == given["head_dim_candidates"]
    assert list(space["layers.1.mlp"].candidate_sizes) == given["mlp_candidates"]
    assert [s.name for s in space] == [
        "embeddings", "layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp",
    ]  # fmt: skip


def test_one_list_serves_stages_of_different_sizes():
    """Every stage takes the sizes up to its own: 20 and 40 channels, 2 and 4 heads, MLPs of 36 and
    72."""
    space = search_config("swin").search_space(swin_config())
    assert space["stages.0.width"].candidate_sizes == (7, 13, 20)
    assert space["stages.1.width"].candidate_sizes == (7, 13, 20, 31, 40)
    for block, heads, mlps in (
        ("stages.0.blocks.1", (1, 2), (11, 29, 36)),
        ("stages.1.blocks.0", (1, 2, 3, 4), (11, 29, 36, 50, 72)),
    ):
        assert space[f"{block}.attention"].head_candidates == heads
        assert space[f"{block}.attention"].dim_candidates == (3, 7, 10)
        assert space[f"{block}.mlp"].candidate_sizes == mlps
    assert [s.name for s in space] == [
        "stages.0.width", "stages.0.blocks.0.attention", "stages.0.blocks.0.mlp",
        "stages.0.blocks.1.attention", "stages.0.blocks.1.mlp",
        "stages.1.width", "stages.1.blocks.0.attention", "stages.1.blocks.0.mlp",
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["embedding", "attention", "mlp"])
def test_a_kind_that_is_not_searched_is_not_in_the_space(family, kind):
    space = SEARCHES[family](**{f"search_{kind}": False}).search_space(tiny_model(family).config)
    assert kind not in {submodule.kind for submodule in space}
    assert len({submodule.kind for submodule in space}) == 2


def test_default_candidates_of_swin_tiny():
    """Every stage and block, even steps up to the full size, as hardware likes them: widths from a
    quarter of it, MLPs from a sixteenth, where a trained network often has nothing to lose."""
    space = SwinBiMaskConfig(preset="bi_mask").search_space(SwinConfig())
    assert [submodule.name for submodule in space] == list(describe(SwinConfig()).sizes)
    assert [
        len([s for s in space if s.kind == kind]) for kind in ("embedding", "attention", "mlp")
    ] == [4, 12, 12]
    steps = {0: (8, 24), 1: (8, 48), 2: (16, 96), 3: (24, 192)}  # of the width and of the MLP
    for submodule in space:
        stage = int(submodule.name.split(".")[1])
        width, heads = 96 * 2**stage, 3 * 2**stage
        if submodule.kind == "attention":
            assert submodule.head_candidates == tuple(range(1, heads + 1))
            assert submodule.dim_candidates == (8, 16, 24, 32)
            continue
        full, step = (
            (width, steps[stage][0])
            if submodule.kind == "embedding"
            else (4 * width, steps[stage][1])
        )
        smallest = full // 4 if submodule.kind == "embedding" else step
        assert submodule.candidate_sizes == tuple(range(smallest, full + 1, step))
        assert submodule.candidate_sizes[-1] == full == submodule.num_units
        assert all(size % 8 == 0 for size in submodule.candidate_sizes)


@given(st.integers(1, 700), st.sampled_from([1, 8, 16]), st.sampled_from(list(PRESETS)))
def test_default_candidates_are_multiples_where_the_dense_size_allows(width, multiple, preset):
    config = ViTBiMaskConfig(preset=preset, multiple_of=multiple)
    space = config.search_space(
        vit_config(hidden_size=width, num_attention_heads=1, intermediate_size=width)
    )
    for name in ("embeddings", "layers.0.mlp"):
        sizes = space[name].candidate_sizes
        assert sizes[-1] == width
        smallest = {
            "default": (1 / 8, 1 / 16),
            "bi_mask": (1 / 4, 1 / 16),
            "paper": (1 / 2, 1 / 4),
        }[preset]
        assert sizes[0] >= int(width * smallest[name != "embeddings"])
        if width % multiple == 0:
            assert all(size % multiple == 0 for size in sizes)
        assert len(sizes) <= 50


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"preset": "theirs"}, ["preset", "'theirs'", "default", "paper"]),
        ({"target_macs": 0.5, "target_params": 0.5}, ["target_macs", "target_params", "0.5"]),
        ({"target_macs": 0.0}, ["target_macs", "0.0"]),
        ({"target_macs": -3}, ["target_macs", "-3"]),
        ({"target_params": float("nan")}, ["target_params", "nan"]),
        ({"target_macs": float("inf")}, ["target_macs", "inf"]),
        ({"target_macs": True}, ["target_macs", "True"]),
        ({"target_macs": "0.5"}, ["target_macs", "'0.5'"]),
        ({"keep_ratio_start": 1.5}, ["keep_ratio_start", "1.5"]),
        ({"importance_start": -0.1}, ["importance_start", "-0.1"]),
        ({"flops_weight": float("nan")}, ["flops_weight", "nan"]),
        ({"one_hot_weight": -1}, ["one_hot_weight", "-1"]),
        ({"multiple_of": 0}, ["multiple_of", "0"]),
        ({"retire_events": 0}, ["retire_events", "0"]),
        ({"alpha_init": "ones"}, ["alpha_init", "'ones'"]),
        ({"pmim_window": 46}, ["pmim_window", "46"]),
        ({"importance_hold": 0}, ["importance_hold", "importance_learning_rate", "0.05"]),
        (
            {"importance_hold": 0.3, "settle_at": 0.2},
            ["importance_hold", "0.3", "settle_at", "0.2"],
        ),
        (
            {"search_embedding": False, "search_attention": False, "search_mlp": False},
            ["search_embedding"],
        ),
    ],
)
def test_impossible_configs_are_refused_by_name_and_value(fields, names):
    with pytest.raises(ValueError, match=r"\.|;") as error:
        bi_masks(**fields)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (
            {"importance_source": "gradients"},
            ["settle_at is 0", '"error_curves"', 'preset="bi_mask"'],
        ),
        ({"preset": "paper", "settle_at": 0.0}, ["settle_at is 0", "'gradients'"]),
        ({"pmim": True}, ["pmim_until_settled=False", "bi_mask"]),
    ],
)
def test_a_choice_before_the_first_step_refuses_what_comes_later(fields, names):
    with pytest.raises(ValueError, match="settle_at") as error:
        ViTBiMaskConfig(**fields)
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flops_weight", 1.0),
        ("one_hot_weight", 0.4),
        ("retire_events", 3),
        ("prune_during_search", False),
        ("importance_hold", 0.1),
        ("alpha_init", "uniform"),
    ],
)
def test_settings_of_bi_masks_are_refused_where_none_decide(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*settle_at is 0.*preset='bi_mask'"):
        ViTBiMaskConfig(**{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"basis": "heads"},
        {"basis": "given"},
        {"search_tokens": True},
        {"search_depth": True},
        {"uniform_across_layers": True},
        {"compensate": False},
        {"pmim": True, "pmim_until_settled": False, "keep_ratio_end": 0.6},
    ],
    ids=str,
)
def test_a_choice_before_the_first_step_takes(fields):
    config = ViTBiMaskConfig(**fields)
    assert config.chooses_first
    assert ViTBiMaskConfig.from_dict(config.to_dict()) == config
    assert config.as_given().basis == "given"


def test_the_preset_of_version_0_1_is_accepted_by_its_name(tmp_path):
    assert ViTBiMaskConfig(preset="ours") == bi_masks()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(bi_masks().to_dict() | {"preset": "ours"}), encoding="utf-8")
    config = ViTBiMaskConfig.load(path)
    assert config == bi_masks()
    config.save(path)
    assert json.loads(path.read_text(encoding="utf-8"))["preset"] == "bi_mask"


def test_a_budget_without_weight_is_refused():
    with pytest.raises(ValueError, match=r"flops_weight is 0\.0; it must be positive"):
        ViTBiMaskConfig(flops_weight=0.0)


# What version 0.1 wrote in addition, by preset.
FIELDS_0_1 = {
    "ours": {
        "importance_from": "first_order",
        "dual_step": 0.2,
        "hold_learning_rate": 0.0,
        "budget_ramp": 0.0,
    },
    "paper": {
        "importance_from": "descent",
        "dual_step": 0.0,
        "hold_learning_rate": 1.0,
        "budget_ramp": 0.0,
    },
}


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_configs_of_version_0_1_can_be_read(preset, tmp_path):
    config = ViTBiMaskConfig(preset=preset, target_macs=0.4)
    path = tmp_path / "config.json"
    values = config.to_dict() | {"preset": preset} | FIELDS_0_1[preset]
    path.write_text(json.dumps(values), encoding="utf-8")
    assert ViTBiMaskConfig.load(path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance_from": "descent"}, "importance_from is 'descent', which version 0.2 removed"),
        ({"budget_ramp": 0.4}, "budget_ramp is 0.4, but version 0.2 removed this field"),
    ],
)
def test_a_removed_field_that_changed_a_search_is_refused(changes, message):
    values = bi_masks().to_dict() | FIELDS_0_1["ours"] | changes
    with pytest.raises(ValueError, match=message):
        ViTBiMaskConfig.from_dict(values)


@pytest.mark.parametrize("fields", [{}, {"settle_at": 0.2, "multiple_of": 4}], ids=str)
@pytest.mark.parametrize(("preset", "other"), [("bi_mask", "paper"), ("paper", "bi_mask")])
def test_with_preset_takes_what_was_not_set_from_the_other_preset(preset, other, fields):
    config = ViTBiMaskConfig(preset=preset, target_macs=0.4, **fields)
    assert config.with_preset(other) == ViTBiMaskConfig(preset=other, target_macs=0.4, **fields)
    assert config.with_preset(other).with_preset(preset) == config
    assert config.with_preset(other, retire_events=7).retire_events == 7
    if preset == "bi_mask":
        assert config.with_preset("paper").with_preset("ours") == config


@pytest.mark.parametrize("fields", [{}, {"settle_at": 0.2, "multiple_of": 4}], ids=str)
@pytest.mark.parametrize(("preset", "other"), [("bi_mask", "paper"), ("paper", "bi_mask")])
def test_replacing_the_preset_alone_is_refused_with_the_way_out(preset, other, fields):
    """It would keep the fields of the first preset under the name of the other one."""
    config = ViTBiMaskConfig(preset=preset, **fields)
    way_out = rf"preset is '{other}', but .* of preset '{preset}'.*config\.with_preset\('{other}'\)"
    with pytest.raises(ValueError, match=way_out):
        dataclasses.replace(config, preset=other)
    assert dataclasses.replace(config, preset=preset, retire_events=7).retire_events == 7


def test_all_idle_settings_are_named_at_once():
    with pytest.raises(ValueError, match="Neither would pmim_window, pmim_weight"):
        bi_masks(pmim=False, keep_ratio_end=0.6, pmim_window=3, pmim_weight=2.0)


@pytest.mark.parametrize(
    ("family", "fields", "names"),
    [
        (
            "vit",
            {"mlp_candidates": [32, 64]},
            ["mlp_candidates", "[32, 64]", "'layers.0.mlp'", "72"],
        ),
        ("vit", {"head_candidates": [5, 6]}, ["head_candidates", "[5, 6]", "5"]),
        (
            "swin",
            {"embedding_candidates": [13, 40]},
            ["embedding_candidates", "'stages.0.width'", "20"],
        ),
        (
            "swin",
            {"embedding_candidates": [40]},
            ["embedding_candidates", "[40]", "'stages.0.width'", "20"],
        ),
        (
            "swin",
            {"embedding_candidates": [13, 20]},
            ["embedding_candidates", "'stages.1.width'", "40"],
        ),
        (
            "swin",
            {"embedding_candidates": [20, 40, 41]},
            ["embedding_candidates", "[20, 40, 41]", "40"],
        ),
        (
            "swin",
            {"head_candidates": [1, 4]},
            ["head_candidates", "'stages.0.blocks.0.attention'", "2"],
        ),
        ("swin", {"head_candidates": [2, 4, 5]}, ["head_candidates", "[2, 4, 5]", "4"]),
        (
            "swin",
            {"head_dim_candidates": [5, 9]},
            ["head_dim_candidates", "'stages.0.blocks.0.attention'", "10"],
        ),
        ("swin", {"head_dim_candidates": [10, 12]}, ["head_dim_candidates", "[10, 12]", "10"]),
        ("swin", {"mlp_candidates": [50, 72]}, ["mlp_candidates", "'stages.0.blocks.0.mlp'", "36"]),
        ("swin", {"mlp_candidates": [36, 72, 144]}, ["mlp_candidates", "[36, 72, 144]", "72"]),
    ],
    ids=str,
)
def test_candidates_that_do_not_fit_the_model_are_refused(family, fields, names):
    """By the field they were given in: a list is for all submodules of its kind, and holds the full
    size of each."""
    with pytest.raises(ValueError, match="candidates is") as error:
        SEARCHES[family](**fields).search_space(tiny_model(family).config)
    for name in names:
        assert name in str(error.value)


def test_kinds_that_are_not_searched_have_no_candidates():
    config = SwinBiMaskConfig(search_mlp=False)
    assert "mlp" not in {submodule.kind for submodule in config.search_space(swin_config())}


LISTS = {
    "embedding_candidates": [20, 40],
    "head_dim_candidates": [4, 8],
    "mlp_candidates": [36, 72],
}
NO_BLOCKS = {"search_attention": False, "search_mlp": False}
# Settings that nothing would read, and what makes them so.
IDLE = [
    ("keep_ratio_start", 0.9, {"pmim": False}, "pmim is False"),
    ("keep_ratio_end", 0.9, {"pmim": False}, "pmim is False"),
    ("pmim_until_settled", False, {"pmim": False}, "pmim is False"),
    ("pmim_window", 31, {"pmim": False}, "pmim is False"),
    ("pmim_weight", 2.0, {"pmim": False}, "pmim is False"),
    ("pmim_max_ratio", 2.0, {"pmim": False}, "pmim is False"),
    ("embedding_candidates", [20, 40], {"search_embedding": False}, "search_embedding is False"),
    ("smallest_share", 0.7, {"search_embedding": False}, "search_embedding is False"),
    ("smallest_share", 0.7, {"embedding_candidates": [20, 40]}, "embedding_candidates lists"),
    ("head_candidates", [2, 5], {"search_attention": False}, "search_attention is False"),
    ("head_dim_candidates", [4, 8], {"search_attention": False}, "search_attention is False"),
    ("mlp_candidates", [36, 72], {"search_mlp": False}, "search_mlp is False"),
    ("multiple_of", 4, LISTS, "are listed"),
    ("multiple_of", 4, NO_BLOCKS | {"embedding_candidates": [20, 40]}, "are listed"),
    ("uniform_across_layers", True, NO_BLOCKS, "residual widths are never tied"),
    ("basis", "heads", {"search_attention": False}, "search_attention is False"),
    (
        "basis",
        "equivalent",
        {"search_attention": False, "search_embedding": False},
        "MLPs keep their basis",
    ),
    ("retire_threshold", 0.3, {"retire_begin": 0.15}, "retire_begin is 0.15 and settle_at 0.15"),
    ("retire_events", 10, {"retire_begin": 1.0}, "retire_begin is 1.0"),
    ("retire_events", 10, {"retire_threshold": 0.0}, "retire_threshold is 0"),
    ("retire_begin", 0.1, {"retire_threshold": 0.0}, "retire_threshold is 0"),
    ("importance_init_mean", 0.5, {}, "importance_init_std is 0 and normalize_importance True"),
    ("one_hot_weight", 0.4, {"one_hot_begin": 0.15}, "one_hot_begin is 0.15 and settle_at 0.15"),
    ("one_hot_end", 0.4, {"one_hot_begin": 0.3}, "one_hot_begin is 0.3"),
    ("one_hot_begin", 0.09, {"one_hot_weight": 0.0}, "one_hot_weight is 0"),
    ("one_hot_end", 0.4, {"one_hot_weight": 0.0}, "one_hot_weight is 0"),
    (
        "compensate",
        True,
        {"preset": "paper", "settle_at": 0.5, "prune_during_search": False},
        "prune_during_search is False",
    ),
    ("importance_penalty", 1.0, {}, "importance_learning_rate is 0"),
    ("architecture_weight_decay", 0.1, {"architecture_learning_rate": 0.0}, "moves alpha"),
    ("flops_weight", 1.0, {"architecture_learning_rate": 0.0}, "moves alpha"),
    ("one_hot_weight", 1.0, {"architecture_learning_rate": 0.0}, "moves alpha"),
    (
        "masks_follow_schedule",
        True,
        {"architecture_learning_rate": 0.0},
        "importance_learning_rate and architecture_learning_rate are 0",
    ),
]


@pytest.mark.parametrize(("name", "value", "others", "reason"), IDLE, ids=str)
def test_a_setting_without_effect_is_refused_with_an_explanation(name, value, others, reason):
    idle = rf"^{name} is {re.escape(str(value))}, but .*{re.escape(reason)}.*: it would have no"
    with pytest.raises(ValueError, match=idle):
        bi_masks(**others, **{name: value})


@pytest.mark.parametrize("others", [others for _, _, others, _ in IDLE], ids=str)
def test_values_of_the_preset_are_no_settings_without_effect(others, tmp_path):
    """What makes others idle may be given, and survives its file, which holds all fields."""
    config = bi_masks(**others)
    assert ViTBiMaskConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path / "config.json")
    assert ViTBiMaskConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    "fields",
    [
        {"compensate": False, "prune_during_search": False},  # what it asks for happens
        {"compensate": True, "preset": "paper", "prune_during_search": False},
        {"retire_begin": 1.0},
        {"retire_threshold": 0.0},
        {"importance_init_mean": 0.5, "importance_init_std": 0.2},
        {"importance_init_mean": 0.5, "normalize_importance": False},
        {"importance_init_mean": -3.0, "search_depth": True},
        {"importance_init_mean": 0.5, "importance_hold": 0.0, "importance_learning_rate": 0.001},
        {"one_hot_begin": 1.0},
        {"multiple_of": 4, "mlp_candidates": [36, 72]},
        {"importance_penalty": 1.0, "importance_learning_rate": 0.001},
        {"preset": "paper", "importance_learning_rate": 0.0, "importance_hold": 0.1},
    ],
    ids=str,
)
def test_settings_with_an_effect_are_accepted(fields):
    config = bi_masks(**fields)
    assert ViTBiMaskConfig.from_dict(config.to_dict()) == config


def test_a_model_of_another_family_is_refused():
    with pytest.raises(
        ValueError, match="SwinBiMaskConfig searches SwinConfig models, got a ViTConfig"
    ):
        SwinBiMaskConfig().search_space(vit_config())


def test_a_config_survives_its_file(tmp_path):
    config = search_config(preset="paper", target_params=0.3, flops_weight=7.0)
    config.save(tmp_path / "config.json")
    assert ViTBiMaskConfig.load(tmp_path / "config.json") == config
    with pytest.raises(ValueError, match="taget_macs"):
        ViTBiMaskConfig.from_dict({"taget_macs": 0.5})


@pytest.mark.parametrize(
    ("target", "cost"), [(0.5, 500), (1, 1000), (1.0, 1000), (0.3337, 333), (1.5, 1), (700, 700)]
)
def test_a_target_is_a_share_up_to_one_and_a_count_above(target, cost):
    assert ViTBiMaskConfig(target_macs=target).target(1000) == cost
    assert ViTBiMaskConfig(target_params=target).target(1000) == cost
