"""Trains the toy stage with some devices: python two_processes.py DEVICES OUT (see test_loop)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from flowvqtalker.train.loop import fit
from tests.train.test_loop import CONFIG, Stage, Toy

if __name__ == "__main__":
    devices, out = int(sys.argv[1]), Path(sys.argv[2])
    Toy.on_start = Stage.on_start  # type: ignore[method-assign]  # it would read each process's own batch
    fit(Toy(dropout=0.0), replace(CONFIG, steps=4, batch_size=8 // devices, devices=devices), out)
