"""Trains the toy stage as one of the processes that torchrun starts: toy_run.py OUT (see test_processes)."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from flowvqtalker.train.loop import fit
from tests.train.test_loop import CONFIG, Toy

if __name__ == "__main__":
    world = int(os.environ["WORLD_SIZE"])
    fit(Toy(dropout=0.0), replace(CONFIG, batch_size=8 // world, devices=world), Path(sys.argv[1]))
