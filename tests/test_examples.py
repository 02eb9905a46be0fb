"""The examples run."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path

import pytest

from flowvqtalker.io.video import probe

from .conftest import babble, write_wav

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_ray_serve(tmp_path, tiny_weights, portrait_file, monkeypatch):
    """Two requests to a real Ray Serve on this machine: a video, and an error."""
    serve = pytest.importorskip("ray.serve")
    import httpx
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]))
    spec = importlib.util.spec_from_file_location("ray_serve", EXAMPLES / "ray_serve.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ray_serve", example)
    spec.loader.exec_module(example)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    try:
        serve.start(http_options={"port": port})
        replica = example.Animator.options(ray_actor_options={"num_cpus": 1}, autoscaling_config=None, num_replicas=1)
        serve.run(replica.bind(tiny_weights, "cpu", 1))
        speech = write_wav(tmp_path / "s.wav", babble(0.2))

        def post(emotion: str) -> httpx.Response:
            files = {"portrait": portrait_file.open("rb"), "speech": speech.open("rb")}
            return httpx.post(f"http://127.0.0.1:{port}/animate", files=files, data={"emotion": emotion}, timeout=120)

        found = post("happy")
        assert found.status_code == 200, found.text
        (tmp_path / "out.mp4").write_bytes(found.content)
        assert probe(tmp_path / "out.mp4").kind == "video"
        wrong = post("glad")
        assert wrong.status_code == 422 and "unknown emotion 'glad'" in wrong.json()["detail"]
    finally:
        serve.shutdown()
        ray.shutdown()
