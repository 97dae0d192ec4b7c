"""House rules, read from the source: who may import whom, who spells names of modules, how long is
too long."""

import ast
import re
import sys
from pathlib import Path

import pytest
from runs import run_code

import ofb_hf

PACKAGE = Path(ofb_hf.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("*.py"))

MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = 600

# The rooms of the package, from the ground up. A room imports rooms of lower floors only; rooms of
# one floor do not know each other. `ofb_hf/__init__.py` stands outside: it gathers public names.
FLOORS = (
    ("_moved", "_version", "argument_checks", "durable", "hub_retries", "metrics", "models"),
    ("families", "data"),
    ("cost",),
    ("space", "tokens", "pruning"),
    ("masks", "training", "release", "pictures"),
    ("choice", "token_search"),
    ("frozen",),
    ("search",),
    ("workflow",),
    ("cli", "__main__"),
)
MAX_LEVELS = 11
# Rooms that a room does without although they lie below it: what is best under a budget needs no
# trainer.
KEEPS_AWAY_FROM = {"choice": {"training", "release", "pictures"}, "training": {"space", "tokens"}}

# What a file may import besides the standard library and ours. Everything that is not listed is
# free.
THIRD_PARTY = {
    "families/forward_parts.py": set(),
    "families/subnet.py": set(),
    "space/search_space.py": set(),
    "search/phases.py": set(),
    "masks/arithmetic.py": {"torch"},
    "masks/bi_mask.py": {"torch"},
    "masks/one_hot.py": {"torch"},
    "training/losses.py": {"torch"},
    "search/pmim.py": {"torch"},
    "choice/knapsack.py": set(),
    "choice/picks.py": {"numpy"},
    "choice/problem.py": {"numpy"},
    "choice/relaxation.py": {"numpy"},
    "cost/latency.py": {"numpy", "transformers"},
    "models": {"torch", "transformers", "huggingface_hub"},
}
# Names of modules and parameters of a model family that mean nothing else anywhere.
MODULE_NAMES = (
    r"[qkvo]_proj|fc[12]|layernorm_(before|after)|patch_embeddings|position_embeddings|cls_token"
    r"|mask_token|relative_position_bias(_table)?|downsample"
)
# The same, and paths of common words, as they appear in strings and f-strings ({} = anything).
PATHS_IN_TEXT = re.compile(
    rf"(?<![\w-])({MODULE_NAMES})(?!\w)|\b(vit|swin|encoder)\.(layers|embeddings|layernorm|encoder|\{{)"
    r"|\battention\.(attention|query|key|value|output)\b|\b(intermediate|output)\.dense\b"
)
# The same, spelled as attributes: `model.vit.layers`, `layer.reduction`, `block.mlp.fc1`.
PATHS_IN_CODE = re.compile(
    rf"\.({MODULE_NAMES}|vit|swin|reduction|layernorm)$|\b(encoder|model)\.layers$"
    r"|\.classifier\.(weight|bias)$"
)
# What one layer of any model is taken from: `base.layers[0]`, `model.stages[i]`. An object's own
# list may have such a name.
CONTAINED = re.compile(r"(?<!^self)\.(layers?|stages|blocks)$")
# Names that functions look up as attributes of a module: `getattr(layer, "reduction")`.
LOOK_UPS = ("getattr", "setattr", "hasattr", "get_submodule", "get_parameter")
PATHS_LOOKED_UP = re.compile(
    rf"^({MODULE_NAMES}|vit|swin|reduction|layernorm|classifier)(\.|$)"
    r"|^(encoder|embeddings|layers?|stages|blocks)\."
)
MAY_SPELL_PATHS = ("families/", "models/")


def relative(file: Path) -> str:
    """A file's path inside the package, for messages and tables."""
    return file.relative_to(PACKAGE).as_posix()


