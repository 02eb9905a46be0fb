"""The one training loop: Lightning Fabric, one Adam per group of parameters, averaged weights, exact resume.

A stage says what is trained (:class:`Stage`), the loop says how. Two rules make a resumed run equal to an uninterrupted
one to the last bit: step ``s`` reads the items ``s * batch ... (s + 1) * batch - 1`` of a data set whose item ``i``
depends only on the seed and ``i``, and torch's generators are seeded anew for each step from (seed, step).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from flowvqtalker.errors import UserError
from flowvqtalker.train.checkpoint import export, load_checkpoint, save_checkpoint
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loader import batches
from flowvqtalker.train.monitor import CsvLog, Meter, gpu_busy, peak_memory
from flowvqtalker.train.stage import Stage

__all__ = ["Stage", "average_of", "fit", "learning_rate", "step_seed"]

#: Consecutive steps without a finite gradient after which a run is given up.
_MAX_SKIPPED = 20

#: Random streams beside those of the steps, which are numbered from 0.
_START, _VALIDATION = -1, -2

logger = logging.getLogger(__name__)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine down to a twentieth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed in [0, 2^63) of all randomness within one step on one device."""
    sequence = np.random.SeedSequence((seed, step - _VALIDATION, rank))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def average_of(parameters: nn.ParameterList, decay: float) -> AveragedModel:
    """Exponential moving average of parameters, starting from their first update.

    The decay of the n-th update is at most (1 + n) / (10 + n), so that a young average forgets its start quickly.
    """

    @torch.no_grad()
    def update(averages: Any, values: Any, count: Any) -> None:
        torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return AveragedModel(parameters, multi_avg_fn=update)


def fit(stage: Stage, config: LoopConfig, out: str | Path, resume: bool = False) -> dict[str, float]:
    """Train a stage.

    Writes into ``out``: ``config.json``, ``checkpoint.pt`` (whole state), ``log.csv``, ``validation.csv``,
    ``weights.safetensors`` (fp16, averaged) and, with a monitor, ``best.safetensors``. SIGTERM and SIGINT save a
    checkpoint and stop cleanly.

    Arguments:
        stage: what to train.
        config: how to train.
        out: folder of the run.
        resume: continue from the checkpoint in ``out`` if there is one.

    Returns:
        the numbers of the last validation, and ``step``.

    Raises:
        UserError: if ``out`` holds a run and ``resume`` is false, its checkpoint does not fit, or another process of
            the training ended.
        FloatingPointError: if the loss stops being finite.
    """
    run = _Run(stage, config, Path(out), resume)
    try:
        return run.train()
    except RuntimeError as error:
        if not _lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"another process of this training ended ({reason}); start the same command with --resume: "
            f"it continues from the last checkpoint in {out}"
        ) from error


def _lost_process(error: RuntimeError) -> bool:
    """Whether a collective operation failed because a process is gone; gloo has no error class of its own."""
    return isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo" in str(error)


