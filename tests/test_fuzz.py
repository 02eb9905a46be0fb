"""Damaged inputs: some thousands of :mod:`tests.fuzzing` with a fresh seed, and every input that failed before."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from flowvqtalker.errors import UserError
from tests import fuzzing
from tests.serve.conftest import here_client

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 3000  # a number and not a time, which a busy machine would fill with too few


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    with here_client(tmp_path_factory.mktemp("server")) as client:
        yield {**fuzzing.kinds(tmp_path_factory.mktemp("seeds")), "http": fuzzing.requests(client)}


@pytest.mark.parametrize("file", sorted(path for path in CORPUS.rglob("*") if path.is_file()), ids=lambda p: p.name)
def test_what_failed_before(file, kinds, tmp_path):
    copy = shutil.copy(file, tmp_path)
    try:
        problem = fuzzing.try_input(kinds[file.parent.name], Path(copy))
    except UserError:
        problem = None
    assert problem is None


@pytest.mark.slow
def test_damaged_inputs_are_refused(kinds, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    found = fuzzing.fuzz(tmp_path, kinds, seed=seed, inputs=INPUTS)
    print(f"seed {seed}: {sum(found.inputs.values())} inputs")
    problems = [problem for problem, _ in found.failures.values()]
    assert not problems, f"python -m tests.fuzzing --seed {seed} --save FOLDER"
    assert min(found.inputs.values()) > 10 and found.refused > 100


@pytest.mark.parametrize(
    "fault, said", [(lambda p: 1 / 0, "ZeroDivisionError"), (lambda p: p.with_name("b").touch(), "left b")]
)
def test_faults_are_seen(fault, said, tmp_path):
    (tmp_path / "a").touch()
    assert said in fuzzing.try_input(fuzzing.Kind(fault, {}), tmp_path / "a")


def test_hangs_are_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzzing, "SLOWEST", 1)
    assert "Hang" in fuzzing.try_input(fuzzing.Kind(lambda path: [0 for _ in iter(int, 1)], {}), tmp_path / "a")
