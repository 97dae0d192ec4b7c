"""Write the parts of the documentation that are generated, or check that they are up to date.

    python docs/generate.py            # write
    python docs/generate.py --check    # exit with 1 and name the files that differ

Generated are:

- tables of measured figures: the text between `<!-- table: NAME -->` and `<!-- end -->` in Markdown
  files, from `benchmarks/results/NAME.json`;
- the README's measured claims, between `<!-- claims -->` and `<!-- end -->`, from the same files
  and from `model_cards/*/eval_results.json`;
- the changelog's tables of moved modules and of renamed names, between `<!-- moved -->` or
  `<!-- renamed -->` and `<!-- end -->`, from `ofb_hf/_moved.py`;
- `docs/pictures/*.png` from the same files, and `docs/pictures/rooms.svg` from the floors in
  `tests/test_import_graph.py`;
- `docs/API.md` from the docstrings of the public names.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generators import api, claims, pictures, rooms  # noqa: E402
from generators.results import Result  # noqa: E402

BLOCK = re.compile(
    r"<!-- (?P<what>claims|moved|renamed|table: (?P<name>[\w.]+)) -->\n.*?<!-- end -->", re.DOTALL
)
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/*.md")


def filled(text: str) -> str:
    """Return a Markdown text with current figures between its markers."""

    def block(match: re.Match) -> str:
        what = match["what"]
        if what == "claims":
            content = claims.readme_claims()
        elif what == "moved":
            content = api.moved_modules()
        elif what == "renamed":
            content = api.renamed_names()
        else:
            content = Result.load(match["name"]).markdown()
        return f"<!-- {what} -->\n\n{content}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def generated_texts() -> dict[Path, str]:
    """Return every generated text file and its content."""
    pages = sorted(path for pattern in PAGES for path in ROOT.glob(pattern))
    texts = {path: filled(path.read_text(encoding="utf-8")) for path in pages}
    texts[ROOT / "docs/API.md"] = api.api_page()
    texts[ROOT / "docs/pictures/rooms.svg"] = rooms.rooms_svg()
    return texts


def outdated() -> list[str]:
    """Return the names of the generated files that differ from what would be written."""
    names = []
    for path, text in generated_texts().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            names.append(path.relative_to(ROOT).as_posix())
    for file in pictures.PICTURES:
        if not pictures.is_current(file, ROOT / file):
            names.append(file)
    return names


def write() -> None:
    """Write every generated file that differs."""
    for name in outdated():
        if name in pictures.PICTURES:
            (ROOT / name).write_bytes(pictures.draw(name))
        else:
            (ROOT / name).write_text(generated_texts()[ROOT / name], encoding="utf-8")
        sys.stdout.write(f"written: {name}\n")


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, report differences")
    if not parser.parse_args().check:
        write()
        return
    names = outdated()
    for name in names:
        sys.stdout.write(f"out of date: {name}; run `python docs/generate.py`\n")
    raise SystemExit(bool(names))


if __name__ == "__main__":
    main()
