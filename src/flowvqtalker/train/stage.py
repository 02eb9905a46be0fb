"""What is trained: the interface between a stage and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvqtalker.train.config import to_dict

__all__ = ["Stage"]


class Stage(ABC):
    """What one training stage consists of.

    Attributes:
        name: the stage's name on the command line.
        module: holds every weight and buffer; all of it is saved.
        config: the stage's configuration (a frozen dataclass), stored in the checkpoint and compared at resume.
        monitor: key of :meth:`validate` to minimise; the export with the lowest value is kept as ``best.safetensors``.
    """

    name: str
    module: nn.Module
    config: Any = None
    monitor: str | None = None

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups with one optimiser each, stepped in this order (a generator before its discriminator)."""

    @abstractmethod
    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        """Loss of one group on one batch (on the device, inside autocast), and what to log.

        Only the group's own parameters require a gradient during the call. None skips the group in this step (a
        discriminator before its start).
        """

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Any]:
        """The data of a split.

        Item ``i`` of "train" (any i >= 0) must be a pure function of the seed and ``i``. Worker processes read it:
        do not use torch's global generator.
        """

    @abstractmethod
    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Scores on held-out data, with the averaged weights, in eval mode and without gradients."""

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and configuration for inference, with the averaged weights."""
        return self.module.state_dict(), to_dict(self.config) or {}

    collate: Callable[[list[Any]], Any] | None = None
    """How items become a batch; None is torch's default."""

    def compiled(self) -> list[nn.Module]:
        """Modules for ``loop.compile``: called themselves, not by other methods, with inputs of one size."""
        return [part for network in self.module.children() for part in network.children()]

    def lr_scale(self, group: str) -> float:
        """Factor on the learning rate of a group."""
        return 1.0

    def on_start(self, batch: Any) -> None:  # noqa: B027
        """Data-dependent initialisation from the first batch of a fresh run."""

    def on_step_end(self, step: int) -> None:  # noqa: B027
        """Runs after the optimisers have stepped (dead codes, schedules)."""
