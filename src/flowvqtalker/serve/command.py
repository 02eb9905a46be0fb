"""The command ``serve``."""

from __future__ import annotations

import ipaddress
import multiprocessing
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import uvicorn

from flowvqtalker.errors import UserError
from flowvqtalker.options import Folder
from flowvqtalker.serve.app import create_app
from flowvqtalker.serve.settings import Settings, parse_duration

__all__ = ["Serve"]

_SHORTEST_TOKEN = 16
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CONNECTIONS = 512


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a web page and an HTTP API. Jobs and files live in a folder and survive a kill and a restart.

    On this machine alone nothing else is needed. To be reached from others, give --host and --token.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """Port; 0 takes a free one."""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Processes that render; the processor's cores are shared out among them."""
    data: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("flowvqtalker-data")
    """Folder of jobs, uploads and results."""
    token: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOKEN")] = ()
    """Who may use the server, 16 characters or more for each client. Default: the variable FLOWVQTALKER_TOKEN, several
    with commas between; on 127.0.0.1 none is needed."""
    keep: Annotated[str, tyro.conf.arg(metavar="TIME")] = "24h"
    """How long videos and unused uploads are kept: a number and s, m, h or d."""
    url_hosts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST")] = ()
    """Hosts that media may be fetched from, for instance *.example.org. Default: none, URLs are refused."""
    public_names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST")] = ()
    """Names by which clients address the server. Default: on 127.0.0.1 that and localhost, elsewhere any."""
    max_upload: Annotated[int, tyro.conf.arg(metavar="MB")] = 256
    """Largest request in megabytes."""
    max_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 3600.0
    """Longest speech."""
    max_queue: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    """Jobs that wait or run at most; one client may have a quarter of them."""
    live: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Live sessions at the same time; each has a process of its own, which stays. 0 offers none."""
    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """Where the image generator runs: auto (a GPU if there is one), cpu, cuda or mps."""
    dtype: str = "auto"
    """Type of the image generator's arithmetic: auto (the fastest on the device), float32 or bfloat16."""

    def settings(self) -> Settings:
        """The checked settings.

        Raises:
            UserError: for the first that cannot be used.
        """
        from flowvqtalker.batch.job import weights_hashes

        given = self.token or tuple(filter(None, os.environ.get("FLOWVQTALKER_TOKEN", "").split(",")))
        short = [token for token in given if len(token) < _SHORTEST_TOKEN]
        if short:
            lacks = f"a token has {len(short[0])} characters, {_SHORTEST_TOKEN} are needed"
            raise UserError(f"{lacks}; make one with `openssl rand -hex 16`")
        if not _is_loopback(self.host) and not given:
            raise UserError(f"host {self.host} can be reached by others; give a --token (`openssl rand -hex 16`)")
        for name in ("workers", "max_upload", "max_seconds", "max_queue"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be a number from 1, got {getattr(self, name):g}")
        if self.live < 0:
            raise UserError(f"live must be a number from 0, got {self.live}")
        if self.weights is not None:  # the package's own are known, and looking at them takes seconds
            weights_hashes(self.weights)
        names = self.public_names or (tuple({*_LOOPBACK, self.host}) if _is_loopback(self.host) else ())
        return Settings(
            data=self.data.absolute(),
            workers=self.workers,
            weights=self.weights and self.weights.absolute(),
            device=self.device,
            dtype=self.dtype,
            tokens=given,
            hosts=names,
            keep=parse_duration(self.keep),
            url_hosts=self.url_hosts,
            max_upload=self.max_upload << 20,
            max_seconds=self.max_seconds,
            max_queue=self.max_queue,
            max_client=max(1, self.max_queue // 4),
            max_live=self.live,
        )

    def run(self) -> None:
        """Serve until the process is told to stop."""
        app = create_app(self.settings())
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listening = socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            app.state.server.close()
            raise UserError(
                f"cannot listen on {self.host}:{self.port} ({error.strerror}); choose another --port"
            ) from error
        shown = f"[{self.host}]" if ":" in self.host else self.host
        print(f"flowvqtalker serves on http://{shown}:{listening.getsockname()[1]} (Ctrl+C stops it)", flush=True)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:  # do not wait for what they do
            for child in multiprocessing.active_children():
                child.terminate()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
