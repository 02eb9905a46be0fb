"""RAVDESS's performances as training clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.retarget import Retargeter
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig
from flowvqtalker.speech.encoder import AudioConfig
from flowvqtalker.train.corpus import NEUTRAL, Corpus, MotionClip, encode_corpus
from flowvqtalker.train.expflow import Config
from flowvqtalker.train.flow_stage import lip_gap
from flowvqtalker.train.performances import perform
from tests.conftest import write_wav

ANGRY, CALM = "03-01-05-02-01-01-07", "03-01-02-01-01-01-07"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two recordings; the brow of the angry one comes down halfway."""
    (tmp_path / "ravdess_au").mkdir()
    (tmp_path / "speech" / "ravdess").mkdir(parents=True)
    brow = np.float16(np.arange(60) >= 30)[:, None] * np.float16([[2, 0]])
    units = {ANGRY: brow, CALM: np.zeros((60, 2), np.float16)}
    np.savez(tmp_path / "ravdess_au" / "frames.npz", names=np.array(["AU04_r", "AU45_r"]), **units)
    noise = np.random.default_rng(0).normal(size=32_000)
    for name in units:
        write_wav(tmp_path / "speech" / "ravdess" / f"{name}.opus", 0.1 * noise)
    return tmp_path


def test_performance_has_the_speakers_movement_the_voices_lips_and_the_actors_brow(root: Path) -> None:
    face = FaceModel.load(weights.folder() / "face_model.safetensors")
    torch.manual_seed(0)
    flow = ExpFlow(ExpFlowConfig(steps=1, width=8, heads=2, audio=AudioConfig(width=8, layers=2))).eval()
    assert flow.lip_prior is not None
    for parameter in flow.lip_prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    random = np.random.default_rng(1)
    mel = random.normal(size=(1 + 40 * 640 // 200, 80)).astype(np.float16)
    speaker = MotionClip(random.normal(size=(40, 64)).astype(np.float32), mel, NEUTRAL, True, "speaker")
    corpus = Corpus([speaker])
    encode_corpus(corpus, flow.audio)
    retarget = Retargeter(face, lip_gap(face.expression).numpy())
    made = perform(root, flow, corpus, retarget).clips[1:]
    assert [EMOTIONS[one.emotion] for one in made] == ["angry", "neutral"]
    assert all(one.identity == "speaker" and one.retargeted and one.frames.shape == (50, 64) for one in made)
    assert all(one.features is not None and one.mel is not None for one in made)

    neutral = made[1]
    lips = flow.predict_lips(torch.from_numpy(np.float32(neutral.features[0]))).detach().numpy()
    still = flow.predict_lips(torch.from_numpy(np.float32(corpus.clips[0].features[0]))).detach().numpy()
    rows = neutral.frames - lips
    assert np.abs(rows[:, None] - (speaker.frames - still)[None]).max(-1).min(1).max() < 1e-3
    brow = face.arkit[arkit_index("browDownLeft"), :-1].numpy()
    course = retarget.action_units(["AU04_r"])[0] @ brow
    assert course > 0.1, "an action unit shows in its blendshape"
    assert (made[0].frames - made[1].frames)[30:].mean(0) @ brow > 0.5
    again = perform(root, flow, corpus, retarget).clips[1:]
    assert np.array_equal(made[0].frames, again[0].frames)


def test_performances_need_their_files_and_a_speech_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check performances"):
        perform(tmp_path, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="performances needs"):
        Config(performances=tmp_path)
