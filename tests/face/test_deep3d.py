"""Deep3DFaceRecon files in every kind they come in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from flowvqtalker.errors import UserError
from flowvqtalker.face.deep3d import read_deep3d

ROWS = np.random.default_rng(0).normal(size=(5, 257)).astype(np.float32)
PARTS = {"id": ROWS[:, :80], "exp": ROWS[:, 80:144], "angle": ROWS[:, 224:227], "trans": ROWS[:, 254:257]}

WRITERS: dict[str, Callable[[Path], object]] = {
    "whole.mat": lambda path: savemat(path, {"coeff": ROWS, "other": np.zeros((3, 73))}),
    "sadtalker.mat": lambda path: savemat(path, {"coeff_3dmm": ROWS[:, :73], "full_3dmm": ROWS}),
    "parts.mat": lambda path: savemat(path, {**PARTS, "tex": ROWS[:, 144:224], "gamma": ROWS[:, 227:254]}),
    "whole.npy": lambda path: np.save(path, ROWS),
    "frames.npy": lambda path: np.save(path, ROWS[:, None]),
    "parts.npz": lambda path: np.savez(path, **PARTS),
    "commas.txt": lambda path: np.savetxt(path, ROWS, delimiter=","),
    "blanks.txt": lambda path: np.savetxt(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_kinds_give_the_same(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    found = read_deep3d(tmp_path / name)
    assert found.identity is not None
    assert np.allclose(found.identity, ROWS[:, :80], atol=1e-6)
    assert np.allclose(found.expression, ROWS[:, 80:144], atol=1e-6)
    assert np.allclose(found.pose, np.concatenate([ROWS[:, 224:227], ROWS[:, 254:257]], axis=1), atol=1e-6)
    assert found.expression.dtype == np.float32


def test_one_row_and_one_identity(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", ROWS[0])
    assert read_deep3d(tmp_path / "one.npy").pose.shape == (1, 6)
    names = {"identity": ROWS[0, :80], "expression": PARTS["exp"]}
    names |= {"angles": PARTS["angle"], "translation": PARTS["trans"]}
    np.savez(tmp_path / "clip.npz", **names)
    identity = read_deep3d(tmp_path / "clip.npz").identity
    assert identity is not None
    assert np.array_equal(identity, np.repeat(ROWS[:1, :80], 5, axis=0))
    names.pop("identity")
    np.savez(tmp_path / "nobody.npz", **names)
    assert read_deep3d(tmp_path / "nobody.npz").identity is None


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.npy": (lambda path: None, "not found"),
    "table.csv": (lambda path: path.write_text("1"), r"allowed are \.mat, \.npy, \.npz, \.txt"),
    "narrow.npy": (lambda path: np.save(path, ROWS[:, :70]), r"shape \(5, 70\).*\(T, 257\) numbers are needed"),
    "empty.npy": (lambda path: np.save(path, ROWS[:0]), "are needed"),
    "nothing.npy": (lambda path: path.write_bytes(b""), "cannot be read"),
    "garbage.mat": (lambda path: path.write_bytes(b"garbage" * 100), "cannot be read"),
    "garbage.npz": (lambda path: path.write_bytes(b"garbage" * 100), "cannot be read"),
    "words.txt": (lambda path: path.write_text("no numbers"), "cannot be read"),
    "ragged.txt": (lambda path: path.write_text("1 2 3\n1 2"), "rows of 2 and 3 numbers"),
    "foreign.mat": (lambda path: savemat(path, {"landmarks": np.zeros((5, 68))}), r"holds landmarks \(5, 68\)"),
    "lengths.npz": (lambda path: np.savez(path, **{**PARTS, "angle": ROWS[:3, 224:227]}), "differ in length"),
    "nan.npy": (lambda path: np.save(path, np.where(np.arange(5)[:, None] == 3, np.nan, ROWS)), "first in row 3"),
    "objects.npy": (lambda path: np.save(path, np.array([None, 1]), allow_pickle=True), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_fail_with_a_reason(name: str, tmp_path: Path) -> None:
    write, reason = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=reason) as caught:
        read_deep3d(tmp_path / name)
    assert "\n" not in str(caught.value)
