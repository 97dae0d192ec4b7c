"""How dense the lines of the package are. `python tests/test_readability.py [FOLDER]` prints it.

Tree nodes are expressions and statements, without docstrings. Code lines are lines that hold a
token of code and no docstring. Comment lines are lines with a comment, alone or behind code.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ofb_hf"
MAX_NODES_PER_CODE_LINE = 5.2
MIN_COMMENT_SHARE = 0.06
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
AVOIDED = re.compile(
    r"settlement|\bmeant_|\bof ours\b|\b(is|are|was|were|be|has) gone\b(?! on)"
    r"|(?<!for word )\bin words\b|\blikewise\b"
)


def docstrings(tree: ast.Module) -> list[ast.Expr]:
    """The statements of a file that are docstrings."""
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    return [node.body[0] for node in documented if ast.get_docstring(node, clean=False) is not None]


def measure(file: Path) -> Counter:
    """Count nodes, code lines, comment lines, and comprehensions inside comprehensions."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source)
    documentation = docstrings(tree)
    nodes = sum(isinstance(node, ast.expr | ast.stmt) for node in ast.walk(tree))
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in documentation:
        code.difference_update(range(node.lineno, node.end_lineno + 1))
    nested = 0
    for outer in ast.walk(tree):
        if isinstance(outer, COMPREHENSIONS):
            nested += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(outer)) - 1
    return Counter(
        nodes=nodes - 2 * len(documentation),  # a statement and its constant
        code=len(code),
        comments=len(comments),
        lines=len(code | comments),
        nested=nested,
    )


def report(name: str, counts: Counter) -> str:
    """One line on a file or a folder."""
    density = counts["nodes"] / max(1, counts["code"])
    share = counts["comments"] / max(1, counts["lines"])
    return (
        f"{name:45} {counts['code']:6} code lines  {density:5.2f} nodes a line  "
        f"{share:6.1%} comment lines  {counts['nested']} nested comprehensions"
    )


def total(folder: Path) -> Counter:
    """The sums over all files of a folder."""
    return sum(map(measure, sorted(folder.rglob("*.py"))), Counter())


def test_a_line_says_one_thing():
    counts = total(PACKAGE)
    assert counts["nodes"] / counts["code"] <= MAX_NODES_PER_CODE_LINE
    assert counts["nested"] == 0


def test_comments_say_why():
    counts = total(PACKAGE)
    assert counts["comments"] / counts["lines"] >= MIN_COMMENT_SHARE


def test_words_with_several_meanings_are_avoided():
    """See the glossary of docs/ARCHITECTURE.md. Old names stand in the list of renamed ones."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.name != "_moved.py":
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if AVOIDED.search(line):
                    found.append(f"{file.relative_to(PACKAGE)}:{number}: {line.strip()}")
    assert not found


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    for file in sorted(folder.rglob("*.py")):
        sys.stdout.write(report(str(file.relative_to(folder)), measure(file)) + "\n")
    sys.stdout.write(report("total", total(folder)) + "\n")
