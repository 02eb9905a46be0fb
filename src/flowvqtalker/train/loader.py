"""Batches for the loop: consecutive items, loaded ahead by worker processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import torch
from lightning_fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.stage import Stage

__all__ = ["RangeSampler", "batches"]


class RangeSampler:
    """Lists of consecutive item numbers, one for each forward pass from number ``start`` to ``stop``.

    Process ``rank`` of ``world`` takes every world-th list, so that together the processes read what one process would
    with a ``world`` times larger batch.
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


def batches(
    stage: Stage, config: LoopConfig, fabric: Fabric, start: int, stop: int, *, whole: bool = False
) -> Iterator[Any]:
    """Batches on the device for the forward passes from number ``start`` to ``stop``.

    Arguments:
        stage, config, fabric: of the run.
        start, stop: numbers of forward passes.
        whole: give every process all items of a step; ``start`` and ``stop`` count steps then.
    """
    world, rank, size = fabric.world_size, fabric.global_rank, config.batch_size
    if whole:
        world, rank, size = 1, 0, size * world * config.accumulate
    sampler = RangeSampler(start, stop, size, rank, world, config.overfit)
    workers = min(config.workers, len(sampler))
    loader: DataLoader[Any] = DataLoader(
        stage.dataset("train"),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=stage.collate,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(config.seed),  # otherwise it draws from the steps' generator
    )
    with _no_opencv_threads():
        loaded = iter(loader)
    for batch in loaded:
        batch = fabric.to_device(batch)
        yield apply_to_collection(batch, Tensor, _channels_last) if config.channels_last else batch


@contextmanager
def _no_opencv_threads() -> Iterator[None]:
    """Disable OpenCV threads before forking: workers deadlock on the parent's pool."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _start_worker(number: int) -> None:
    """Workers share the cores, so each uses one thread; Ctrl-C reaches them too, but the parent ends them."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _channels_last(x: Tensor) -> Tensor:
    image = x.ndim == 4 and x.is_floating_point()
    return x.contiguous(memory_format=torch.channels_last) if image else x
