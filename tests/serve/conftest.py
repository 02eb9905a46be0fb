"""A server in this process without workers, and a real one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.concurrency import run_in_threadpool

with warnings.catch_warnings():  # newer versions of Starlette prefer another HTTP client, and work with this one
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

from flowvqtalker.serve.app import create_app
from flowvqtalker.serve.examine import Examiner
from flowvqtalker.serve.settings import Settings


async def here(self, function, *args, **kwargs):
    """Stands in for ``Examiner.__call__``: examines in this process."""
    return await run_in_threadpool(functools.partial(function, *args, **kwargs))


@contextlib.contextmanager
def here_client(data: Path, weights: Path | None = None, **settings) -> Iterator[TestClient]:
    """A client of an application whose workers never start and whose uploads are examined in this process."""
    app = create_app(Settings(data=data, weights=weights, **settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Examiner, "__call__", here)
        yield TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
    app.state.server.examiner.close()
    app.state.server.store.close()


@pytest.fixture
def make_client(tmp_path, tiny_weights) -> Iterator[Callable[..., TestClient]]:
    """Makes clients, see :func:`here_client`."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(here_client(tmp_path / "data", tiny_weights, **settings))


class Process:
    """A server in a process of its own, on a free port."""

    def __init__(self, data: Path, weights: Path, *options: str) -> None:
        self.command = [sys.executable, "-m", "flowvqtalker", "serve", "--port", "0", "--data", str(data)]
        self.command += ["--weights", str(weights), *options]
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        assert "serves on http://" in line, line
        self.url = line.split()[3]
        self.client = httpx.Client(base_url=self.url, timeout=300)

    def kill(self, how: int = signal.SIGKILL) -> int:
        """End it."""
        self.client.close()
        self.process.send_signal(how)
        return self.process.wait(120)


@pytest.fixture(scope="session")
def real_server(tmp_path_factory, tiny_weights) -> Iterator[Process]:
    """A server with one worker and tiny networks."""
    server = Process(tmp_path_factory.mktemp("serve") / "data", tiny_weights)
    yield server
    server.kill(signal.SIGTERM)
