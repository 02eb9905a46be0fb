"""Batches for the loop: consecutive items, read ahead, on the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import cv2
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader

from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.stage import Stage

__all__ = ["RangeSampler", "batches"]

T = TypeVar("T")


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


def batches(stage: Stage, config: LoopConfig, fabric: Fabric, start: int, stop: int) -> Iterator[Any]:
    """Batches of the forward passes from number ``start`` to ``stop``, each loaded during the one before."""
    sampler = RangeSampler(start, stop, config.batch_size, fabric.global_rank, fabric.world_size, config.overfit)
    loader: DataLoader[Any] = DataLoader(
        stage.dataset("train"),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=stage.collate,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=_begin_worker,
        prefetch_factor=4 if config.workers else None,
        generator=torch.Generator().manual_seed(config.seed),  # else it draws from the generator of the steps
    )
    with _forkable() if config.workers else nullcontext():
        for batch in loader if config.workers else _in_thread(loader):
            batch = fabric.to_device(batch)
            yield _channels_last(batch) if config.channels_last else batch


@contextmanager
def _forkable() -> Iterator[None]:
    """OpenCV without threads of its own: a forked worker waits for ever for those that its parent had."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _begin_worker(number: int) -> None:
    """The workers share the cores, so none of them takes several."""
    cv2.setNumThreads(1)


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
