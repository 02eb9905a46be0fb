"""Whole files or none, with and without unnamed temporary files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io import atomic
from flowvqtalker.io.atomic import atomic_folder, atomic_path, atomic_write


@pytest.fixture(params=["unnamed", "named"], autouse=True)
def kind(request, monkeypatch):
    if request.param == "named":
        monkeypatch.setattr(atomic, "_unnamed", lambda folder: None)
    return request.param


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "a:b.txt"
    target.write_text("older")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "older"
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a:b.txt"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_left_after_an_error(tmp_path):
    def fail():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


_LEFT = [(".12345678.part", "named"), (".flowvqtalker.part", "unnamed")]


@pytest.mark.parametrize("name, kind", _LEFT, indirect=["kind"])
def test_what_a_killed_process_left_goes(tmp_path, name, kind):
    for left in (name, ".87654321.part"):
        (tmp_path / left).write_text("half")
    os.utime(tmp_path / name, (0, 0))
    for text in ("older", "new"):
        atomic_write(tmp_path / "a", lambda path, text=text: path.write_text(text))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".87654321.part", "a"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("older")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", lambda path: path.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write(tmp_path / "none" / "a", lambda path: path.write_text("x"))


def test_a_folder_appears_whole(tmp_path: Path):
    def fail():
        with atomic_folder(tmp_path / "set") as beside:
            (beside / "half").touch()
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "older").touch()
    (tmp_path / "set.writing").mkdir()  # of a killed process
    with atomic_folder(tmp_path / "set") as beside:
        (beside / "new").touch()
        assert (tmp_path / "set" / "older").exists()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["set", "set/new"]


def test_a_folder_moved_aside_comes_back(tmp_path):
    """A process killed between the two renames must not cost the old folder."""
    (tmp_path / "set.old").mkdir()
    (tmp_path / "set.old" / "older").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "set"):
        1 / 0  # noqa: B018
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["set", "set/older"]
