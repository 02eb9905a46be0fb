"""Every problem with an input carries a code, also from another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io.audio import scan
from flowvqtalker.io.image import read_image
from flowvqtalker.motion.options import MotionOptions

from .conftest import write_wav


def test_the_code_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError("the head is turned", code="face_turned")))
    assert (str(error), error.code) == ("the head is turned", "face_turned")
    assert UserError("anything").code == "invalid"


def test_problems_of_inputs_have_codes(tmp_path):
    (tmp_path / "text").write_text("neither")
    silent, empty = write_wav(tmp_path / "silent.wav", np.zeros(1600)), write_wav(tmp_path / "empty.wav", np.zeros(0))
    cases = {
        "not_an_image": lambda: read_image(tmp_path / "text"),
        "not_audio": lambda: scan(tmp_path / "text"),
        "audio_silent": lambda: scan(silent),
        "audio_too_short": lambda: scan(empty),
        "unknown_emotion": lambda: MotionOptions(emotion="cheerful"),
        "out_of_range": lambda: MotionOptions(intensity=3),
    }
    for code, call in cases.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == code
