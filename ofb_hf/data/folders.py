"""Folders of image files: which images there are, which splits, and what their labels are.

`datasets` finds files by patterns. A name with `[`, `*` or `?` is a pattern of its own, links to
folders are not followed, and `Train/` is no split. Here files are listed, and every image is either
in a split or among those that are not used.
"""

import glob
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, Value
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from PIL import Image as PILImage

from .columns import find_label_column

# Words in the names of splits, as `datasets` knows them, in order of preference. It knows them in
# small letters only, and takes the images of `Val` for training images.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
# Tables of labels next to image files, as `datasets` knows them.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files of these formats hold images; a folder with them is not searched for image files.
TABLES = (".parquet", ".tar")
# Of these files PIL knows the beginning, and not what is in them.
CONTAINERS = (".h5", ".hdf")
# Of a folder: hidden files, and what some systems and Python put into archives.
IGNORED = (".", "__MACOSX", "__pycache__")
# Suffixes of files in archives that `datasets` reads as numbers, and as text.
NUMBER_SUFFIXES = {suffix for suffix, read in WebDataset.DECODERS.items() if read is int}
TEXT_SUFFIXES = {"txt", "text", "transcript", "json", "jsn"}
MOST_NAMED = 5
WHOLE_FOLDER = "train"  # the name of the only split of a folder without split folders


@dataclass(frozen=True)
class Splits:
    """Hold the splits of some data, and where they are.

    Attributes:
        rows: of every split; those of a stream are not read.
        places: split -> where its rows are, for messages.
        unused: what is in no split, for messages: "raw/ (31 images)".
    """

    rows: dict[str, Any]
    places: dict[str, str]
    unused: tuple[str, ...] = ()

    @classmethod
    def of_tables(cls, rows: dict[str, Any], folder: Path | None) -> "Splits":
        """Return splits of parquet files, archives, or a data set of the Hub.

        Args:
            rows: of every split.
            folder: where they are, None for the Hub.
        """
        places = {name: f"split {name}" for name in rows}
        images = 0 if folder is None else sum(map(is_image, files_below(folder)))
        if images:
            return cls(rows, places, (f"{number_of(images, 'image file')} next to tables",))
        return cls(rows, places)


# -------------------------------------------------------------------------------- names of splits


def meaning(name: str, any_case: bool = True) -> str | None:
    """Return which split a name stands for, a key of `SPLIT_WORDS`; None if it is no split's.

    `Val`, `imagenet-val` and `val2017` stand for "validation".

    Args:
        name: of a folder or a file.
        any_case: whether capitals are read as small letters.
    """
    words = BETWEEN_WORDS.split(name.casefold() if any_case else name)
    for split, known in SPLIT_WORDS.items():
        if not set(words).isdisjoint(known):
            return split
    return None


def is_split_word(name: str) -> bool:
    """Return whether a name is that of a split and nothing else: `Val`, but not `val2017`."""
    return any(name.casefold() in known for known in SPLIT_WORDS.values())


def find_split(available: Iterable[str], wanted: str, field: str) -> str | None:
    """Return the split that a user means by a name: this one, or the only one of its meaning.

    Args:
        available: the names of the splits.
        wanted: the name that is looked for.
        field: the setting that has this name, for the message.

    Raises:
        ValueError: if several splits have the meaning of the name, and none has the name.
    """
    names = sorted(available)
    if wanted in names:
        return wanted
    same = [name for name in names if name.casefold() == wanted.casefold()]
    # Any name with a word of a split in it would be too much: `test_answers` is not `test`.
    if not same and is_split_word(wanted):
        same = [name for name in names if meaning(name) == meaning(wanted)]
    if len(same) > 1:
        raise ValueError(
            f"{field} is {wanted!r}, which may be any of {same}; give the name of one of them with "
            f"--{field}."
        )
    return same[0] if same else None


