"""Latency is a cost as MACs are: exact, differentiable, met by the choice, kept in the config."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from factories import (
    FAMILIES,
    SEARCHES,
    invented_table,
    non_uniform_vit,
    scheduled_vit,
    search_config,
    tiny_model,
    tiny_vit,
)
from hypothesis import given
from hypothesis import strategies as st
from runs import QUICK

from ofb_hf import OFBViTForImageClassification, cli, compress, install_bi_masks
from ofb_hf.choice.knapsack import best_choice
from ofb_hf.choice.picks import ROUNDED
from ofb_hf.choice.problem import Candidate
from ofb_hf.cost.budget import UnreachableBudgetError
from ofb_hf.cost.counting import evaluate_terms
from ofb_hf.cost.latency import (
    PICOSECONDS,
    LatencyTable,
    count_latency,
    fit_coefficients,
    threads_text,
)
from ofb_hf.families.description import Term, quantities
from ofb_hf.families.registry import describe
from ofb_hf.space.configuration import default_config
from ofb_hf.training.history import read_history
from ofb_hf.workflow.inputs import load_for_counting
from ofb_hf.workflow.latency_table import measured_latency, sample_schedule, warn_if_elsewhere
from ofb_hf.workflow.timing import Timeline

TINY = ["--networks", "8", "--rounds", "1", "--disable_tqdm", "true", "--num_threads", "1"]
# A search with a budget in milliseconds of the demonstration, as short as can be.
DIGITS = [
    "--model_name_or_path",
    "digits_vit",
    "--max_steps",
    "6",
    "--finetune_max_steps",
    "1",
    *QUICK,
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def dense(family):
    return tiny_model(family)


def search(dense, family, share, **changes):
    """Return a search for a fraction of the predicted latency, and the table."""
    table = invented_table(dense)
    target = share * count_latency(dense, table) / PICOSECONDS
    return search_config(
        family, target_latency_ms=target, latency_table=table.to_dict(), **changes
    ), table


# ------------------------------------------------------------------------------------------ the fit


def test_the_fit_finds_the_coefficients_that_made_the_points():
    rng, truth = random.Random(0), [50_000_000, 0, 1_200_000, 5_500]
    rows = [
        [1, (width := rng.randrange(40, 400)), (units := rng.randrange(40, 900)), width * units]
        for _ in range(60)
    ]
    times = [sum(c * value for c, value in zip(truth, row, strict=True)) for row in rows]
    assert fit_coefficients(rows, times) == pytest.approx(truth, rel=1e-3, abs=100)
    noisy = [time * rng.uniform(0.97, 1.03) for time in times]
    found = fit_coefficients(rows, noisy)
    assert all(value >= 0 for value in found)
    predicted = [sum(c * value for c, value in zip(found, row, strict=True)) for row in rows]
    assert predicted == pytest.approx(times, rel=0.04)


def test_products_of_less_than_a_picosecond_count():
    rows = [[1, size] for size in range(10**6, 10**8, 10**7)]
    assert fit_coefficients(rows, [5e5 + 0.031 * size for _, size in rows]) == pytest.approx(
        [5e5, 0.031], rel=1e-3
    )
    table, architecture = invented_table(tiny_vit()), describe(tiny_vit().config)
    table.coefficients["stages.0.mlp"]["tokens x width x units"] = 0.031
    (factor,) = {
        t.coefficient
        for t in table.terms(architecture)
        if t.factors == ("embeddings", "layers.0.mlp")
    } - {table.coefficients["stages.0.mlp"]["width x units"]}
    assert factor == round(0.031 * 17) == 1


def test_what_seems_to_get_faster_by_growing_is_held_at_0():
    rows = [[1, size] for size in range(1, 20)]
    assert fit_coefficients(rows, [1e6 - 1e4 * size for _, size in rows])[1] == 0


@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_network_gets_faster_by_growing(family, seed, share):
    dense = tiny_model(family)
    table, rng = invented_table(dense, seed), random.Random(seed)
    architecture = describe(dense.config)
    full = architecture.sizes
    smaller = {
        name: tuple(max(1, round(share * rng.random() * u)) for u in size)
        for name, size in full.items()
    }
    terms = table.terms(architecture)
    costs = [evaluate_terms(terms, quantities(smaller))]
    for name in rng.sample(list(full), len(full)):
        smaller[name] = full[name]
        costs.append(evaluate_terms(terms, quantities(smaller)))
    assert costs == sorted(costs)
    assert costs[-1] == count_latency(dense, table)


# ----------------------------------------------------------------------------------------- the cost


def test_what_is_expected_of_a_settled_search_is_what_is_counted(dense, family):
    config, table = search(dense, family, 0.6)
    supernet = install_bi_masks(dense, config)
    subnet = supernet.decisions.settle_()
    expected = supernet.decisions.expected_cost(supernet.sizes("sparsity")).item()
    assert expected == pytest.approx(count_latency(dense, table, subnet), rel=1e-5)
    assert count_latency(supernet.fold(), table) == count_latency(dense, table, subnet)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("depth", [False, True])
def test_the_budget_in_milliseconds_holds_and_is_used(dense, family, share, depth):
    config, table = search(dense, family, share, search_depth=depth)
    target = round(config.target_latency_ms * PICOSECONDS)
    found = count_latency(compress(install_bi_masks(dense, config)), table)
    assert 0.9 * target <= found <= target


def test_milliseconds_that_nothing_meets_are_refused_with_those_that_something_does(dense, family):
    with pytest.raises(UnreachableBudgetError, match=r"costs ([\d,.]+) ms") as refusal:
        install_bi_masks(dense, search(dense, family, 0.001)[0])
    smallest = float(str(refusal.value).partition("which costs ")[2].split()[0].replace(",", ""))
    table = invented_table(dense).to_dict()
    compress(
        install_bi_masks(
            dense, search_config(family, target_latency_ms=smallest, latency_table=table)
        )
    )
    with pytest.raises(ValueError, match=r"more than the [\d,.]+ ms of the model itself"):
        install_bi_masks(dense, search(dense, family, 1.1)[0])


def test_costs_too_many_to_be_told_apart_are_rounded_so_that_they_still_fit():
    rng = random.Random(1)
    options = {f"s{i}": [Candidate((units,), rng.random()) for units in (1, 2)] for i in range(6)}
    terms = tuple(Term(rng.randrange(10**10, 10**11), (name,)) for name in options)
    target = sum(term.coefficient for term in terms) * 3 // 2
    cost = best_choice(options, terms, {}, target, tightness=1.0).cost
    reachable = [
        sum(term.coefficient * (1 + (picks >> i & 1)) for i, term in enumerate(terms))
        for picks in range(2**6)
    ]
    best = max(total for total in reachable if total <= target)
    assert best - len(options) * target / ROUNDED <= cost <= best


# ---------------------------------------------------------------------------------- what is refused


def test_impossible_budgets_are_refused_with_an_explanation(dense, family):
    table = invented_table(dense).to_dict()
    with pytest.raises(ValueError, match=r"latency_table is not given.*ofb-hf latency-table"):
        SEARCHES[family](target_latency_ms=5)
    with pytest.raises(ValueError, match=r"target_macs=0.5 and target_latency_ms=5.*one budget"):
        SEARCHES[family](target_macs=0.5, target_latency_ms=5, latency_table=table)
    for wrong in (0, -1.5, math.inf, True):
        with pytest.raises(ValueError, match="milliseconds above 0"):
            SEARCHES[family](target_latency_ms=wrong, latency_table=table)


def test_a_table_of_another_model_is_refused_before_anything_starts(family):
    theirs = "swin" if family == "vit" else "vit"
    table = invented_table(tiny_model(theirs)).to_dict()
    with pytest.raises(ValueError, match=r"differ in \{'submodules'.*with as many labels"):
        install_bi_masks(
            tiny_model(family), search_config(family, target_latency_ms=1, latency_table=table)
        )
    table = invented_table(tiny_model(family)).to_dict()
    more_labels = tiny_model(family, num_labels=7)
    with pytest.raises(ValueError, match=r"\(table, here\) differ in \{'macs'"):
        install_bi_masks(
            more_labels, search_config(family, target_latency_ms=1, latency_table=table)
        )


def test_a_table_serves_whatever_can_be_cut_from_its_model(dense, family):
    config, table = search(dense, family, 0.5)
    small = compress(install_bi_masks(dense, config))
    table.require_fit(describe(small.config))
    with pytest.raises(ValueError, match="no smaller version"):
        invented_table(small).require_fit(describe(dense.config))


@pytest.mark.parametrize(
    "content",
    ["{", "[1, 2]", '{"model": "x"}', "coefficients", "settings", "negative", "missing"],
)
def test_a_file_that_is_no_table_is_refused_by_name(content, tmp_path):
    table = invented_table(tiny_model("vit")).to_dict()
    if content == "coefficients":
        content = json.dumps(table | {"coefficients": {"stem": [1]}})
    elif content == "settings":
        content = json.dumps(table | {"settings": {"batch_size": 1}})
    elif content == "negative":
        content = json.dumps(table | {"coefficients": {"stem": {"width": -1}}})
    file = tmp_path / "table.json"
    if content != "missing":
        file.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json") as refusal:
        SEARCHES["vit"](latency_table=str(file))
    assert "ofb-hf latency-table" in str(refusal.value)


def test_a_table_without_a_part_says_which(dense):
    table = invented_table(dense)
    del table.coefficients["head"]
    with pytest.raises(ValueError, match=r"no .* for 'head'"):
        count_latency(dense, table)


# ----------------------------------------------------------------------------------------- the file


def test_a_config_carries_its_table_along(dense, family, tmp_path):
    file, kept = tmp_path / "table.json", tmp_path / "config.json"
    table = invented_table(dense)
    table.points, table.check = (
        [{"kind": "stem", "ms": 1.0}],
        {"worst_error": 0.1, "networks": [{"error": 0.1}]},
    )
    file.write_text(json.dumps(table.to_dict()))
    assert LatencyTable.load(file) == table
    config = default_config(
        dense.config, preset="bi_mask", target_latency_ms=1.0, latency_table=str(file)
    )
    file.unlink()
    config.save(kept)
    assert type(config).load(kept) == config
    assert "points" not in config.latency_table
    assert config.latency_table["check"] == {"worst_error": 0.1}
    assert count_latency(dense, config.table) == count_latency(dense, table)
    other = invented_table(dense, seed=1).to_dict()
    assert type(config)(target_latency_ms=1.0, latency_table=other) != config


def test_another_machine_is_worth_a_warning(dense, monkeypatch):
    warnings = []
    monkeypatch.setattr("ofb_hf.workflow.latency_table.logger.warning", warnings.append)
    warn_if_elsewhere(None, torch.device("cpu"))
    assert warnings == []
    warn_if_elsewhere(invented_table(dense), torch.device("cpu"))
    assert "measured on a machine" in warnings[0]


# ------------------------------------------------------------------------------------- measuring it


@pytest.mark.parametrize("depth", [False, True])
def test_marks_cut_the_whole_forward_pass_into_its_parts(dense, family, depth):
    searched = search_config(family, target_macs=0.2 if depth else 0.6, search_depth=depth)
    supernet = install_bi_masks(dense, searched)
    model = supernet.fold() if not depth else compress(supernet)
    architecture, image = describe(model.config), torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        elapsed = Timeline(model.eval())(image)
    living = [part.name for part in architecture.parts if part.name not in architecture.left_out]
    assert list(elapsed) == living
    assert bool(architecture.left_out) == depth


@pytest.mark.parametrize("narrow", [False, True])
def test_marks_know_reductions_and_what_lies_around_them(narrow):
    """Layers around them may have lost their attention, their MLP or both."""
    model = non_uniform_vit() if narrow else tiny_vit(num_hidden_layers=6)
    schedule = [[17, 17], [17, 11], [9, 9], [9, 9], [2, 2], [2, 2]]
    model = OFBViTForImageClassification.from_dense(model, token_schedule=schedule)
    architecture = describe(model.config)
    with torch.inference_mode():
        elapsed = Timeline(model.eval())(torch.randn(1, 3, 16, 16))
    assert list(elapsed) == [
        part.name for part in architecture.parts if part.name not in architecture.left_out
    ]
    assert [name for name in elapsed if name.endswith("reduction")] == [
        f"layers.{i}.reduction" for i in (1, 2, 4)
    ]


@given(seed=st.integers(0, 1000), layers=st.integers(2, 8))
def test_measured_schedules_are_such_as_a_model_may_have(seed, layers):
    config = OFBViTForImageClassification.from_dense(tiny_vit(num_hidden_layers=layers)).config
    schedule = sample_schedule(config, random.Random(seed))
    counts = [17, *itertools.chain.from_iterable(schedule)]
    assert counts == sorted(counts, reverse=True)
    assert (schedule[0], schedule[-1]) == ([17, 17], [2, 2])
    config.token_schedule = schedule
    assert [config.token_counts(layer)[1:] for layer in range(layers)] == [
        tuple(pair) for pair in schedule
    ]


def test_a_table_is_of_the_model_with_all_its_tokens(tmp_path):
    scheduled_vit().save_pretrained(tmp_path / "fast")
    table = cli.latency_table(
        [str(tmp_path / "fast"), "--output", str(tmp_path / "table.json"), *TINY]
    )
    table.require_fit(describe(tiny_vit(num_hidden_layers=3).config))
    # at least one in each network with fewer tokens
    assert table.residuals["stages.0.reduction"]["points"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_measures_and_writes_a_table(
    family, checkpoint, swin_checkpoint, tmp_path, capsys
):
    folder, file = {"vit": checkpoint, "swin": swin_checkpoint}[family], tmp_path / "table.json"
    clock = ["--clock", "cpu"] if family == "vit" else []
    table = cli.latency_table([str(folder), "--output", str(file), *TINY, *clock])
    assert list(tmp_path.iterdir()) == [file]
    assert LatencyTable.load(file) == table
    assert torch.get_num_threads() == 1
    dense = tiny_model(family)
    assert count_latency(dense, table) > 0
    assert table.sizes == {name: list(size) for name, size in describe(dense.config).sizes.items()}
    assert table.settings["clock"] == {"vit": "cpu", "swin": "wall"}[family]
    assert all(elapsed > 0 for elapsed in measured_latency({"dense": dense}, table).values())
    reduced = [row for row in table.check["networks"] if "token_schedule" in row]
    assert (len(table.check["networks"]), len(reduced)) == {"vit": (9, 4), "swin": (5, 0)}[family]
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in table.coefficients)
    assert f"written to {file}" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--networks", "3"], "--networks is 3"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--clock", "sun"], "--clock is 'sun'"),
        (
            ["--clock", "cpu", "--num_threads", "2"],
            "--clock is cpu, with --device cpu and --num_threads 2",
        ),
        (["--batch_size", "0"], "--batch_size is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["latency-table", "digits_vit", "--output", str(tmp_path / "t.json"), *flags])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Measure a table of the demonstration's model; return its file and the table.

    What was measured is exchanged for invented figures: on a busy machine a network as small as
    that takes as long as its smallest subnet.
    """
    file = tmp_path_factory.mktemp("table") / "digits.json"
    table = cli.latency_table(["digits_vit", "--num_labels", "10", "--output", str(file), *TINY])
    invented = invented_table(load_for_counting("digits_vit", 10)).coefficients
    assert invented.keys() == table.coefficients.keys()
    # Milliseconds instead of seconds.
    coefficients = {
        kind: {name: value / 1000 for name, value in figures.items()}
        for kind, figures in invented.items()
    }
    table = dataclasses.replace(table, coefficients=coefficients)
    file.write_text(json.dumps(table.to_dict()), encoding="utf-8")
    return file, table


