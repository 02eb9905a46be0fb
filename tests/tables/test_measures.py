"""What the columns of Table 1 make of arrays whose values are known."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from flowvqtalker.errors import MissingDependency
from flowvqtalker.io.video import VideoWriter
from flowvqtalker_eval.metrics.analysis import Analysis
from flowvqtalker_eval.metrics.expression_networks import CLASSES
from flowvqtalker_eval.tables.measures import ClipPair, Options, all_measures, pair_frames
from flowvqtalker_eval.tables.measures.image import compare_frames
from flowvqtalker_eval.tables.pairs import Pair

MEASURES = {measure.name: measure for measure in all_measures(Options())}
T = 40


def both(real: dict, made: dict | None, *, emotion=None, seed=None, name="a") -> ClipPair:
    """A pair of analyses with these arrays; None for the real clip beside itself."""
    lengths = [len(next(iter(arrays.values()))) for arrays in (real, made or real)]
    paths = Path("real.mp4"), Path("real.mp4" if made is None else f"made{seed}.mp4")
    found = [
        Analysis(p, n, (64, 64), 25.0, a, {}) for p, n, a in zip(paths, lengths, (real, made or real), strict=True)
    ]
    pair = Pair(name, paths[1], paths[0], emotion, None, seed)
    return ClipPair(pair, found[1], found[0], *pair_frames(lengths[1], lengths[0]))


@pytest.fixture
def random():
    return np.random.default_rng(0)


def faces(random, count=T):
    """Crops and landmarks on them."""
    points = random.uniform(20, 100, (count, 68, 2)).astype(np.float32)
    return {"aligned": random.integers(0, 256, (count, 128, 128, 3), np.uint8), "aligned68": points}


def test_real_clip_beside_itself_is_perfect(random):
    arrays = {**faces(random, 6), "mobilenet": random.normal(size=(6, 8)), "expression": random.normal(size=(6, 64)),
              "pose": random.normal(size=(6, 6)), "identity_embedding": random.normal(size=(6, 128))}  # fmt: skip
    same = both(arrays, None)
    assert MEASURES["ssim"].pair(same) == {"ssim": 1.0, "psnr": math.inf}
    assert MEASURES["lmd"].pair(same) == {"m_lmd": 0, "f_lmd": 0}
    assert MEASURES["identity"].pair(same) == {"csim": pytest.approx(1), "same_person": 100}
    assert set(MEASURES["coefficients"].pair(same).values()) == {0}
    frechet = MEASURES["frechet-mobilenet"].start()
    frechet.add(same)
    assert frechet.result() == {"frechet_mobilenet": 0, "frechet_mobilenet_images": 6}


def test_frames_without_a_face_do_not_count(random):
    real = faces(random, 4)
    made = {name: values.copy() for name, values in real.items()}
    made["aligned"][2] = 0
    made["aligned68"][2] = np.nan
    made["aligned68"][:2] += [3, -2]  # a shift is no error
    assert MEASURES["ssim"].pair(both(real, made)) == {"ssim": pytest.approx(1), "psnr": math.inf}
    assert MEASURES["lmd"].pair(both(real, made))["f_lmd"] == pytest.approx(0, abs=1e-5)
    made["aligned68"][:] = np.nan
    assert MEASURES["ssim"].pair(both(real, made)) == {}
    assert all(math.isnan(value) for value in MEASURES["lmd"].pair(both(real, made)).values())
    found = MEASURES["detection"].pair(both({"mesh": np.zeros((4, 478, 3))}, {"mesh": np.full((4, 478, 3), np.nan)}))
    assert found == {"detected": 0}


def test_frechet_distance_of_shifted_features(random):
    whole = MEASURES["frechet-mobilenet"].start()
    for _ in range(2):
        real = random.normal(size=(T, 4))
        whole.add(both({"mobilenet": real}, {"mobilenet": real + np.array([3, 0, 0, 4])}))
    assert whole.result() == {"frechet_mobilenet": pytest.approx(25), "frechet_mobilenet_images": 2 * T}


def test_coefficients_and_lips_of_shifted_motion():
    real = {"expression": np.zeros((5, 64)), "pose": np.zeros((5, 6)), "identity": np.zeros(80)}
    made = {**real, "expression": np.full((5, 64), 0.5), "pose": np.full((5, 6), np.radians(2))}
    found = MEASURES["coefficients"].pair(both(real, made))
    assert found["aed"] == 0.5 and found["apd"] == pytest.approx(2)
    assert MEASURES["lve"].pair(both(real, real | {"expression": real["expression"].copy()}))["lve"] == 0
    assert MEASURES["lve"].pair(both(real, made))["lve"] > 0
    unseen = {**real, "identity": np.full(80, np.nan), "expression": np.full((5, 64), np.nan)}
    assert math.isnan(MEASURES["lve"].pair(both(real, unseen))["lve"])


def test_diversity_of_samples():
    whole = MEASURES["diversity"].start()
    for seed in range(3):
        made = {"expression": np.full((5, 64), seed / 8), "pose": np.full((5, 6), np.radians(seed))}
        whole.add(both(made, dict(made), seed=seed))
    # Distances between samples are 1, 1 and 2 steps, of which one is sqrt(64) / 8 and sqrt(3) degrees long.
    found = whole.result()
    assert found["diversity_expression"] == pytest.approx(4 / 3)
    assert found["diversity_pose"] == pytest.approx(4 / 3 * math.sqrt(3))
    alone = MEASURES["diversity"].start()
    alone.add(both(made, dict(made), seed=0))
    assert alone.result() == {}


def test_accuracy_counts_labelled_clips_alone():
    whole = MEASURES["motion-emotion"].start()
    for emotion, predicted in (
        ("happy", "happy"),
        ("sad", "angry"),
        ("fear", None),
        ("natural", "happy"),
        (None, "sad"),
    ):
        scores = np.full(8, np.nan)
        if predicted is not None:
            from flowvqtalker import EMOTIONS

            scores = np.eye(8)[EMOTIONS.index(predicted)]
        whole.add(both({"motion_emotion": scores}, {"motion_emotion": scores}, emotion=emotion))
    assert whole.result() == {"acc_motion": pytest.approx(100 / 3), "acc_motion_clips": 3}
    assert MEASURES["emotion-fan"].start().result() == {}


def test_published_networks_average_frames_and_count_what_they_know():
    """Happy in the mean of the classified frames; contempt is no class of theirs."""
    frames = np.full((T, 7), np.nan)
    frames[0], frames[4] = np.eye(7)[CLASSES.index("sad")] * 0.4, np.eye(7)[CLASSES.index("happy")]
    for name, key in (("emotion-face-api", "acc_face_api"), ("emotion-fer", "acc_fer")):
        whole, array = MEASURES[name].start(), MEASURES[name].array
        for emotion, clip in (("happy", frames), ("sad", frames), ("contempt", frames), ("fear", frames * np.nan)):
            whole.add(both({array: clip}, {array: clip.copy()}, emotion=emotion))
        assert whole.result() == {key: pytest.approx(100 / 3), f"{key}_clips": 3}


def test_sync_of_a_late_clip(random):
    embeddings = random.normal(size=(T, 16))
    late = {"sync_expert_video": np.roll(embeddings, 3, axis=0), "sync_expert_audio": embeddings}
    found = MEASURES["sync"].pair(both(late, dict(late)))
    assert found["sync_offset"] == 3 and found["sync_confidence"] > 0
    silent = {"sync_expert_video": np.zeros((0, 16)), "sync_expert_audio": np.zeros((0, 16))}
    assert MEASURES["sync"].pair(both(late, silent)) == {}
    curve = np.full(31, 9.0)
    curve[17] = 4.0
    found = MEASURES["syncnet"].pair(both({"syncnet_curve": curve}, {"syncnet_curve": curve}))
    assert found == {"lse_c": 5.0, "lse_d": 4.0, "lse_offset": 2.0}
    assert MEASURES["syncnet"].pair(both({"syncnet_curve": curve}, {"syncnet_curve": np.zeros(0)})) == {}


def test_missing_weights_are_named(tmp_path, monkeypatch):
    for name in ("FLOWVQTALKER_SYNCNET", "FLOWVQTALKER_EMOTION_FAN", "FLOWVQTALKER_INCEPTION"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    options = Options(weights=tmp_path, syncnet=tmp_path / "none")
    for measure in all_measures(options):
        if measure.name in ("fid", "sync", "syncnet") or "emotion" in measure.name:
            with pytest.raises(MissingDependency):
                measure.extractors()


def test_frames_as_they_are(tmp_path, random):
    """The protocol ``native``: real frames are brought to the size of the generated ones, lengths must agree."""
    low = random.integers(0, 256, (5, 16, 16, 3), np.uint8)
    frames = [np.kron(frame, np.ones((4, 4, 1), np.uint8)) for frame in low]  # 64x64 in flat blocks
    for name, count, size in (("real", 5, 64), ("small", 5, 32), ("short", 4, 64)):
        with VideoWriter(tmp_path / f"{name}.mp4", crf=1) as writer:
            for frame in frames[:count]:
                writer.write(np.ascontiguousarray(frame[:: 64 // size, :: 64 // size]))
    real = tmp_path / "real.mp4"
    shutil.copy(real, tmp_path / "same.mp4")  # two encodings of the same frames need not be equal to the last bit
    assert compare_frames(real, tmp_path / "same.mp4") == {"ssim": 1.0, "psnr": math.inf}
    small = compare_frames(real, tmp_path / "small.mp4")
    assert small["ssim"] > 0.9 and small["psnr"] > 25
    assert compare_frames(real, tmp_path / "short.mp4") == {}
    native = {measure.name: measure for measure in all_measures(Options(protocol="native"))}
    assert native["ssim"].compare is compare_frames and native["ssim"].extractors() == []
    whole = native["frechet-mobilenet"].start()
    whole.add(both({"mobilenet512": random.normal(size=(6, 8))}, None))
    assert whole.result() == {"frechet_mobilenet": 0, "frechet_mobilenet_images": 6}


def test_portrait_that_is_named(tmp_path, random, astronaut):
    """CSIM to the portrait is there only where pairs name it, and a portrait without a face gives no number."""
    pytest.importorskip("dlib")
    from dataclasses import replace

    from PIL import Image

    from flowvqtalker_eval.metrics.identity import FaceIdentity

    identity = {m.name: m for m in all_measures(Options())}["identity"]
    Image.fromarray(astronaut).save(tmp_path / "face.png")
    Image.fromarray(np.zeros_like(astronaut)).save(tmp_path / "none.png")
    embedding = np.repeat(FaceIdentity().portrait(astronaut)[None], 4, axis=0)
    pair = both({"identity_embedding": embedding}, {"identity_embedding": embedding.copy()})
    assert "csim_portrait" not in identity.pair(pair)
    named = [replace(pair, pair=replace(pair.pair, source=tmp_path / f"{name}.png")) for name in ("face", "none")]
    assert identity.pair(named[0])["csim_portrait"] == pytest.approx(1, abs=1e-3)
    assert math.isnan(identity.pair(named[1])["csim_portrait"])
