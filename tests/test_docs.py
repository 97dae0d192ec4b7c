"""The documentation agrees with the results, the source code and the command line."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from ofb_hf import cli

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

import generate
from generators import pictures, rooms

ROOT = Path(__file__).resolve().parents[1]

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# A recipe is a command under another name.
RECIPES = {"search_deit": "search", "search_swin": "search", "search_tokens": "search-tokens"}
# A module without a command line of its own; it needs torch-pruning, which the tests do not.
LIBRARIES = ("torch_pruning_contestant",)
# Flags of accelerate, torchrun and Slurm that the documentation mentions.
OF_OTHER_PROGRAMS = (
    "--config_file",
    "--cpu",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--nproc_per_node",
    "--num_processes",
    "--shutdown-timeout",
    "--signal",
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text)


# ---------------------------------------------------------------------------------- generated parts


def test_generated_parts_are_up_to_date():
    assert generate.outdated() == [], "run `python docs/generate.py`"


@pytest.mark.parametrize(
    ("page", "right", "wrong"),
    [("README.md", "| 64.04 |", "| 63.80 |"), ("benchmarks/QUALITY.md", "64.38", "64.83")],
)
def test_a_figure_that_differs_from_its_record_is_noticed(page, right, wrong):
    text = text_of(ROOT / page)
    changed = text.replace(right, wrong)
    assert changed != text
    assert generate.filled(changed) == text


def test_every_recorded_result_is_shown():
    shown = set(re.findall(r"<!-- table: ([\w.]+) -->", "".join(map(text_of, PAGES))))
    recorded = {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert shown == recorded


def test_measured_percentages_of_the_readme_are_generated():
    by_hand = generate.BLOCK.sub("", text_of(ROOT / "README.md"))
    assert re.findall(r"\d+\.\d+ ?%", by_hand) == []


@pytest.mark.parametrize("file", pictures.PICTURES)
def test_pictures_are_small_and_have_a_light_background(file):
    path = ROOT / file
    assert path.stat().st_size < 200 * 1024
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert image.width >= 800


def test_the_drawing_shows_every_room():
    drawn = re.findall(r'font-weight="bold" [^>]*>([\w/]+)<', rooms.rooms_svg())
    listed = {room for floor in rooms.listed_floors() for room in floor}
    assert {name.rstrip("/") for name in drawn} == listed - set(rooms.HIDDEN)
    table = text_of(ROOT / "docs/ARCHITECTURE.md")
    for room in rooms.ROOMS:
        name = f"{room}.py" if room in rooms.FILES else f"{room}/"
        assert f"`{name}`" in table


# ---------------------------------------------------------------------------------- links and names


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(prose(text_of(page))):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_source_files_that_a_page_names_exist(page):
    folders = (ROOT, ROOT / "ofb_hf", ROOT / "benchmarks")
    names = re.findall(r"`([\w/]+\.(?:py|yaml|toml|cfg))`", prose(text_of(page)))
    missing = [name for name in names if not any((folder / name).exists() for folder in folders)]
    assert missing == []


# ---------------------------------------------------------------------------------- Python examples


def python_blocks() -> list[tuple[str, str]]:
    """Return (page, code) of every Python example; API.md repeats docstrings."""
    blocks = []
    for page in PAGES:
        if page.name != "API.md":
            found = FENCE.findall(text_of(page))
            blocks += [(named(page), code) for language, code in found if language == "python"]
    return blocks


def example(page: str, words: str) -> str:
    """Return the one example of a page that contains these words."""
    (code,) = [code for name, code in python_blocks() if name == page and words in code]
    return code


@pytest.mark.parametrize(("page", "code"), python_blocks())
def test_python_examples_compile_and_import_what_exists(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name) is not None, (page, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), (page, node.module, alias.name)


def test_the_readme_example_searches_a_model_that_loads_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = torch.randn(8, 3, 16, 16)
    train = [{"pixel_values": image, "labels": row % 3} for row, image in enumerate(images)]
    with monkeypatch.context() as offline:
        offline.setattr(
            ViTForImageClassification, "from_pretrained", lambda name: tiny_model("vit")
        )
        exec(example("README.md", "OFBTrainer"), {"train": train})
    loading = example("README.md", "AutoModel").replace("org/ofb-deit-b", "runs/small")
    names = {}
    exec(loading, names)
    logits = names["classifier"](images).logits
    assert logits.shape == (8, 3)
    assert names["encoder"](images).last_hidden_state.shape[0] == 8


ADAPTED = {
    "vit": ("vit.encoder.layer.1", "attention.attention", "vit.layers.1"),
    "swin": ("swin.encoder.layers.1.blocks.0", "attention.self", "swin.encoder.layers.1.blocks.0"),
}


@pytest.mark.parametrize("family", ADAPTED)
def test_the_example_that_renames_an_adapter_gives_names_that_exist(family, tmp_path, monkeypatch):
    old, attention, new = ADAPTED[family]
    layers = {
        f"{attention}.query": "attention.q_proj",
        f"{attention}.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    tensors = {
        f"base_model.model.{old}.{layer}.lora_A.weight": torch.full((2,), float(number))
        for number, layer in enumerate(layers)
    }
    kept = {"base_model.model.classifier.weight": torch.zeros(2)}
    (tmp_path / "adapter").mkdir()
    save_file(tensors | kept, tmp_path / "adapter" / "adapter_model.safetensors")
    before = {"r": 2, "target_modules": ["query", "value", "dense"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(before))
    monkeypatch.chdir(tmp_path)
    exec(compile(example("docs/HUB.md", "adapter_model"), "HUB.md", "exec"), {})
    after = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    targets = {layer.rpartition(".")[2] for layer in layers.values()}
    assert after == before | {"target_modules": sorted(targets)}
    renamed = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model = tiny_model(family)
    for number, layer in enumerate(layers.values()):
        assert model.get_submodule(f"{new}.{layer}").weight is not None
        tensor = renamed.pop(f"base_model.model.{new}.{layer}.lora_A.weight")
        assert tensor[0] == number
    assert list(renamed) == list(kept)


def test_the_example_of_a_published_schedule_counts_what_it_executes():
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=24
    )
    names = {"deit_small": ViTForImageClassification(config)}
    exec(example("docs/TOKENS.md", "published_schedule"), names)
    assert names["count_macs"](names["fast"]) < names["count_macs"](names["deit_small"])


# ------------------------------------------------------------------------------------ command lines


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags that `ofb-hf COMMAND --help all` lists."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help", "all"])
    assert stopped.value.code == 0
    return frozenset(FLAG.findall(printed.getvalue()))


@functools.cache
def benchmark_help(name: str) -> str:
    """Return what `python benchmarks/NAME.py --help` prints, without a process of its own."""
    folder = str(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", f"{folder}/{name}.py")
    module = importlib.util.module_from_spec(spec)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(folder)  # benchmarks import each other
        patch.setitem(sys.modules, spec.name, module)
        patch.setattr(sys, "argv", [name, "--help"])
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as stopped:
            module.main()
    assert stopped.value.code == 0
    return printed.getvalue()


def commands(text: str) -> list[list[str]]:
    """Return the command lines of a page, in code blocks and in inline code, as lists of words."""
    lines = []
    for language, code in FENCE.findall(text):
        if language in ("", "bash"):
            lines += code.replace("\\\n", " ").splitlines()
    lines += INLINE.findall(prose(text))
    started = ("ofb-hf", "accelerate", "torchrun", "python", "make", "recipes/", "OMP_NUM_THREADS")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(started)]


def program(words: list[str]) -> tuple[str, str, list[str]] | None:
    """Return (kind, name, words after it) of a command line, None for other programs."""
    for position, word in enumerate(words):
        after = words[position + 1 :]
        if word == "ofb-hf" and after and not after[0].startswith("-"):
            return "command", after[0], after[1:]
        script = re.fullmatch(r"(recipes|benchmarks|docs)/(\w+)\.py", word)
        if script:
            return script[1], script[2], after
        if position == 0 and word == "make" and after:
            return "make", after[0], after[1:]
    return None


def unknown(kind: str, name: str, flags: set[str]) -> set[str]:
    """Return the flags of a command line that its program does not have."""
    if kind == "make":
        targets = re.findall(r"^(\w+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        return set() if name in targets else {name}
    if kind == "docs":
        return flags - {"--check"}
    if kind == "benchmarks":
        return flags - set(FLAG.findall(benchmark_help(name)))
    if kind == "recipes":
        assert (ROOT / "recipes" / f"{name}.py").is_file()
    command = RECIPES.get(name, name)
    if command == "COMMAND":
        return set()
    return flags - flags_of(command)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_command_lines_use_flags_that_exist(page):
    mistakes = []
    for words in commands(text_of(page)):
        found = program(words)
        if found is not None:
            kind, name, after = found
            flags = {word.partition("=")[0] for word in after if word.startswith("--")}
            mistakes += [(name, flag) for flag in unknown(kind, name, flags - {"--help"})]
    assert mistakes == []


def test_flags_in_the_text_exist():
    known = {"--help", "--check", *OF_OTHER_PROGRAMS}
    for command in cli.COMMANDS:
        known |= flags_of(command)
    for name in BENCHMARKS:
        if name not in LIBRARIES:
            known.update(FLAG.findall(benchmark_help(name)))
    unknown = {}
    for page in PAGES:
        flags = set()
        for code in INLINE.findall(prose(text_of(page))):
            flags.update(FLAG.findall(code))
        if flags - known:
            unknown[named(page)] = flags - known
    assert unknown == {}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_import_and_explain_themselves(name):
    if name in LIBRARIES:
        assert ast.get_docstring(ast.parse(text_of(ROOT / f"benchmarks/{name}.py")))
        return
    assert "usage:" in benchmark_help(name)