def module_name(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = ["ofb_hf", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, its own package's included, at any depth, in
    functions and for type checkers, too: a reader follows those arrows as well."""
    name, found = module_name(file), set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([base] if base else [])])
            # `from . import schedule` names a module, `from .schedule import ramp` does not
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in MODULES else base)
    return found


def own(names: set[str]) -> set[str]:
    """Those of our package."""
    return {name for name in names if name.partition(".")[0] == "ofb_hf"}


def foreign(names: set[str]) -> set[str]:
    """Top-level names of what is neither ours nor in the standard library."""
    tops = {name.partition(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"ofb_hf"}


# ------------------------------------------------------------------------------------------- arrows


def test_there_are_no_import_cycles():
    graph = {
        name: own(imports(file)) & MODULES.keys() - {"ofb_hf"} for name, file in MODULES.items()
    }
    remaining = dict(graph)
    while leaves := [
        name for name, targets in remaining.items() if not targets & remaining.keys() - {name}
    ]:
        for name in leaves:
            del remaining[name]
    assert not remaining, f"import cycle among {sorted(remaining)}"
    assert len(graph) > 15


def room_of(module: str) -> str:
    """The room that a module of the package stands in: `ofb_hf.choice.knapsack` -> `choice`."""
    return module.split(".")[1]


def rooms() -> dict[str, set[str]]:
    """Every room and the rooms that its files import."""
    arrows: dict[str, set[str]] = {}
    for name, file in MODULES.items():
        if name != "ofb_hf":
            targets = {room_of(target) for target in own(imports(file)) if target != "ofb_hf"}
            arrows.setdefault(room_of(name), set()).update(targets - {room_of(name)})
    return arrows


def test_every_file_stands_in_a_room_of_the_plan():
    assert sorted(rooms()) == sorted(room for floor in FLOORS for room in floor)


def test_rooms_import_lower_floors_only():
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    rising = {
        f"{room} -> {target}"
        for room, targets in rooms().items()
        for target in targets
        if floor_of[target] >= floor_of[room] or target in KEEPS_AWAY_FROM.get(room, ())
    }
    assert not rising


def levels(graph: dict[str, set[str]]) -> int:
    """How many levels a graph without cycles has: the nodes on its longest path."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max(map(height, graph[name]), default=0)
        return heights[name]

    return max(map(height, graph))


def test_a_reader_climbs_few_levels():
    assert levels(rooms()) <= MAX_LEVELS


@pytest.mark.parametrize("name", sorted(THIRD_PARTY))
def test_files_that_know_little_import_little(name):
    files = [
        file for file in FILES if relative(file) == name or relative(file).startswith(f"{name}/")
    ]
    assert files
    for file in files:
        assert foreign(imports(file)) <= THIRD_PARTY[name], relative(file)


def test_models_know_nothing_of_ours_but_their_own_configuration():
    """These files travel to the Hub with a checkpoint: nothing else of ours will be there."""
    files = [file for file in FILES if relative(file).startswith("models/")]
    assert any(file.name.startswith("modeling_") for file in files)
    for file in files:
        configuration = f"ofb_hf.models.{file.stem.replace('modeling_', 'configuration_')}"
        allowed = {configuration} if file.stem.startswith("modeling_") else set()
        if file.name == "__init__.py":  # stays here, and only gathers the others
            allowed = {name for name in MODULES if name.startswith("ofb_hf.models.")}
        assert own(imports(file)) <= allowed, relative(file)


def test_nothing_imports_the_package_root():
    for file in FILES:
        assert "ofb_hf" not in imports(file), relative(file)


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of the nodes that are docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            found.add(id(node.body[0].value))
    return found


def text_of(node: ast.AST) -> str | None:
    """The text of a string or an f-string, with {} where an f-string inserts values."""
    if isinstance(node, ast.JoinedStr):
        pieces = [piece.value if isinstance(piece, ast.Constant) else "{}" for piece in node.values]
        return "".join(pieces)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def looked_up(node: ast.AST) -> list[str]:
    """The names that a call looks up as attributes of an object."""
    if not isinstance(node, ast.Call):
        return []
    if ast.unparse(node.func).rpartition(".")[2] not in LOOK_UPS:
        return []
    return [text for argument in node.args if (text := text_of(argument)) is not None]


def module_paths(source: str) -> list[tuple[int, str]]:
    """The module paths of model families that a source text spells, with their lines."""
    tree = ast.parse(source)
    documentation = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        text = text_of(node)
        if text is not None and id(node) not in documentation and PATHS_IN_TEXT.search(text):
            found.append((node.lineno, text))
        if isinstance(node, ast.Attribute) and PATHS_IN_CODE.search(ast.unparse(node)):
            found.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.Subscript) and CONTAINED.search(ast.unparse(node.value)):
            found.append((node.lineno, ast.unparse(node)))
        found += [(node.lineno, name) for name in looked_up(node) if PATHS_LOOKED_UP.search(name)]
    return found


@pytest.mark.parametrize(
    "source",
    [
        'path = "vit.layers.3"',
        'path = f"vit.{kind}.3"',
        'path = f"{block}.q_proj.weight"',
        'state.pop("swin.embeddings.mask_token")',
        "for layer in model.vit.layers: pass",
        "self.model.swin(pixels)",
        "layer.attention.q_proj.weight",
        "layer.reduction = None",
        "embeddings.mask_token = None",
        'getattr(layer, "reduction", None)',
        "model.encoder.layers[0]",
        "supernet.model.layers[0]",
        "base.layers[0]",
        "norm = stage.blocks[-1].norm",
        'model.get_submodule("stages.0.blocks.1")',
        'model.get_submodule(f"layers.{layer}.mlp")',
        "m.classifier.weight",
        'path = f"{i}.attention.attention.query"',
        'path = f"layer.{i}.output.dense.weight"',
    ],
)
def test_module_paths_are_noticed(source):
    assert module_paths(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Slices vit.layers and q_proj."""',
        'F.kl_div(student, teacher, reduction="batchmean")',
        "self.layers = settling.layers",
        'message = "only ViT can drop tokens: vit"',
        "config.num_attention_heads_per_layer",
        "family.tokens.layers",
        "add_mask_token_(model)",
        "classifier.__name__",
        "self.blocks[index]",
        "for layer in family.tokens.layers(model): layers[0]",
        'name = f"layers.{layer}.attention"',
    ],
)
def test_other_names_are_not_taken_for_module_paths(source):
    assert not module_paths(source)


def test_only_families_and_models_spell_module_paths():
    spelled = []
    for file in FILES:
        if not relative(file).startswith(MAY_SPELL_PATHS):
            paths = module_paths(file.read_text(encoding="utf-8"))
            spelled += [f"{relative(file)}:{line}: {path!r}" for line, path in paths]
    assert not spelled
    families = (PACKAGE / "families").glob("*.py")
    assert any(module_paths(file.read_text(encoding="utf-8")) for file in families)


# --------------------------------------------------------------------------------- what import does


IMPORT_EVERYTHING = """
import socket
import torch

def refuse(*args, **kwargs):
    raise RuntimeError("importing must not do this")

torch.cuda._lazy_init = torch.cuda.init = refuse
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import ofb_hf
for name in ofb_hf.__all__:
    assert getattr(ofb_hf, name) is not None, name
assert not torch.cuda.is_initialized()
assert set(ofb_hf.__all__) <= set(dir(ofb_hf))
try:
    ofb_hf.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""


@pytest.mark.slow
def test_importing_touches_neither_an_accelerator_nor_the_network(tmp_path):
    status, said = run_code(tmp_path, IMPORT_EVERYTHING)
    assert status == 0, said


@pytest.mark.slow
def test_importing_the_package_imports_the_models_only(tmp_path):
    script = "import sys, ofb_hf; print(*sorted(m for m in sys.modules if m.startswith('ofb_hf')))"
    status, said = run_code(tmp_path, script)
    assert status == 0, said
    loaded = {
        name for name in said.splitlines()[-1].split() if not name.startswith("ofb_hf.models")
    }
    assert loaded == {"ofb_hf", "ofb_hf._moved", "ofb_hf._version"}


# ------------------------------------------------------------------------------------------- length


def functions(file: Path):
    """Functions and methods of a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    return (
        function.end_lineno
        - function.lineno
        + 1
        - (docstring.count("\n") + 1 if docstring is not None else 0)
    )


def test_functions_are_short():
    long = {
        f"{file.name}:{function.lineno} {function.name}: {body_lines(function)}"
        for file in [*FILES, *TEST_FILES]
        for function in functions(file)
        if body_lines(function) > MAX_FUNCTION_LINES
    }
    assert not long


def test_files_are_short():
    lengths = {relative(file): file.read_text(encoding="utf-8").count("\n") for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


# ---------------------------------------------------------------------------------------- the tests


def asserts(function: ast.FunctionDef) -> bool:
    """Whether a function can fail: an `assert`, `pytest.raises` or `warns`, or a call of some
    `assert_...`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.startswith("assert") or name in ("raises", "warns", "fail"):
                return True
    return False


def test_every_test_asserts_something():
    tests = [
        (file, function)
        for file in TEST_FILES
        for function in functions(file)
        if file.name.startswith("test_")
    ]
    tests = [(file, function) for file, function in tests if function.name.startswith("test_")]
    assert len(tests) > 100
    assert [
        f"{file.name}::{function.name}" for file, function in tests if not asserts(function)
    ] == []


def test_tests_have_names_of_their_own():
    """Python keeps the last of two functions of one name: the first would never run."""
    for file in TEST_FILES:
        names = [
            node.name
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if hasattr(node, "name")
        ]
        assert len(names) == len(set(names)), file.name
