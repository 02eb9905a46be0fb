"""Training in several processes equals one process with a larger batch, whatever ends and resumes it."""

from __future__ import annotations

import csv
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.run import main as torchrun

from flowvqtalker.errors import UserError
from flowvqtalker.train.loop import fit
from tests.train.test_loop import CONFIG, Toy

#: Items of a step, however many processes share them.
_ITEMS = 8


class Mortal(Toy):
    """The process with this number dies without a word at the end of a step."""

    def __init__(self, rank: int, dies_at: int) -> None:
        super().__init__(dropout=0.0)
        self.rank, self.dies_at = rank, dies_at

    def on_step_end(self, step: int) -> None:
        super().on_step_end(step)
        if step + 1 == self.dies_at and int(os.environ["RANK"]) == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def train(out: Path, stage: Callable[[], Toy], world: int, *, accumulate: int = 1, resume: bool = False) -> list[int]:
    """Train in forked processes, with the variables that torchrun sets, and return their exit codes."""
    config = replace(CONFIG, batch_size=_ITEMS // world // accumulate, accumulate=accumulate, devices=world)
    if world == 1:
        fit(stage(), config, out, resume)
        return [0]
    port = free_port()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
                os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                fit(stage(), config, out, resume)
                code = 0
            except UserError as error:
                logging.getLogger(__name__).warning("%s", error)
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def losses(out: Path) -> list[list[float]]:
    with open(out / "log.csv", newline="") as file:
        return [[float(row[key]) for key in ("step", "g/loss", "d/loss", "g/hidden")] for row in csv.DictReader(file)]


def same(one: Path, other: Path, first: int = 0) -> None:
    """The same losses, from the log's row ``first`` on, and the same weights."""
    mine, theirs = (torch.tensor(losses(out)[first:]) for out in (one, other))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    state, other_state = (
        torch.load(out / "checkpoint.pt", weights_only=True)["parts"]["model"] for out in (one, other)
    )
    for key, value in state.items():
        torch.testing.assert_close(other_state[key], value, atol=1e-5, rtol=1e-5)


def plain() -> Toy:
    return Toy(dropout=0.0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    out = tmp_path_factory.mktemp("alone")
    train(out, plain, 1)
    return out


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 2), (4, 1)])
def test_shared_steps_equal_those_of_one_process(alone: Path, tmp_path: Path, world: int, accumulate: int) -> None:
    assert train(tmp_path / "run", plain, world, accumulate=accumulate) == [0] * world
    same(alone, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_equals_one_process(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(folder / "src")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = Path(__file__).with_name("toy_run.py")
    torchrun(["--standalone", "--nproc-per-node", "2", str(script), str(tmp_path / "run")])
    same(alone, tmp_path / "run")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(
    alone: Path, tmp_path: Path, before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    assert train(out, lambda: Toy(stop_at=5, dropout=0.0), before) == [0] * before
    assert train(out, plain, after, resume=True) == [0] * after
    same(alone, out, first=-1)  # a row averages the steps since the last one or since the start
    assert "order of the data" not in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process_ends_the_run_and_it_resumes(alone: Path, tmp_path: Path, rank: int) -> None:
    out = tmp_path / "run"
    codes = train(out, lambda: Mortal(rank, dies_at=6), 2)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 2  # a user error, not a traceback or a process that waits for ever
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    assert train(out, plain, 2, resume=True) == [0, 0]
    same(alone, out, first=-1)


def test_another_number_of_items_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "run", lambda: Toy(stop_at=5, dropout=0.0), 1)
    fit(plain(), replace(CONFIG, batch_size=3), tmp_path / "run", resume=True)
    assert "a step read 8 items and reads 3" in caplog.text
