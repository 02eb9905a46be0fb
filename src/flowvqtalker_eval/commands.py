"""What ``flowvqtalker evaluate`` offers. Each command is imported when it is asked for."""

from __future__ import annotations

__all__ = ["COMMANDS"]

#: Command -> ("module:Class" of a dataclass with a method ``run``, one line of help).
COMMANDS = {
    "table1": ("flowvqtalker_eval.tables.table1:Table1", "Table 1: generated videos against real ones, many metrics."),
    "run": ("flowvqtalker_eval.tables.run:Run", "Animate every clip of a split, then make Table 1."),
    "grid": ("flowvqtalker_eval.figures.grid:Grid", "Fig. 4: methods by frames, with enlarged details."),
    "pose": ("flowvqtalker_eval.figures.pose:Pose", "Fig. 5: head trace maps and audio-pose correlation."),
    "latent": ("flowvqtalker_eval.figures.latent:Latent", "Fig. 6: latents by emotion."),
    "ablation": ("flowvqtalker_eval.figures.ablation:Ablation", "Fig. 7: parts of the image generator."),
    "study": ("flowvqtalker_eval.study.commands:Study", "Table 2: page, server and analysis of a user study."),
}