def find_eval_split(available: Iterable[str], train_split: str) -> str | None:
    """Return the split to evaluate on if none is named: for validation, or else for a test.

    Args:
        available: the names of the splits.
        train_split: the one that is trained on.

    Raises:
        ValueError: if several qualify.
    """
    others = sorted(name for name in available if name != train_split)
    for split in ("validation", "test"):
        found = [name for name in others if meaning(name) == split]
        for word in SPLIT_WORDS[split]:
            plain = [name for name in found if name.casefold() == word]
            if len(plain) == 1:
                return plain[0]
        if len(found) > 1:
            raise ValueError(
                f"the splits {found} may all be meant to evaluate on; name one with --eval_split."
            )
        if found:
            return found[0]
    return None


# --------------------------------------------------------------------------------------- listing


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, at any depth, relative to it and in order.

    Links are followed, unless they lead back. Hidden files and folders are left out.

    Raises:
        ValueError: for a folder that cannot be read, and for a link to nowhere that may have been
            one to a folder.
    """
    found: list[str] = []

    def visit(place: str, relative: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(place)
        if real in above:
            return
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(IGNORED):
                    continue
                path = relative + entry.name
                if entry.is_dir():
                    visit(entry.path, f"{path}/", (*above, real))
                    continue
                is_dangling = entry.is_symlink() and not os.path.exists(entry.path)
                if is_dangling and not is_image(path):  # as an image it counts as a bad one
                    raise ValueError(
                        f"{entry.path} is a link to {os.readlink(entry.path)}, which does not "
                        "exist; mend the link or remove it."
                    )
                found.append(path)

    try:
        visit(str(folder), "", ())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error}.") from error
    return sorted(found)


def is_image(path: str) -> bool:
    """Return whether a file has the suffix of an image that PIL opens."""
    suffix = posixpath.splitext(path)[1].lower()
    # PIL also knows formats that it can write but not open.
    is_known = PILImage.registered_extensions().get(suffix) in PILImage.OPEN
    return is_known and suffix not in CONTAINERS


def is_metadata(path: str) -> bool:
    """Return whether a file is a table of labels."""
    return posixpath.basename(path) in METADATA_NAMES


def is_table(path: str) -> bool:
    """Return whether a file holds images in rows."""
    return path.endswith(TABLES) and not is_metadata(path)


def split_folders(
    images: Iterable[str], metadata: Iterable[str] = (), named: Iterable[str] = ()
) -> dict[str, str]:
    """Return the folders that are splits: name -> path, both relative to where the images are from.

    They lie next to each other, at any depth: an archive often has a folder around it. A split
    holds class folders, or a table describes its images; a class holds only images, whatever it is
    called.

    Args:
        images: paths of images.
        metadata: paths of tables of labels.
        named: further names that are splits.

    Raises:
        ValueError: if there are splits in several places.
    """
    named = {name.casefold() for name in named}
    above = {posixpath.dirname(path) for path in metadata}
    found: dict[str, dict[str, str]] = {}  # parent -> name -> path
    parents = {posixpath.dirname(path) for path in images}
    for parent in parents | above:
        parts = parent.split("/")
        for depth, name in enumerate(parts, start=1):
            path = "/".join(parts[:depth])
            holds_classes = depth < len(parts)
            # A table speaks of the files of its own folder and of those below.
            is_described = any(not place or f"{path}/".startswith(f"{place}/") for place in above)
            is_named = meaning(name) is not None or name.casefold() in named
            if is_named and (holds_classes or is_described):
                found.setdefault("/".join(parts[: depth - 1]), {})[name] = path
    if not found:
        return {}
    depth_of = {place: 0 if not place else place.count("/") + 1 for place in found}
    least = min(depth_of.values())
    places = [place for place, depth in depth_of.items() if depth == least]
    if len(places) > 1:
        raise ValueError(
            f"there are folders of splits in {sorted(places)}; name one of these folders as the "
            "data, or bring all images of a split into one folder."
        )
    return dict(sorted(found[places[0]].items()))


def literally(path: str) -> str:
    """Return the pattern that stands for one file alone: `datasets` takes all names as patterns."""
    # Of other addresses some have a `?` for their parameters, and no file has such a name.
    is_file = "://" not in path or (path.startswith("hf://") and "::" not in path)
    return glob.escape(path) if is_file else path


def table_location(folder: Path, tables: list[str]) -> tuple[str, dict[str, Any]]:
    """Return what `load_dataset` takes for a folder with parquet files or archives.

    That is the folder, unless it would misread names in it: as patterns, or `Train` as no split.

    Args:
        folder: the folder.
        tables: the files, relative to it.
    """
    place = os.path.abspath(folder)
    words = {part for table in tables for part in table.split("/")}
    is_plain = literally(place) == place and all(literally(word) == word for word in words)
    if is_plain and all(meaning(word) == meaning(word, any_case=False) for word in words):
        return str(folder), {}
    by_folder = {table: _first_meaning(table.split("/")[:-1]) for table in tables}
    by_name = {table: _of_a_file(posixpath.basename(table)) for table in tables}
    data_files: dict[str, list[str]] = {}
    for split_of in (by_folder, by_name, dict.fromkeys(tables, WHOLE_FOLDER)):
        for table, split in split_of.items():
            if split is not None:
                data_files.setdefault(split, []).append(literally(f"{place}/{table}"))
        if data_files:
            break
    is_archive = Counter(table.endswith(".tar") for table in tables).most_common(1)[0][0]
    return "webdataset" if is_archive else "parquet", {"data_files": data_files}


@contextmanager
def explained_broken_tables(name: str, folder: Path | None) -> Iterator[None]:
    """Replace the errors of tables and archives that cannot be read by one that names them.

    Args:
        name: of the data, for the message.
        folder: where the files are, None for the Hub.

    Raises:
        ValueError: instead of the errors of `datasets`, pyarrow and tarfile.
    """
    try:
        yield
    except (DatasetGenerationError, pa.ArrowException, tarfile.TarError, ValueError) as error:
        if not _is_of_a_file(error):
            raise
        broken = [] if folder is None else _broken_tables(folder)
        more = f"; and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
        why = "; ".join(broken[:MOST_NAMED]) + more or error.__cause__ or error
        raise ValueError(
            f"{name} cannot be read: {why}. Repair the files or take them out."
        ) from error


def _is_of_a_file(error: Exception) -> bool:
    """Return whether an error came from reading a table, an archive or a file in an archive."""
    by_type = (DatasetGenerationError, pa.ArrowException, tarfile.TarError)
    by_type += (UnicodeDecodeError, json.JSONDecodeError)
    return isinstance(error, by_type) or str(error).startswith("invalid literal for int()")


def _broken_tables(folder: Path) -> list[str]:
    broken = []
    for table in filter(is_table, files_below(folder)):
        try:
            if table.endswith(".tar"):
                with tarfile.open(folder / table) as archive:
                    broken += [f"{table} ({why})" for why in _undecodable_files(archive)]
            else:
                pq.read_metadata(folder / table)
        except (pa.ArrowException, tarfile.TarError, OSError) as error:
            why = str(error).partition("\n")[0].rstrip(".:")  # tarfile lists what it has tried
            broken.append(f"{table} ({why})")
    return broken


def _undecodable_files(archive: tarfile.TarFile) -> list[str]:
    """Return the files of an archive whose suffix promises something else than they hold."""
    found = []
    for member in archive.getmembers():
        suffix = member.name.rpartition(".")[2].lower()
        if member.isfile() and suffix in TEXT_SUFFIXES | NUMBER_SUFFIXES:
            try:
                WebDataset.DECODERS[suffix](archive.extractfile(member).read())
            except ValueError as error:
                found.append(f"{member.name}: {error}")
                if suffix in NUMBER_SUFFIXES:
                    found[-1] += (
                        f"; a .{suffix} file holds a number, and names of classes belong into .txt "
                        "files, with --label_column txt"
                    )
    return found


def _first_meaning(parts: list[str]) -> str | None:
    return next(filter(None, map(meaning, parts)), None)


def _of_a_file(name: str) -> str | None:
    """Return the split of a file by its name alone."""
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", name)
    return shard[1] if shard else meaning(name)


# ------------------------------------------------------------------------------------- their rows


def load_folder(
    folder: Path, files: list[str], named: Iterable[str], label_column: str | None
) -> Splits:
    """Return the images of a folder, with a label for each: the name of the folder it lies in.

    Where tables of metadata describe the images, as `datasets` knows them, labels and all other
    columns come from there, and images that they do not list are not used.

    Args:
        folder: holds image files.
        files: all files in it, relative to it.
        named: names of folders that are splits, besides those that `meaning` knows.
        label_column: the column with the labels, if the user named one.

    Returns:
        Rows of the split folders; of the whole folder as "train" if there are none.

    Raises:
        ValueError: for labels that cannot be what is meant, and tables of metadata that cannot be
            used.
    """
    images = [path for path in files if is_image(path)]
    tables = [path for path in files if is_metadata(path)]
    places = split_folders(images, tables, named) or {WHOLE_FOLDER: ""}
    parts, outside = _divided(images, places)
    unused = _counted(outside, places)
    others = [path for path in files if not is_image(path) and not is_metadata(path)]
    if others:
        count = number_of(len(others), "file")
        unused.append(f"{count} without the suffix of an image, e.g. {others[0]}")
    if tables:
        rows, listed = _described_rows(folder, places, parts, tables, label_column)
        missing = len(set(images) - set(outside) - listed)
        if missing:
            unused.append(f"{number_of(missing, 'image')} not listed in {_named(tables)}")
    else:
        rows = _labelled_rows(folder, parts)
    shown = {name: f"{place}/" if place else "the folder" for name, place in places.items()}
    return Splits(rows, shown, tuple(unused))


def _divided(
    images: Iterable[str], places: dict[str, str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return the images of every split, and those that are in none."""
    parts: dict[str, list[str]] = {name: [] for name in places}
    outside = []
    for path in images:
        name = _split_of(path, places)
        (outside if name is None else parts[name]).append(path)
    return parts, outside


