"""The one training loop: Lightning Fabric, one Adam per group of parameters, EMA, exact resume.

A stage says what is trained (:class:`Stage`), the loop says how. What makes a resumed run equal to an uninterrupted
one to the last bit: step ``s`` reads the items ``s * batch ... (s + 1) * batch - 1`` of a data set whose item ``i``
depends on nothing but the seed and ``i``, and torch's generators are seeded anew for each step from (seed, step).
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from flowvqtalker.errors import UserError
from flowvqtalker.train.config import LoopConfig, to_dict
from flowvqtalker.train.log import CsvLog

__all__ = ["CHECKPOINT_VERSION", "Ema", "RangeSampler", "Stage", "fit", "learning_rate", "step_seed"]

CHECKPOINT_VERSION = 1
_MAX_SKIPPED = 20

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stage(ABC):
    """What one training stage consists of.

    Attributes:
        name: the stage's name on the command line.
        module: holds every weight and buffer; all of it is saved.
        config: the stage's configuration (a frozen dataclass); kept in the checkpoint and checked at resume.
        monitor: key of :meth:`validate` that should fall; its best export is kept as ``best.safetensors``.
    """

    name: str
    module: nn.Module
    config: Any = None
    monitor: str | None = None

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups with an optimiser each, stepped in this order (a generator before its discriminator)."""

    @abstractmethod
    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Loss of one group on one batch (on the device, inside autocast), and what to log.

        Only the group's own parameters require a gradient during the call.
        """

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Any]:
        """The data of a split.

        Of "train", item ``i`` (any i >= 0) must be a pure function of the seed and ``i``. It is read by another thread,
        so it must not touch torch's global generator.
        """

    @abstractmethod
    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Numbers on held-out data; called with the averaged weights, in eval mode, without gradients."""

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and configuration that inference needs; called with the averaged weights."""
        return self.module.state_dict(), to_dict(self.config) or {}

    collate: Callable[[list[Any]], Any] | None = None
    """How items become a batch; None is torch's default."""

    def lr_scale(self, group: str) -> float:
        """Factor on the learning rate of a group."""
        return 1.0

    def on_start(self, batch: Any) -> None:  # noqa: B027
        """Called once with the first batch of a fresh run, before anything else (data-dependent initialisation)."""

    def on_step_end(self, step: int) -> None:  # noqa: B027
        """Called after the optimisers have stepped (dead codes, schedules)."""


