"""The voice activity detector computes on one thread, whatever loaded OpenMP before it."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import os
import numpy as np
import torch
from flowvqtalker.speech.activity import WINDOW, SpeechActivity

torch.set_num_threads(2)
activity = SpeechActivity()
before = len(os.listdir("/proc/self/task"))
activity.push(np.ones(2 * WINDOW, np.float32))
alone = len(os.listdir("/proc/self/task"))
torch.randn(1000, 1000).exp()
print(alone - before, len(os.listdir("/proc/self/task")) - alone)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_detector_uses_one_thread_and_leaves_torch_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
