"""Runs `flowvqtalker` for a shell script in forks of one process, which has imported everything.

A new interpreter needs seconds for that, and a script starts many.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("flowvqtalker.data", "flowvqtalker.train", "flowvqtalker_eval.tables", "flowvqtalker_eval.figures")
MODULES = ("flowvqtalker_eval.study.commands", "flowvqtalker.pipeline", "matplotlib.pyplot", "sklearn.manifold")

#: Stands in for the command. It hands over its arguments, folder, environment and streams, and ends as the fork does.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    message = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [message], [0, 1, 2])
    sys.exit(server.recv(1)[0])
"""


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[None]:
    """Within the block ``folder`` holds an executable `flowvqtalker`, for scripts that run one command at a time."""
    address = str(folder / "socket")
    client = folder / "flowvqtalker"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield
    finally:
        server.kill()
        server.wait()


def arguments(address: str) -> list[str]:
    """Arguments of a command. It returns in a fork with the command's folder, environment and streams."""
    for package in PACKAGES:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for name in MODULES:
        importlib.import_module(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
                child = os.fork()
                if not child:
                    given, folder, environment = json.loads(message)
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    os.chdir(folder)
                    os.environ.clear()
                    os.environ.update(environment)
                    return list(given)
                for stream in streams:
                    os.close(stream)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                connection.send(bytes([code % 256]))


if __name__ == "__main__":
    from flowvqtalker.cli import main

    code = main(arguments(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # what ends libraries at exit would wait for their threads, which a fork does not have
