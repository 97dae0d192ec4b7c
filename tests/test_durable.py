"""Files that survive a power failure, and the record by which damage is noticed."""

import os

import pytest

from ofb_hf.durable import DIGESTS_FILE, damaged_file, flush, move, write_digests


@pytest.fixture
def folder(tmp_path):
    """A folder with two files, one of them in a subfolder, and a record of both."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / "below" / "state").write_text("{}")
    write_digests(folder)
    return folder


def test_undamaged_files_are_recognised(folder):
    assert damaged_file(folder) is None
    (folder / "added later").write_text("by somebody else")
    assert damaged_file(folder) is None


@pytest.mark.parametrize("name", ["weights", "below/state", DIGESTS_FILE])
@pytest.mark.parametrize("damage", ["emptied", "zeros", "cut", "one bit", "missing"])
def test_every_damage_is_noticed_and_named(folder, name, damage):
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "missing" and name == DIGESTS_FILE:
        pytest.skip("a folder without a record is one of an earlier version")
    if damage == "missing":
        file.unlink()
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "zeros":
        file.write_bytes(bytes(len(content)))
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[0] ^= 1
        file.write_bytes(content)
    assert damaged_file(folder) == name


def test_content_is_on_the_disk_before_its_name(folder, tmp_path, monkeypatch):
    """What a power failure cannot be asked to show: the order of calls."""
    calls = []
    opened = {}
    os_open, os_replace = os.open, os.replace

    def note_open(path, *args, **kwargs):
        descriptor = os_open(path, *args, **kwargs)
        opened[descriptor] = os.fspath(path)
        return descriptor

    def note_replace(source, target):
        calls.append(("rename", os.fspath(target)))
        os_replace(source, target)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(("flush", opened[file])))
    monkeypatch.setattr(os, "replace", note_replace)
    place = tmp_path / "place"
    move(folder, place)
    names = [*sorted(path for path in place.rglob("*")), place]
    inside = {str(folder / name.relative_to(place)) for name in names}
    renamed = calls.index(("rename", str(place)))
    assert {path for _, path in calls[:renamed]} == inside
    assert calls[renamed + 1 :] == [("flush", str(tmp_path))]


def test_what_is_missing_cannot_be_flushed(tmp_path):
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "nothing")