class RangeSampler:
    """Lists of consecutive item numbers, one for each forward pass from number ``start`` to ``stop``.

    Process ``rank`` of ``world`` takes every world-th list, so that the processes together read what one would with a
    ``world`` times larger batch.
    """

    def __init__(
        self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, overfit: bool = False
    ) -> None:
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.rank, self.world, self.overfit = rank, world, overfit

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start, self.stop):
            first = ((0 if self.overfit else number) * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class Ema:
    """Exponential moving average of some parameters in float32; young averages follow faster ((1 + n) / (10 + n))."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.parameters = dict(parameters)
        self.shadow = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the module holds the averages; the parameters come back after it."""
        if self.decay == 0:
            yield
            return
        live = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.shadow[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = live[name]

    def state_dict(self) -> dict[str, Any]:
        """The averages and how often they were updated."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


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
    groups = stage.parameter_groups()
    optimizers = {
        name: torch.optim.Adam(parameters, lr=config.lr, betas=config.betas, fused=True)
        for name, parameters in groups.items()
    }
    state: dict[str, Any] = {"step": 0, "best": math.inf}
    names = _names(module, groups)
    fresh = not checkpoint.exists()
    if fresh:
        first = next(iter(_batches(stage, config, fabric, 0, 1)))
        torch.manual_seed(step_seed(config.seed, -1))
        with fabric.autocast():
            stage.on_start(first)
        _synchronise(fabric, module)
    ema = Ema(names, config.ema)
    if not fresh:
        _load(checkpoint, stage, config, module, ema, optimizers, state)
        logger.info("resumed %s at step %d", checkpoint, state["step"])

    log = CsvLog(out / "log.csv", keep_below=state["step"] + 1)
    scores = CsvLog(out / "validation.csv", keep_below=state["step"] + 1)
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
                _export(stage, config, state["step"], out / "best.safetensors", results)
        if fabric.is_global_zero:
            scores.write({"step": state["step"], **results})
            logger.info("step %d: %s", state["step"], ", ".join(f"{k} {v:.4g}" for k, v in results.items()))

    def save() -> None:
        _synchronise(fabric, module)
        if fabric.is_global_zero:
            _save(checkpoint, stage, config, module, ema, optimizers, state)
            with ema.applied():
                _export(stage, config, state["step"], out / "weights.safetensors", results)

    if fresh:
        validate()  # finds faults of the validation before an hour of training, and is the number before training

    started, last_log, last_step = time.monotonic(), time.monotonic(), state["step"]
    meter, waited, skipped = _Meter(), 0.0, 0
    saved = -1
    with (
        _Signals() as stop,
        tqdm(
            total=config.steps,
            initial=state["step"],
            desc=stage.name,
            disable=not fabric.is_global_zero,
            dynamic_ncols=True,
        ) as bar,
    ):
        micro = iter(
            _batches(stage, config, fabric, state["step"] * config.accumulate, config.steps * config.accumulate)
        )
        while state["step"] < config.steps:
            step = state["step"]
            tick = time.monotonic()
            batches = [next(micro) for _ in range(config.accumulate)]
            waited += time.monotonic() - tick
            torch.manual_seed(step_seed(config.seed, step, fabric.global_rank))

            for group, parameters in groups.items():
                _only(groups, group)
                for batch in batches:
                    with fabric.autocast():
                        loss, logs = stage.loss(group, batch, step)
                    fabric.backward(loss / config.accumulate)
                    meter.add({f"{group}/loss": loss, **{f"{group}/{key}": value for key, value in logs.items()}})
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
                row["data_wait"] = waited / (now - last_log)
                meter, waited, last_log, last_step = _Meter(), 0.0, now, step
                if fabric.is_global_zero:
                    log.write(row)
                    bar.set_postfix({k.split("/")[0]: f"{v:.4g}" for k, v in row.items() if k.endswith("/loss")})
            if config.validate_every and step % config.validate_every == 0 and step < config.steps and not ending:
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
    torch.set_float32_matmul_precision("high")
    many = config.devices * config.nodes > 1
    accelerator = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
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


def _batches(stage: Stage, config: LoopConfig, fabric: Fabric, start: int, stop: int) -> Iterator[Any]:
    """Batches of the forward passes from number ``start`` to ``stop``, each loaded during the one before."""
    sampler = RangeSampler(start, stop, config.batch_size, fabric.global_rank, fabric.world_size, config.overfit)
    loader: DataLoader[Any] = DataLoader(
        stage.dataset("train"),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=stage.collate,
        pin_memory=fabric.device.type == "cuda",
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the generator of the steps
    )
    for batch in loader if config.workers else _in_thread(loader):
        batch = fabric.to_device(batch)
        yield _channels_last(batch) if config.channels_last else batch


def _channels_last(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return (
            batch.contiguous(memory_format=torch.channels_last)
            if batch.ndim == 4 and batch.is_floating_point()
            else batch
        )
    if isinstance(batch, dict):
        return {key: _channels_last(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(_channels_last(value) for value in batch)
    return batch


def _in_thread(items: Iterable[T]) -> Iterator[T]:
    """Read ahead by one item in a thread: decoding releases the interpreter lock, so it overlaps with the step."""
    done = object()
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    closed = threading.Event()

    def put(value: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put(value, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(done)
        except BaseException as error:  # handed to the reader, which raises it
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="batches")
    thread.start()
    try:
        while (value := ready.get()) is not done:
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        closed.set()


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


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside ``path`` and rename it, so that an interruption leaves the old one whole."""
    beside = path.with_name(path.name + ".tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _save(
    path: Path,
    stage: Stage,
    config: LoopConfig,
    module: nn.Module,
    ema: Ema,
    optimizers: Mapping[str, Any],
    state: Mapping[str, Any],
) -> None:
    content = {
        "version": CHECKPOINT_VERSION,
        "stage": stage.name,
        "config": to_dict(stage.config),
        "loop": to_dict(config),
        "rng": {"seed": config.seed, "step": state["step"]},  # see step_seed: there is no other random state
        "model": module.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        **state,
    }
    _replace(path, lambda p: torch.save(content, p))


def _load(
    path: Path,
    stage: Stage,
    config: LoopConfig,
    module: nn.Module,
    ema: Ema,
    optimizers: Mapping[str, Any],
    state: dict[str, Any],
) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({type(error).__name__}); remove it and start again"
        ) from error
    problems = []
    for key, mine in (("version", CHECKPOINT_VERSION), ("stage", stage.name)):
        if content.get(key) != mine:
            problems.append(f"{key} is {content.get(key)!r}, not {mine!r}")
    theirs, mine = (_without_loop(c) for c in (content.get("config"), to_dict(stage.config)))
    if theirs != mine:
        keys = sorted(k for k in {*(theirs or {}), *(mine or {})} if (theirs or {}).get(k) != (mine or {}).get(k))
        problems.append(f"its configuration differs in {', '.join(keys)}")
    if problems:
        raise UserError(
            f"checkpoint {path}: {'; '.join(problems)}; resume with its own configuration or choose another --out"
        )
    for key in ("batch_size", "accumulate", "seed", "devices", "nodes"):
        old, new = content["loop"].get(key), getattr(config, key)
        if old != new:
            logger.warning("loop.%s was %s and is %s: the order of the data changes here", key, old, new)
    module.load_state_dict(content["model"])
    ema.load_state_dict(content["ema"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(content["optimizers"][name])
    state.update(step=int(content["step"]), best=float(content["best"]))


def _without_loop(config: Any) -> Any:
    return {k: v for k, v in config.items() if k != "loop"} if isinstance(config, dict) else config


def _export(stage: Stage, config: LoopConfig, step: int, path: Path, results: Mapping[str, float]) -> None:
    """Write the stage's weights as fp16 safetensors and, once beside them, the configuration."""
    tensors, settings = stage.export()
    halves = {
        key: (
            value.detach().to("cpu", torch.float16) if value.is_floating_point() else value.detach().cpu()
        ).contiguous()
        for key, value in tensors.items()
    }
    about = {"stage": stage.name, "step": step, "scores": dict(results), "config": settings, "loop": to_dict(config)}
    _replace(path, lambda p: save_file(halves, p, metadata={"stage": stage.name, "step": str(step)}))
    text = json.dumps(about, indent=1)
    beside = path.with_name("config.json" if path.name == "weights.safetensors" else path.stem + ".json")
    _replace(beside, lambda p: _write_text(p, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
