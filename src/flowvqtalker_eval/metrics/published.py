"""Weights that others published: found on this machine, checked by their hash, and put into a network of ours."""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.weights import misfit, sha256

__all__ = ["PublishedWeights"]


@dataclass(frozen=True)
class PublishedWeights:
    """Where a file of weights comes from and how it is recognised.

    Attributes:
        title: what messages call it.
        variable: environment variable with its path.
        source: how to get it, as the end of a sentence that begins with "download".
        digest: the beginning of its sha256; empty if the authors publish none, then any file is taken and its hash is
            recorded with the numbers.
        file: path within torch's folder of checkpoints where a download is looked for; empty if there is none.
    """

    title: str
    variable: str
    source: str
    digest: str = ""
    file: str = ""

    def find(self, path: str | Path | None = None) -> tuple[Path, str]:
        """The file and its sha256: at ``path``, at the path in the environment, or among torch's checkpoints.

        Raises:
            MissingDependency: if it is nowhere, or has another hash.
        """
        place = Path(torch.hub.get_dir()) / "checkpoints" / self.file
        given = path or os.environ.get(self.variable) or (place if self.file else None)
        if given and Path(given).is_file():
            found = sha256(given)
            if not found.startswith(self.digest):
                raise MissingDependency(
                    f"{self.title} {given} have sha256 {found}, not {self.digest}...; download {self.source} again"
                )
            return Path(given), found
        at = f" to {place}" if self.file else ""
        raise MissingDependency(
            f"{self.title} not found{f' at {given}' if given else ''}; download {self.source}{at}, or set "
            f"{self.variable} to their path"
        )

    def load(self, model: nn.Module, path: str | Path, unused: Collection[str] = ()) -> None:
        """Put the file's tensors into a network and set it to evaluation.

        Arguments:
            model: has the file's names. Batch norms may lack their counters.
            path: the file: a state dict, by itself or under ``state_dict``, whose names may begin with ``module.``.
            unused: beginnings of names in the file that the network does not have.

        Raises:
            UserError: if the file holds something else; says what does not fit.
        """
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.title} {path} cannot be read ({reason}); download {self.source}") from error
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{self.title} {path} hold no state dict; download {self.source}")
        state = {key.removeprefix("module."): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if not key.startswith(tuple(unused))}
        own = model.state_dict()
        state = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **state}
        if problem := misfit(own, state):
            raise UserError(f"{self.title} {path} do not fit: {problem}; download {self.source}")
        model.load_state_dict(state)
        model.eval().requires_grad_(False)