def _split_of(path: str, places: dict[str, str]) -> str | None:
    for name, place in places.items():
        if not place or path.startswith(f"{place}/"):
            return name
    return None


def _counted(outside: list[str], places: dict[str, str]) -> list[str]:
    """Return where images are that are not used, with their numbers: "raw/ (31 images)"."""
    around = posixpath.dirname(next(iter(places.values())))
    counts: Counter[str] = Counter()
    for path in outside:
        inside = path.removeprefix(f"{around}/") if around else path
        before = path.removesuffix(inside)
        top, _, below = inside.partition("/")
        counts[f"{before}{top}/" if below else f"files in {before or 'the folder'}"] += 1
    return [f"{place} ({number_of(count, 'image')})" for place, count in sorted(counts.items())]


def number_of(count: int, what: str) -> str:
    """Return "1 image" or "2 images"."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _labelled_rows(folder: Path, parts: dict[str, list[str]]) -> dict[str, Dataset]:
    """Return rows {"image", "label"} of images in class folders."""
    used = [path for paths in parts.values() for path in paths]
    classes = sorted({_class_of(path) for path in used})
    depths = {path.count("/"): path for path in used}  # with an example
    if len(classes) < 2 or len(depths) > 1:
        examples = ", ".join(sorted(depths.values())[:MOST_NAMED])
        raise ValueError(
            "no column holds labels, and images in folders need one folder per class, all at the "
            f"same depth, and at least two of them: the images of {folder} lie in "
            f"{number_of(len(classes), 'folder')}, at {number_of(len(depths), 'depth')}, for "
            f"example {examples}."
        )
    if all(map(is_split_word, classes)):
        raise ValueError(
            f"the images of {folder} lie in folders called {classes}: these are splits, and there "
            "are no classes. Expected one folder per class in each of them, e.g. train/cat/1.png."
        )
    index_of = {name: index for index, name in enumerate(classes)}
    features = Features({"image": Value("string"), "label": ClassLabel(names=classes)})
    rows = {}
    for name, paths in parts.items():
        columns = {
            "image": [str(folder / path) for path in paths],
            "label": [index_of[_class_of(path)] for path in paths],
        }
        # As a cast of strings, because `Dataset` would encode a million paths one by one.
        rows[name] = Dataset.from_dict(columns, features=features).cast_column("image", Image())
    return rows


def _class_of(path: str) -> str:
    return posixpath.basename(posixpath.dirname(path))


# --------------------------------------------------------------------------------- with metadata


def _described_rows(
    folder: Path,
    places: dict[str, str],
    parts: dict[str, list[str]],
    tables: list[str],
    label_column: str | None,
) -> tuple[dict[str, Dataset], set[str]]:
    """Return the rows of tables of metadata, and the images that these list."""
    named = _named(tables)
    try:
        content = pa.concat_tables(
            [_read_metadata(folder, table) for table in tables], promote_options="default"
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{named} have columns of different types: {error}.") from error
    # As `datasets` names them: file_name becomes image, left_file_name becomes left.
    new_names = {name: name for name in content.column_names}
    for name in filter(_names_files, new_names):
        new_names[name] = name[: -len("_file_name")] or "image"
    columns = [new for name, new in new_names.items() if new != name]
    content = content.rename_columns(list(new_names.values()))
    features = Features.from_arrow_schema(content.schema)
    try:
        find_label_column(features, label_column)
    except ValueError as error:
        raise ValueError(
            f"{error} These are the columns of {named} in {folder}: where there is such a file, "
            "labels come from it, and the names of folders are no classes. Add a column `label` "
            "to it, or move it out of the folder to take the names of folders as classes."
        ) from error
    listed = content[columns[0]].to_pylist()
    path, times = Counter(listed).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path} is listed {times} times in {named}; once is enough.")
    rows = {}
    for name, images in parts.items():
        chosen = [n for n, path in enumerate(listed) if path and _split_of(path, places) == name]
        if not chosen:
            raise ValueError(
                f"none of the {number_of(len(images), 'image')} of {places[name] or folder} is "
                f"listed in {named}; list them there, or move the one or the other out of the "
                "folder."
            )
        part = content.take(chosen).to_pydict()
        for column in columns:
            part[column] = [path and str(folder / path) for path in part[column]]
        rows[name] = Dataset.from_dict(part, features=features)
        for column in columns:
            rows[name] = rows[name].cast_column(column, Image())
    return rows, set(listed)


def _named(tables: list[str]) -> str:
    more = len(tables) - MOST_NAMED
    return ", ".join(tables[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read_metadata(folder: Path, name: str) -> pa.Table:
    """Return a table of metadata; its files are columns of paths relative to the folder."""
    path = folder / name
    try:
        if path.suffix == ".csv":
            # integers stay integers where one is missing
            rows = pd.read_csv(path).convert_dtypes()
            table = pa.Table.from_pandas(rows, preserve_index=False)
        elif path.suffix == ".jsonl":
            # A row may be long; a block of the whole file cuts none in two.
            whole = pyarrow.json.ReadOptions(block_size=path.stat().st_size + 1)
            table = pyarrow.json.read_json(path, read_options=whole)
        else:
            table = pq.read_table(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    columns = [column for column in table.column_names if _names_files(column)]
    if not columns:
        raise ValueError(
            f"{path} has the columns {table.column_names}; expected file_name, with the paths of "
            "the images. Add it, or move the file out of the folder."
        )
    for column in columns:
        paths = [_path_from(name, value) for value in table[column].to_pylist()]
        position = table.column_names.index(column)
        table = table.set_column(position, column, pa.array(paths, pa.string()))
    return table


def _names_files(column: str) -> bool:
    return column == "file_name" or column.endswith("_file_name")


def _path_from(table: str, value: str | None) -> str | None:
    """Return the path of an image that a table of metadata names relative to itself."""
    if value is None:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(table), value))
    if path.startswith(("../", "/")):
        raise ValueError(f"{table} lists {value!r}, which is outside of the folder.")
    return path
