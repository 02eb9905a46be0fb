"""Which videos a benchmark run makes, and which of them are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowvqtalker_eval.tables.splits import Item

__all__ = ["METHODS", "Failures", "Output", "Task", "plan"]

#: What can be made of each clip, by name on the command line.
METHODS = {
    "animate": "the portrait driven by the clip's speech and emotion",
    "reenact": "the portrait driven by the clip's own tracked expression and pose",
    "copy": "the portrait, repeated",
    "warp": "I_w alone: the portrait warped to the tracked expression and pose",
    "codebook": "each real frame through E_h, C and D_h",
}

Failures = list[tuple[str, str, int, str]]  # item, method, seed, reason


@dataclass(frozen=True)
class Output:
    """One video to make: its method, the seed (of ``animate``) and the file."""

    method: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Task:
    """The outputs of one item that are still missing."""

    item: Item
    outputs: tuple[Output, ...]

    def failures(self, reason: str) -> Failures:
        """All outputs failed for one reason."""
        return [(self.item.name, output.method, output.seed, reason) for output in self.outputs]


def plan(items: Sequence[Item], folder: Path | None, methods: Sequence[str], seeds: int = 1) -> list[Task]:
    """The outputs of each item that are missing in the folder; ``animate`` skips items without speech.

    Arguments:
        items: of the split.
        folder: of the run; None plans everything, with paths relative to the folder.
        methods: by name.
        seeds: samples of ``animate``; with several the seed is part of the file's name.
    """
    tasks = []
    for item in items:
        outputs = []
        for method in methods:
            if method == "animate" and not item.has_speech:
                continue
            for seed in range(seeds if method == "animate" else 1):
                suffix = f"#seed{seed}" if method == "animate" and seeds > 1 else ""
                path = (folder or Path()) / method / f"{item.name}{suffix}.mp4"
                if folder is None or not path.exists():
                    outputs.append(Output(method, seed, path))
        if outputs:
            tasks.append(Task(item, tuple(outputs)))
    return tasks
