"""Many clients at once: do all get their own video, how quickly are other calls answered, how much memory is used?

    python benchmarks/serve.py PORTRAIT [--clients 24] [--seconds 0.2] [--weights FOLDER]

Each client sends speech of its own length and expects a video of that length, with its own identifier in the
watermark. docs/serve.md shows the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

RATE = 16_000


def speech(seconds: float, seed: int) -> bytes:
    """A wav file with something that has the loudness of speech."""
    generator = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    voice = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 12)) * (0.5 + 0.5 * np.sin(2 * np.pi * 4 * t))
    with tempfile.TemporaryFile() as file:
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(RATE)
            out.writeframes(((0.2 * voice + 0.01 * generator.standard_normal(len(t))) * 20_000).astype("<i2").tobytes())
        file.seek(0)
        return file.read()


def one(url: str, portrait: bytes, number: int, shortest: float) -> dict[str, float | bool]:
    """A client: uploads, waits, fetches, compares."""
    seconds = shortest + 0.04 * (number % 8)
    with httpx.Client(base_url=url, timeout=3600) as client:
        client.post("/v1/session")
        started = time.monotonic()
        files = {"portrait": portrait, "speech": speech(seconds, number)}
        while (
            answer := client.post("/v1/videos", files=files, data={"consent": "true", "seed": str(number)})
        ).status_code == 429:
            time.sleep(int(answer.headers["retry-after"]))
        answer.raise_for_status()
        uploaded = time.monotonic() - started
        video = answer.json()["id"]
        while (state := client.get(f"/v1/videos/{video}").json())["status"] in ("queued", "in_progress"):
            time.sleep(1)
        content = client.get(f"/v1/videos/{video}/content").content
        rows = client.get(f"/v1/videos/{video}/content?format=csv").text.splitlines()
        mark = client.post("/v1/verify", files={"file": content}).json()["watermark"]["identifier"]
        right = (
            state["status"] == "completed"
            and len(rows) - 1 == math.ceil(seconds * 25 - 1e-9)
            and mark == state["mark_id"]
        )
        return {"right": right, "upload": uploaded, "total": time.monotonic() - started}


def watch(url: str, pid: int, stop: threading.Event) -> tuple[list[float], int]:
    """Times of cheap calls while others render, and the largest memory of all processes together in bytes."""
    times, memory = [], 0
    with httpx.Client(base_url=url, timeout=60) as client:
        client.post("/v1/session")
        while not stop.wait(0.25):
            for path in ("/health", "/v1/emotions", "/v1/videos", "/v1/videos/video_0"):
                began = time.monotonic()
                client.get(path)
                times.append(time.monotonic() - began)
            memory = max(memory, sum(rss(child) for child in family(pid)))
    return times, memory


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    found = [pid]
    for one_of in found:
        found += parents.get(one_of, [])
    return found


def rss(pid: int) -> int:
    """Resident bytes of a process; 0 if it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextlib.contextmanager
def serving(weights: Path | None, workers: int = 1) -> Iterator[tuple[str, int]]:
    """Address and process id of a server with a folder of its own, once it has loaded its models."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "flowvqtalker", "serve", "--port", "0", "--data", data]
        command += ["--workers", str(workers), *(["--weights", str(weights)] if weights else [])]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[3]
            while not httpx.get(f"{url}/health").json()["workers"]["ready"]:
                time.sleep(0.5)
            yield url, server.pid
        finally:
            server.terminate()
            server.wait(30)


def main() -> None:
    """Run the benchmark and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portrait", type=Path)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.2, help="shortest speech; the others have a few frames more")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    with serving(given.weights, given.workers) as (url, pid):
        stop = threading.Event()
        with ThreadPoolExecutor(given.clients + 1) as pool:
            watcher = pool.submit(watch, url, pid, stop)
            began = time.monotonic()
            portrait = given.portrait.read_bytes()
            results = list(pool.map(lambda number: one(url, portrait, number, given.seconds), range(given.clients)))
            wall = time.monotonic() - began
            stop.set()
            times, memory = watcher.result()
    print(json.dumps({
        "clients": given.clients,
        "right": sum(bool(result["right"]) for result in results),
        "wall_s": round(wall, 1),
        "upload_p95_s": round(float(np.percentile([float(result["upload"]) for result in results], 95)), 2),
        "calls": len(times),
        "call_ms": {f"p{q}": round(1000 * float(np.percentile(times, q)), 1) for q in (50, 95, 99)},
        "memory_mb": memory >> 20,
        "load": os.getloadavg(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
