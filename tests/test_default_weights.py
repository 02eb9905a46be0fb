"""The weights in the package on a real portrait and real speech."""

from __future__ import annotations

import numpy as np
import pytest

from flowvqtalker import weights
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.video import read_video
from flowvqtalker.pipeline import Talker

from .conftest import write_wav

pytestmark = pytest.mark.skipif(
    {f"{name}.safetensors" for name in weights.NAMES} - set(weights.manifest()) != set(),
    reason="the package was built without its default weights",
)


@pytest.fixture(scope="module")
def talker():
    return Talker.load(device="cpu")


def test_one_second_from_end_to_end(talker, portrait_file, sample_speech, tmp_path):
    speech = write_wav(tmp_path / "speech.wav", decode.load(sample_speech)[16_000:32_000])
    portrait = talker.portrait(portrait_file)
    result = talker.animate(portrait, speech, tmp_path / "out.mp4", emotion="happy")
    frames = np.stack(list(read_video(tmp_path / "out.mp4")))
    assert frames.shape == (25, 512, 512, 3)
    assert result.frames == 25
    # The same person in front of the same background: close to the portrait everywhere, yet moving at the mouth.
    assert np.abs(frames[0].astype(float) - portrait.image).mean() < 20
    mouth = portrait.crop.points(portrait.landmarks)[[61, 291, 13, 14], :2].mean(0).astype(int)
    around = frames[:, mouth[1] - 30 : mouth[1] + 30, mouth[0] - 45 : mouth[0] + 45].astype(float)
    assert around.std(0).mean() > 2 * frames[:, :60, :60].astype(float).std(0).mean()


def test_motion_of_the_sample_is_that_of_a_face(talker, sample_speech):
    motion = Motion.join(talker.motion(sample_speech, seed=3))
    beta, pose = motion.expression, motion.pose
    assert len(beta) == 250
    assert 0.2 < beta.std() < 3  # coefficients are in standard deviations
    assert pose[:, :3].abs().max() < 0.6  # radians
    jaw = talker.face_model.blendshapes(beta)[:, 25]
    assert jaw.std() > 0.005
