"""Write `docs/API.md` from docstrings of the public names, and the table of moved modules."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from types import ModuleType
from typing import Any

import ofb_hf
from ofb_hf import _moved

# Documented modules besides the package itself; each lists its public classes and functions.
MODULES = (
    "ofb_hf.tokens.published",
    "ofb_hf.choice.baselines",
    "ofb_hf.cost.latency",
    "ofb_hf.pictures.token_maps",
    "ofb_hf.release.export",
)
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:", "Example:", "Examples:")
HEAD = """# API

Public names of `ofb_hf`, then public functions of the modules that the documentation mentions.
`python docs/generate.py` writes this page from the docstrings; do not edit it by hand.
"""


def api_page() -> str:
    """Return the page."""
    names = [name for name in ofb_hf.__all__ if name != "__version__"]
    parts = [HEAD, "## ofb_hf\n"]
    parts += [entry(name, getattr(ofb_hf, name)) for name in sorted(names, key=str.lower)]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n")
        parts.append(f"{inspect.getdoc(module).splitlines()[0]}\n")
        parts += [entry(name, value) for name, value in public_members(module)]
    return "\n".join(parts)


def moved_modules() -> str:
    """Return a table of the module paths of version 0.1 and the modules that hold their names."""
    lines = ["| 0.1 | 0.2 |", "| --- | --- |"]
    for old, homes in _moved.MOVED.items():
        new = ", ".join(f"`ofb_hf.{home}`" for home in homes)
        lines.append(f"| `ofb_hf.{old}` | {new} |")
    return "\n".join(lines)


def renamed_names() -> str:
    """Return a table of the names of version 0.1 that are called something else now."""
    lines = ["| 0.1 | 0.2 |", "| --- | --- |"]
    for old, new in _moved.RENAMED.items():
        now = "removed" if new is None else f"`ofb_hf.{new}`"
        lines.append(f"| `ofb_hf.{old}` | {now} |")
    return "\n".join(lines)


def public_members(module: ModuleType) -> list[tuple[str, Any]]:
    """Return the public classes and functions that a module defines, in its order."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
    ]


def entry(name: str, value: Any) -> str:
    """Return the section of one class or function."""
    lines = [f"### {name}", ""]
    if inspect.isclass(value):
        lines += class_lines(name, value)
    else:
        lines += ["```python", signature(value), "```", "", *docstring(value)]
    return "\n".join([*lines, ""])


def class_lines(name: str, value: type) -> list[str]:
    """Return bases, docstring, fields and methods of a class."""
    bases = [base.__name__ for base in value.__bases__ if base is not object]
    inherits = f"({', '.join(bases)})" if bases else ""
    lines = ["```python", f"class {name}{inherits}  # {value.__module__}", "```", ""]
    lines += docstring(value)
    fields = own_fields(value)
    if fields:
        lines += ["", "| field | default | |", "| --- | --- | --- |", *fields]
    methods = [method_line(key, member) for key, member in vars(value).items()]
    methods = [line for line in methods if line]
    if methods:
        lines += ["", "Methods:", "", *methods]
    return lines


def own_fields(value: type) -> list[str]:
    """Return table rows of the dataclass fields that this class declares with a help text."""
    if not dataclasses.is_dataclass(value):
        return []
    rows = []
    for field in dataclasses.fields(value):
        help_text = field.metadata.get("help")
        if help_text and field.name in vars(value).get("__annotations__", {}):
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            rows.append(f"| `{field.name}` | {default} | {help_text.replace('|', chr(92) + '|')} |")
    return rows


def method_line(name: str, member: Any) -> str | None:
    """Return a list item for a documented public method or property, None for anything else."""
    function = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
        return None
    summary = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
    call = name if isinstance(member, property) else f"{name}{arguments(function)}"
    return f"- `{call}`: {summary}"


def signature(function: Any) -> str:
    """Return a function's signature over one or several lines."""
    node = _node(function)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(line) <= 100:
        return line
    pieces = textwrap.indent(",\n".join(_split(ast.unparse(node.args))), "    ")
    return f"{node.name}(\n{pieces},\n){returns}"


def arguments(function: Any) -> str:
    """Return the arguments of a method, without `self`, types and defaults."""
    parameters = inspect.signature(function).parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    names = [f"{stars.get(item.kind, '')}{item.name}" for item in parameters]
    return f"({', '.join(name for name in names if name not in ('self', 'cls'))})"


def docstring(value: Any) -> list[str]:
    """Return a docstring in Markdown: sections become bold headings with lists."""
    text = value.__doc__ or ""
    lines = []
    in_section = ""
    for line in inspect.cleandoc(text).splitlines():
        if line in SECTIONS:
            in_section = "" if line.startswith("Example") else line
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif in_section in ("Returns:", "Yields:"):
            lines.append(line.strip())
        elif in_section and re.match(r" {4}\S", line):
            lines.append(f"- {line.strip()}")
        elif in_section and line.startswith(" "):
            lines.append(f"  {line.strip()}")
        else:
            # A blank line belongs to its section; other text at the margin ends it.
            in_section = in_section if not line.strip() else ""
            if line.strip() or lines[-1:] != [""]:
                lines.append(line)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _node(function: Any) -> ast.FunctionDef:
    """Return the syntax tree of a function's definition."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return ast.parse(source).body[0]


def _split(listed: str) -> list[str]:
    """Split arguments at the commas outside of brackets."""
    pieces = [""]
    depth = 0
    for character in listed:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]