def predicted_ms(table):
    """Return the predicted milliseconds of the demonstration's dense model."""
    return count_latency(load_for_counting("digits_vit", 10), table) / PICOSECONDS


@pytest.mark.slow
def test_a_plan_predicts_milliseconds(digits, capsys):
    file, table = digits
    flags = ["digits_vit", "--num_labels", "10", "--latency_table", str(file), *QUICK[:3]]
    plan = cli.plan([*flags, "--target_macs", "0.5", "--per_device_train_batch_size", "2"])
    budget, dense = plan["budgets"]["target_macs-0.5"], plan["dense"]
    assert dense["latency_ms"] == predicted_ms(table)
    assert 0 < budget["latency_ms"] < dense["latency_ms"]
    assert f"{budget['latency_ms']:.3f}" in capsys.readouterr().out
    target = 0.9 * dense["latency_ms"]
    plan = cli.plan(
        [*flags, "--target_latency_ms", f"{target}", "--per_device_train_batch_size", "2"]
    )
    (budget,) = plan["budgets"].values()
    assert budget["latency_ms"] <= budget["target"] == pytest.approx(target)


@pytest.mark.slow
def test_a_search_for_milliseconds_ends_within_them_and_is_resumed(
    digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ofb_hf.workflow.measure.SECONDS_PER_ROUND", 0.01)
    file, table = digits
    target = round(0.9 * predicted_ms(table), 4)
    flags = [*DIGITS, "--target_latency_ms", str(target), "--output_dir", str(tmp_path / "run")]
    results = cli.search([*flags, "--latency_table", str(file)])
    assert results["target_latency_ms"] == target
    assert results["target_macs"] is None
    for stage in ("dense", "searched", "finetuned"):
        assert results[stage]["latency_ms"] > 0
    assert (
        results["finetuned"]["predicted_latency_ms"]
        <= target
        < results["dense"]["predicted_latency_ms"]
    )
    history = read_history(tmp_path / "run" / "search_history.jsonl")
    assert history[-2]["latency_ms"] <= target
    assert f"at most {target} ms" in (tmp_path / "run" / "README.md").read_text()

    kept = tmp_path / "run" / "latency_table.json"
    again = cli.search([*flags, "--latency_table", str(kept), "--resume_from_checkpoint", "auto"])
    assert again["finetuned"]["macs"] == results["finetuned"]["macs"]
    changed = table.to_dict() | {"hardware": "another machine"}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        cli.search(
            [
                *flags,
                "--latency_table",
                str(tmp_path / "other.json"),
                "--resume_from_checkpoint",
                "auto",
            ]
        )
    assert "differ in {'latency_table'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5),
        ("hardware", 5),
        ("check", 5),
        ("residuals", []),
        ("points", {}),
        ("coefficients", {"stem": 5}),
        ("sizes", {"embeddings": ["a"]}),
        ("sizes", {"embeddings": []}),
        ("sizes", {"embeddings": [40.5]}),
    ],
)
def test_entries_of_the_wrong_type_are_refused(name, value):
    table = invented_table(tiny_model("vit")).to_dict()
    with pytest.raises(ValueError, match=f"this is no latency table: {name} is .*Make one"):
        LatencyTable.from_dict(table | {name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("num_threads", "two"), ("batch_size", 0), ("device", 1), ("dtype", None)]
)
def test_settings_of_the_wrong_type_are_refused(name, value):
    table = invented_table(tiny_model("vit")).to_dict()
    with pytest.raises(ValueError, match=f"its settings say .*{name}.*Make one"):
        LatencyTable.from_dict(table | {"settings": table["settings"] | {name: value}})


def test_sizes_along_fewer_axes_are_another_model():
    model = tiny_model("vit")
    table = invented_table(model).to_dict()
    table["sizes"] |= {"layers.0.attention": [5]}
    with pytest.raises(ValueError, match=r"no smaller version of.*layers\.0\.attention"):
        search_config(latency_table=table).search_space(model.config)


def test_a_table_may_be_given_as_it_is():
    table = invented_table(tiny_model("vit"))
    assert (
        search_config(latency_table=table).to_dict()
        == search_config(latency_table=table.to_dict()).to_dict()
    )


def test_one_thread_is_no_plural():
    assert [threads_text(count) for count in (1, 2)] == ["1 thread", "2 threads"]