class _Run:
    """State of one run: model, optimisers, average, logs and progress."""

    def __init__(self, stage: Stage, config: LoopConfig, out: Path, resume: bool) -> None:
        self.stage, self.config, self.out = stage, config, out
        self.checkpoint = out / "checkpoint.pt"
        self.fresh = not self.checkpoint.exists()
        if not self.fresh and not resume:
            raise UserError(f"{out} already holds a run; add --resume to continue it or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.fabric = _fabric(config)
        self.module = stage.module.to(self.fabric.device)
        if config.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module.train()
        if config.compile:
            for part in stage.compiled():
                part.compile()
        self.groups = stage.parameter_groups()
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)
            for name, parameters in self.groups.items()
        }
        if self.fresh:
            self._start()
        self.trained = nn.ParameterList(p for parameters in self.groups.values() for p in parameters)
        self.average = average_of(self.trained, config.ema)
        self.parts: dict[str, Any] = {"model": self.module, "average": self.average}
        self.parts |= {f"optimizer.{name}": optimizer for name, optimizer in self.optimizers.items()}
        self.step, self.best, self.skipped = 0, math.inf, 0
        self.results: dict[str, float] = {}
        if not self.fresh:
            progress = load_checkpoint(self.checkpoint, stage, config, self.parts)
            self.step, self.best = int(progress["step"]), progress["best"]
            logger.info("resumed %s at step %d", self.checkpoint, self.step)
        kept = 0 if self.fresh else self.step + 1
        self.log = CsvLog(out / "log.csv", keep_below=kept)
        # A run that had ended validates again.
        self.scores = CsvLog(out / "validation.csv", keep_below=min(kept, config.steps))
        self.meter = Meter()

    def _start(self) -> None:
        """Let the stage initialise itself from all items of the first step, whoever trains on them."""
        first = next(iter(batches(self.stage, self.config, self.fabric, 0, 1, whole=True)))
        torch.manual_seed(step_seed(self.config.seed, _START))
        with self.fabric.autocast():
            self.stage.on_start(first)
        self._synchronise()

    def train(self) -> dict[str, float]:
        """Train until the last step, the time limit or a signal."""
        config, fabric = self.config, self.fabric
        if self.fresh:
            self.validate()  # finds faults of the validation before an hour of training
        started = last = time.monotonic()
        logged, waited, saved = self.step, 0.0, -1
        first, final = self.step * config.accumulate, config.steps * config.accumulate
        loader = batches(self.stage, config, fabric, first, final)
        bar = tqdm(total=config.steps, initial=self.step, desc=self.stage.name, disable=not fabric.is_global_zero)
        with _stop_requested() as stop, bar:
            while self.step < config.steps:
                begun = time.monotonic()
                parts = [next(loader) for _ in range(config.accumulate)]
                waited += time.monotonic() - begun
                self._optimise(parts)
                bar.update()
                over = config.minutes > 0 and time.monotonic() - started > config.minutes * 60
                ending = bool(fabric.broadcast(stop.is_set() or over))
                if self.step % config.log_every == 0 or self.step == config.steps or ending:
                    elapsed = time.monotonic() - last
                    self._write_log(self.step - logged, elapsed, waited)
                    logged, waited, last = self.step, 0.0, time.monotonic()
                due = config.validate_every and self.step % config.validate_every == 0
                if due and not ending and self.step < config.steps:
                    self.validate()
                if self.step % config.save_every == 0 or ending:
                    self.save()
                    saved = self.step
                if ending:
                    logger.info("stopped at step %d (%s)", self.step, "signal" if stop.is_set() else "time limit")
                    break
        if self.step == config.steps:
            self.validate()
        if saved != self.step or self.step == config.steps:
            self.save()
        return {"step": float(self.step), **self.results}

    def _optimise(self, parts: Sequence[Any]) -> None:
        """One step of every group."""
        config = self.config
        torch.manual_seed(step_seed(config.seed, self.step, self.fabric.global_rank))
        for group, parameters in self.groups.items():
            self._require_gradients(group)
            for batch in parts:
                with self.fabric.autocast():
                    loss, logs = self.stage.loss(group, batch, self.step)
                self.meter.add({f"{group}/{key}": value for key, value in logs.items()})
                if loss is not None:
                    self.fabric.backward(loss / config.accumulate)
                    self.meter.add({f"{group}/loss": loss})
            if any(p.grad is not None for p in parameters):
                self._update(group, parameters)
        self._require_gradients(None)
        self.average.update_parameters(self.trained)
        self.stage.on_step_end(self.step)
        self.step += 1
        self.meter.add(gpu_busy(self.fabric.device))

    def _update(self, group: str, parameters: Sequence[nn.Parameter]) -> None:
        """Let a group's optimiser step, unless its gradient is not finite."""
        optimizer = self.optimizers[group]
        norm = self._reduce_gradients(parameters)
        self.meter.add({f"{group}/grad_norm": norm})
        for entry in optimizer.param_groups:
            entry["lr"] = learning_rate(self.step, self.config) * self.stage.lr_scale(group)
        if torch.isfinite(norm):
            optimizer.step()
            self.skipped = 0
        else:  # one bad batch must not end a long run, but many mean that it is lost
            self.skipped += 1
            logger.warning("step %d: gradient of %s is not finite, step skipped", self.step, group)
            if self.skipped >= _MAX_SKIPPED:
                raise FloatingPointError(f"{self.skipped} steps without a finite gradient; lower loop.lr")
        optimizer.zero_grad(set_to_none=True)

    def _require_gradients(self, chosen: str | None) -> None:
        """Let only the chosen group's parameters require a gradient (None: all groups)."""
        for group, parameters in self.groups.items():
            for p in parameters:
                p.requires_grad_(chosen is None or group == chosen)

    def _reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Average the gradients over the processes, clip them, and return their norm before clipping."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.fabric.world_size > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            flat = self.fabric.all_reduce(flat, reduce_op="mean")  # type: ignore[assignment]
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)

    def _synchronise(self) -> None:
        """Give every process the first one's weights and buffers: buffers drift apart with each process's data."""
        if self.fabric.world_size > 1:
            for value in self.module.state_dict().values():
                value.copy_(self.fabric.broadcast(value, src=0))

    def _write_log(self, steps: int, seconds: float, waited: float) -> None:
        """Log the means over the processes since the last row."""
        means = self.meter.means()
        if self.fabric.world_size > 1:
            reduced = self.fabric.all_reduce(torch.tensor(list(means.values())), reduce_op="mean")
            means = dict(zip(means, cast(Tensor, reduced).tolist(), strict=True))
        speed = steps / seconds
        items = speed * self.config.batch_size * self.config.accumulate * self.fabric.world_size
        row = {"step": self.step, **means, "lr": learning_rate(self.step - 1, self.config)}
        row |= {"steps_per_s": speed, "items_per_s": items, "data_wait": waited / seconds}
        row["memory_mib"] = peak_memory(self.fabric.device) / 2**20
        if self.fabric.is_global_zero:
            self.log.write(row)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the module holds the averaged weights."""
        live = [parameter.data for parameter in self.trained]
        for parameter, average in zip(self.trained, self.average.parameters(), strict=True):
            parameter.data = average.data
        try:
            yield
        finally:
            for parameter, data in zip(self.trained, live, strict=True):
                parameter.data = data

    def validate(self) -> None:
        """Measure the averaged weights on held-out data, and keep them if they are the best so far."""
        with self._averaged():
            self.module.eval()
            torch.manual_seed(step_seed(self.config.seed, _VALIDATION))
            with torch.no_grad(), self.fabric.autocast():
                self.results = {key: float(value) for key, value in self.stage.validate(self.fabric).items()}
            self.module.train()
            value = self.results.get(self.stage.monitor or "", math.inf)
            if value < self.best and self.fabric.is_global_zero:
                self.best = value
                export(self.stage, self.config, self.step, self.out / "best.safetensors", self.results)
        if self.fabric.is_global_zero:
            self.scores.write({"step": self.step, **self.results})
            logger.info("step %d: %s", self.step, ", ".join(f"{k} {v:.4g}" for k, v in self.results.items()))

    def save(self) -> None:
        """Write the checkpoint and the averaged weights."""
        self._synchronise()
        if self.fabric.is_global_zero:
            progress = {"step": self.step, "best": self.best}
            save_checkpoint(self.checkpoint, self.stage, self.config, progress, self.parts)
            with self._averaged():
                export(self.stage, self.config, self.step, self.out / "weights.safetensors", self.results)


def _fabric(config: LoopConfig) -> Fabric:
    """Device, precision and processes; one process needs no launcher."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("loop.device cuda: no GPU that torch can use was found; choose cpu or auto")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    accelerator = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if accelerator == "cuda":
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # images of a stage have one size
    fabric = Fabric(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy="ddp" if config.devices * config.nodes > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second SIGINT interrupts at once."""
    requested = threading.Event()
    former: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        if requested.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
