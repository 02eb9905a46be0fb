"""The gallery of portraits: derived pictures, its choice of people, rows that tell what happened."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.pipeline import Talker

from .conftest import babble

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("gallery", BENCHMARKS / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gallery"]


def test_choice_can_be_read_and_covers_every_kind(gallery):
    choices = gallery.read_choice(BENCHMARKS / "gallery.csv")
    kinds = " ".join(one.kind for one in choices)
    wanted = ("glasses", "beard", "dark skin", "light skin", "hat", "hair over", "painted", "grey", "96 px", "tilted")
    for kind in wanted:
        assert kind in kinds, kind
    assert {one.derive.split()[0] for one in choices if one.derive} == set(gallery.DERIVED)
    assert len({one.file for one in choices}) == len(choices)


def test_choice_fails_with_a_reason(gallery, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("file,kind,derive\na.png,x,melted\n")
    with pytest.raises(UserError, match="unknown derivation 'melted'; choose one of grey"):
        gallery.read_choice(bad)
    bad.write_text("file,kind\na.png,x\n")
    with pytest.raises(UserError, match="columns file, kind, derive"):
        gallery.read_choice(bad)


def test_nobody_of_the_training_split_is_shown(gallery, tmp_path):
    """By hash omi_22 is held out and omi_1 is not."""
    from flowvqtalker.data.splits import split_of

    people = {split_of(f"p{i}"): f"p{i}" for i in range(60)}
    (tmp_path / "faces.csv").write_text(f"file,identity\na.png,{people['val']}\nb.png,{people['train']}\n")
    gallery.check_held_out(tmp_path / "faces", [gallery.Choice("a.png", "x")])
    with pytest.raises(UserError, match=r"^b\.png may have been trained on"):
        gallery.check_held_out(tmp_path / "faces", [gallery.Choice("a.png", "x"), gallery.Choice("b.png", "x")])


def test_derived_pictures(gallery, astronaut):
    grey = gallery.derive(astronaut, "grey")
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert gallery.derive(astronaut, "") is astronaut
    assert gallery.derive(astronaut, "width 96", 192.0).shape == (256, 256, 3)
    turned = gallery.derive(astronaut, "turn 180")
    side = turned.shape[0]
    edge = (side - 512) // 2
    inner = turned[edge : edge + 512, edge : edge + 512]
    assert np.abs(inner[2:-2, 2:-2].astype(float) - astronaut[::-1, ::-1][2:-2, 2:-2]).mean() < 1
    assert gallery.derive(astronaut, "whole").shape == (1200, 1600, 3)
    assert gallery.derive(astronaut, "cut", 90.0).shape == (512, 271, 3)
    painted = gallery.derive(astronaut, "painted")
    assert 1 < np.abs(painted.astype(float) - astronaut).mean() < 40
    with pytest.raises(UserError, match="unknown derivation"):
        gallery.derive(astronaut, "melted")


def test_a_row_holds_every_column_or_the_reason(gallery, tiny_weights, astronaut):
    talker = Talker.load(tiny_weights, device="cpu", dtype="float32")
    made = gallery.Gallery(talker, babble(1.0).astype(np.float32), scores=False)
    row = made.row(gallery.Choice("astronaut.png", "plain"), astronaut)
    assert len(row.cells) == len(gallery.COLUMNS)
    assert all(cell.shape == (256, 256, 3) for cell in row.cells)
    assert not np.array_equal(row.cells[0], row.cells[1])
    # The whole picture holds the background, too, where nothing changes: its lower left corner.
    assert np.abs(row.cells[-1][200:, :40].astype(float) - gallery._fitted(astronaut)[200:, :40]).max() < 2
    assert gallery.strip(row).shape == (256 + 26, 256 * len(gallery.COLUMNS), 3)
    empty = made.row(gallery.Choice("wall.png", "a wall"), np.full((200, 200, 3), 90, np.uint8))
    assert "no face found" in empty.said
    assert len(empty.cells) == len(gallery.COLUMNS)
