"""A server in this process without workers, and a real one."""

from __future__ import annotations

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


@pytest.fixture
def make_client(tmp_path, tiny_weights, monkeypatch) -> Iterator[Callable[..., TestClient]]:
    """Makes a client of an application whose workers never start and whose uploads are examined in this process."""

    async def here(self, function, *args, **kwargs):
        return await run_in_threadpool(functools.partial(function, *args, **kwargs))

    monkeypatch.setattr(Examiner, "__call__", here)
    servers = []

    def make(**settings) -> TestClient:
        app = create_app(Settings(data=tmp_path / "data", weights=tiny_weights, **settings))
        servers.append(app.state.server)
        return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    yield make
    for server in servers:
        server.examiner.close()
        server.store.close()


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
