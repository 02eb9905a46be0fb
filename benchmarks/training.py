"""Speed of training: items per second with one and with several processes, and where the time of a step goes.

    python benchmarks/training.py expflow --config configs/expflow.yaml --shards data/shards
    python benchmarks/training.py vqig --config configs/vqig.yaml --region.image-from 0 --items 8 --processes 1 2

What is not an option of this script goes to `flowvqtalker train`. Every run reads the same items in each step, however
many processes share them, and each process computes with `--loop.threads` threads (1). The first steps are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker.train import loop

WARM_UP = 3  # steps


class _Untracked(contextlib.nullcontext[None]):
    """Counts for the whole, not for each module: torch's tracker cannot follow the adaptive weight's own gradients."""

    parents = ("Global",)


class StepTimes:
    """Measures the steps of the training loop in this process, by wrapping what it calls.

    Attributes:
        seconds: by part of a step, since the warm-up; a part that runs within another counts for the inner one.
        flops: of one step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = Counter()
        self.steps, self.began, self.ended, self.flops = 0, 0.0, 0.0, 0
        self._inner = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - begun
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took

        return call

    def install(self) -> None:
        """Wrap the loop; validation and checkpoints are left out, which are rare in a real run."""
        run: Any = loop._Run
        optimise, init, batches = run._optimise, run.__init__, loop.batches

        def step(this: Any, parts: Any) -> None:
            if this.step == WARM_UP:
                self.seconds.clear()
                self.began = time.perf_counter()
            last = this.step == this.config.steps - 1
            if last:  # counting takes time of its own
                self.steps, self.ended = this.step - WARM_UP, time.perf_counter()
                kept = dict(self.seconds)
                counter = FlopCounterMode(display=False)
                counter.mod_tracker = _Untracked()  # type: ignore[assignment]
                with counter:
                    optimise(this, parts)
                self.flops, self.seconds = counter.get_total_flops(), kept
            else:
                optimise(this, parts)

        def make(this: Any, stage: Any, *args: Any) -> None:
            stage.loss = self.timed("losses", stage.loss)
            init(this, stage, *args)

        def load(*args: Any, **kwargs: Any) -> Any:
            read = self.timed("data", batches(*args, **kwargs).__next__)
            while True:
                try:
                    yield read()
                except StopIteration:
                    return

        run._optimise, run.__init__, loop.batches = step, make, load
        run.validate = run.save = lambda this: None
        Fabric.backward = self.timed("gradients", Fabric.backward)  # type: ignore[method-assign]
        for name in ("all_reduce", "broadcast"):
            setattr(Fabric, name, self.timed("other processes", getattr(Fabric, name)))
        torch.optim.Adam.step = self.timed("update", torch.optim.Adam.step)  # type: ignore[method-assign]
        AveragedModel.update_parameters = self.timed("update", AveragedModel.update_parameters)  # type: ignore


def measure(command: list[str], processes: int, items: int, steps: int) -> dict[str, Any]:
    """Train for some steps in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--out", f"{folder}/run", "--loop.steps", str(WARM_UP + steps + 1), "--loop.devices", str(processes)]
        shared += ["--loop.batch-size", str(items // processes), "--loop.device", "cpu", "--loop.workers", "0"]
        inside = [sys.executable, __file__, "--inside", f"{folder}/times.json", "train", *command, *shared]
        done = subprocess.run(inside, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found: dict[str, Any] = json.loads(Path(folder, "times.json").read_text())
    return found


def inside(result: Path, command: list[str]) -> None:
    """Train as one of the processes; the first writes its times."""
    from flowvqtalker.cli import main as train

    times = StepTimes()
    times.install()
    if code := train(command):
        sys.exit(code)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        step = (times.ended - times.began) / times.steps
        parts = {part: seconds / times.steps for part, seconds in times.seconds.items()}
        result.write_text(json.dumps({"step": step, "parts": parts, "flops": times.flops}))


def main() -> None:
    """Parse, run and print."""
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--items", type=int, default=16, help="in a step")
    parser.add_argument("--steps", type=int, default=20, help="to measure")
    options, command = parser.parse_known_args()
    if "--loop.threads" not in command:
        command += ["--loop.threads", "1"]
    parts = ("data", "losses", "gradients", "other processes", "update")
    print(f"| processes | items/s | ratio | {' | '.join(f'{part} ms' for part in parts)} | rest ms | GFLOP per item |")
    print("|" + "---|" * (len(parts) + 5))
    first = None
    for processes in options.processes:
        found = measure(command, processes, options.items, options.steps)
        rate = options.items / found["step"]
        first = first or rate
        spent = [found["parts"].get(part, 0.0) for part in parts]
        each = " | ".join(f"{1000 * seconds:.0f}" for seconds in (*spent, found["step"] - sum(spent)))
        flops = found["flops"] / 1e9 / options.items * processes
        print(f"| {processes} | {rate:.1f} | {rate / first:.2f} | {each} | {flops:.1f} |", flush=True)


if __name__ == "__main__":
    main()
