"""The one training loop: Lightning Fabric, one Adam per group of parameters, EMA, exact resume.

A stage says what is trained (:class:`Stage`), the loop says how. What makes a resumed run equal to an uninterrupted
one to the last bit: step ``s`` reads the items ``s * batch ... (s + 1) * batch - 1`` of a data set whose item ``i``
depends on nothing but the seed and ``i``, and torch's generators are seeded anew for each step from (seed, step).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from flowvqtalker.errors import UserError
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.feed import RangeSampler, batches
from flowvqtalker.train.hardware import Utilisation, peak_memory
from flowvqtalker.train.log import CsvLog
from flowvqtalker.train.stage import Stage
from flowvqtalker.train.state import CHECKPOINT_VERSION, Ema, export, load_checkpoint, save_checkpoint

__all__ = ["CHECKPOINT_VERSION", "Ema", "RangeSampler", "Stage", "fit", "learning_rate", "step_seed"]

_MAX_SKIPPED = 20

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
    """Seed of everything random within one step on one device (a 63-bit mix of the three numbers)."""
    value = 0
    for part in (seed, step, rank):
        value = (value + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1


def fit(stage: Stage, config: LoopConfig, out: str | Path, resume: bool = False) -> dict[str, float]:
    """Train a stage.

    Writes into ``out``: ``config.json``, ``checkpoint.pt`` (whole state), ``log.csv``, ``validation.csv``,
    ``weights.safetensors`` (fp16, averaged) and, with a monitor, ``best.safetensors``. SIGTERM and SIGINT save a
    checkpoint and stop cleanly.

    Arguments:
        stage: what to train.
        config: how to train.
        out: folder of the run.
        resume: go on from the checkpoint in ``out`` if there is one.

    Returns:
        the numbers of the last validation, and ``step``.

    Raises:
        UserError: if ``out`` holds a run and ``resume`` is false, or its checkpoint is of something else.
        FloatingPointError: if the loss stops being finite.
    """
    fabric = _fabric(config)
    out = Path(out)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it or choose another --out")
    out.mkdir(parents=True, exist_ok=True)

    module = stage.module.to(fabric.device)
    if config.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.train()
    if config.compile:
        for part in stage.compiled():
            part.compile()
    groups = stage.parameter_groups()
    optimizers = {
        name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)
        for name, parameters in groups.items()
    }
    state: dict[str, Any] = {"step": 0, "best": math.inf}
    names = _names(module, groups)
    fresh = not checkpoint.exists()
    if fresh:
        first = next(iter(batches(stage, config, fabric, 0, 1)))
        torch.manual_seed(step_seed(config.seed, -1))
        with fabric.autocast():
            stage.on_start(first)
        _synchronise(fabric, module)
    ema = Ema(names, config.ema)
    if not fresh:
        load_checkpoint(checkpoint, stage, config, module, ema, optimizers, state)
        logger.info("resumed %s at step %d", checkpoint, state["step"])

    kept = 0 if fresh else state["step"] + 1
    log = CsvLog(out / "log.csv", keep_below=kept)
    scores = CsvLog(out / "validation.csv", keep_below=kept)
    results: dict[str, float] = {}

    def validate() -> None:
        results.clear()
        with ema.applied():
            module.eval()
            torch.manual_seed(step_seed(config.seed, -2))
            with torch.no_grad(), fabric.autocast():
                results.update({key: float(value) for key, value in stage.validate(fabric).items()})
            module.train()
            value = results.get(stage.monitor or "", math.inf)
            if value < state["best"] and fabric.is_global_zero:
                state["best"] = value
                export(stage, config, state["step"], out / "best.safetensors", results)
        if fabric.is_global_zero:
            scores.write({"step": state["step"], **results})
            logger.info("step %d: %s", state["step"], ", ".join(f"{k} {v:.4g}" for k, v in results.items()))

    def save() -> None:
        _synchronise(fabric, module)
        if fabric.is_global_zero:
            save_checkpoint(checkpoint, stage, config, module, ema, optimizers, state)
            with ema.applied():
                export(stage, config, state["step"], out / "weights.safetensors", results)

    if fresh:
        validate()  # finds faults of the validation before an hour of training, and is the number before training

    started, last_log, last_step = time.monotonic(), time.monotonic(), state["step"]
    meter, waited, skipped = _Meter(), 0.0, 0
    saved = -1
    per_step = config.batch_size * config.accumulate * fabric.world_size
    with (
        _Signals() as stop,
        Utilisation(fabric.device) as utilisation,
        tqdm(
            total=config.steps,
            initial=state["step"],
            desc=stage.name,
            disable=not fabric.is_global_zero,
            dynamic_ncols=True,
        ) as bar,
    ):
        micro = iter(
            batches(stage, config, fabric, state["step"] * config.accumulate, config.steps * config.accumulate)
        )
        while state["step"] < config.steps:
            step = state["step"]
            tick = time.monotonic()
            parts = [next(micro) for _ in range(config.accumulate)]
            waited += time.monotonic() - tick
            torch.manual_seed(step_seed(config.seed, step, fabric.global_rank))

            for group, parameters in groups.items():
                _only(groups, group)
                for batch in parts:
                    with fabric.autocast():
                        loss, logs = stage.loss(group, batch, step)
                    meter.add({f"{group}/{key}": value for key, value in logs.items()})
                    if loss is not None:
                        fabric.backward(loss / config.accumulate)
                        meter.add({f"{group}/loss": loss})
                if all(p.grad is None for p in parameters):
                    continue
                norm = _reduce(fabric, parameters, config.clip)
                meter.add({f"{group}/grad_norm": norm})
                for entry in optimizers[group].param_groups:
                    entry["lr"] = learning_rate(step, config) * stage.lr_scale(group)
                if torch.isfinite(norm):
                    optimizers[group].step()
                    skipped = 0
                else:  # one bad batch must not end a long run, many mean that it is lost
                    skipped += 1
                    logger.warning("step %d: gradient of %s is not finite, step skipped", step, group)
                    if skipped >= _MAX_SKIPPED:
                        raise FloatingPointError(f"{skipped} steps without a finite gradient; lower loop.lr")
                optimizers[group].zero_grad(set_to_none=True)
            _only(groups, None)
            ema.update()
            stage.on_step_end(step)
            state["step"] = step = step + 1
            bar.update()

            over = config.minutes > 0 and time.monotonic() - started > config.minutes * 60
            ending = bool(fabric.broadcast(stop.set_ or over)) if fabric.world_size > 1 else stop.set_ or over
            if step % config.log_every == 0 or step == config.steps or ending:
                now = time.monotonic()
                speed = (step - last_step) / (now - last_log)
                row = {"step": step, **meter.means(), "lr": learning_rate(step - 1, config), "steps_per_s": speed}
                row |= {"items_per_s": speed * per_step, "data_wait": waited / (now - last_log)}
                row |= utilisation.means() | {"memory_mib": peak_memory(fabric.device) / 2**20}
                meter, waited, last_log, last_step = _Meter(), 0.0, now, step
                if fabric.is_global_zero:
                    log.write(row)
                    bar.set_postfix({k.split("/")[0]: f"{v:.4g}" for k, v in row.items() if k.endswith("/loss")})
            due = config.validate_every and step % config.validate_every == 0 and step < config.steps
            if due and not ending:
                validate()
            if step % config.save_every == 0 or ending:
                save()
                saved = step
            if ending:
                logger.info("stopped at step %d (%s)", step, "signal" if stop.set_ else "time limit")
                break
    if state["step"] == config.steps:
        validate()
    if saved != state["step"] or state["step"] == config.steps:
        save()
    return {"step": float(state["step"]), **results}


def _fabric(config: LoopConfig) -> Fabric:
    """Device, precision and processes; one process needs no launcher."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("loop.device cuda: no GPU that torch can use was found; choose cpu or auto, try cpu or auto")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    many = config.devices * config.nodes > 1
    accelerator = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if accelerator == "cuda":
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # pictures of a stage have one size
    fabric = Fabric(
        accelerator=accelerator,
        devices=config.devices,
        num_nodes=config.nodes,
        strategy="ddp" if many else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def _names(module: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Names of the trained parameters, in the module's order."""
    trained = {id(p) for parameters in groups.values() for p in parameters}
    names = {name: p for name, p in module.named_parameters() if id(p) in trained}
    if len(names) != len(trained):
        raise ValueError("a stage's parameter groups must hold parameters of its module only")
    return names


def _only(groups: Mapping[str, Sequence[nn.Parameter]], chosen: str | None) -> None:
    """Let only the chosen group's parameters require a gradient (None: all groups)."""
    for group, parameters in groups.items():
        for p in parameters:
            p.requires_grad_(chosen is None or group == chosen)


def _reduce(fabric: Fabric, parameters: Sequence[nn.Parameter], clip: float) -> Tensor:
    """Average the gradients over the processes, clip them, and return their norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if fabric.world_size > 1:
        flat = torch.cat([g.flatten() for g in gradients])
        flat = fabric.all_reduce(flat, reduce_op="mean")  # type: ignore[assignment]
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)


def _synchronise(fabric: Fabric, module: nn.Module) -> None:
    """Give every process the first one's weights and buffers (buffers drift apart: each process sees its own data)."""
    if fabric.world_size > 1:
        for value in module.state_dict().values():
            value.copy_(fabric.broadcast(value, src=0))


class _Meter:
    """Means of logged numbers; tensors stay on their device until the means are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, float | Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        for key, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else value
            self.sums[key] = self.sums.get(key, 0.0) + value
            self.counts[key] = self.counts.get(key, 0) + 1

    def means(self) -> dict[str, float]:
        return {key: float(total) / self.counts[key] for key, total in self.sums.items()}


class _Signals:
    """SIGTERM and SIGINT ask the loop to stop after the step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.set_ = False
        self._old: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.set_ and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set_ = True

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
