"""``exact``: the same motion whatever instructions the processor has."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from flowvqtalker.io import audio

from .conftest import write_wav

#: Instruction sets that torch and oneDNN are held to, from the processor's own down to SSE4.
_KINDS = (
    {},
    {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
)


@pytest.mark.slow
def test_exact_motion_agrees_between_processors(tmp_path, sample_speech):
    speech = write_wav(tmp_path / "speech.wav", audio.load(sample_speech)[:48_000])
    motions = []
    for number, kind in enumerate(_KINDS):
        path = tmp_path / f"{number}.npz"
        line = [sys.executable, "-m", "flowvqtalker", "motion", str(speech), "-o", str(path), "--exact", "--seed", "3"]
        subprocess.run(line, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **kind})
        with np.load(path) as file:
            motions.append(np.concatenate([file["expression"], file["pose"]], axis=1))
    for other in motions[1:]:
        np.testing.assert_allclose(other, motions[0], atol=1e-4)
