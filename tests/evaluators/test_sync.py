"""Mouth crops, the sync expert and its training stage."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.data.shards import SAMPLES, Shard, ShardWriter
from flowvqtalker.errors import UserError
from flowvqtalker.io.video import VideoWriter
from flowvqtalker.train.config import ConfigError, LoopConfig, load_yaml, to_dict
from flowvqtalker.train.loop import fit
from flowvqtalker.train.release import add_weights
from flowvqtalker_eval.evaluators import sync_training as stage
from flowvqtalker_eval.evaluators.mouths import (
    HEIGHT,
    WIDTH,
    PrepareMouths,
    cut_mouths,
    mouth_matrices,
    mouths_of,
)
from flowvqtalker_eval.evaluators.sync_clips import SyncClips
from flowvqtalker_eval.evaluators.sync_data import SegmentConfig, SegmentDataset, SpeechClip, load_speech_clips
from flowvqtalker_eval.evaluators.sync_expert import (
    MouthExtractor,
    SyncExpert,
    SyncExpertConfig,
    SyncExpertExtractor,
    band_energies,
    load_sync_expert,
    sync_expert_score,
)

from ..conftest import babble
from ..data.test_shards import make_clip

TINY = SyncExpertConfig(video=(8, 8, 8, 8, 8), audio=(16, 16, 16), dim=16, dropout=0.0)


# Mouths


def mesh(frames: int, scale: float = 1.0, angle: float = 0.0, centre: tuple[float, float] = (150, 120)) -> np.ndarray:
    """Landmarks (frames, 478, 3) of which only the corners of eyes and mouth are meant."""
    points = np.zeros((frames, 478, 3))
    for number, place in ((33, (-50, -60)), (263, (50, -60)), (61, (-25, 0)), (291, (25, 0))):
        points[:, number, :2] = place
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points[..., :2] = scale * (points[..., :2] @ turn.T + centre)
    return points


def picture(size: tuple[int, int] = (300, 240), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 255, (24, 30), dtype=np.uint8)
    return np.repeat(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)[..., None], 3, axis=2)


def test_mouth_crop_has_its_size_and_place():
    matrix = mouth_matrices(mesh(1))[0]
    # One eye distance (100 pixels) is the width; the corners lie a twentieth of it above the middle.
    assert np.allclose(matrix[:, :2], np.eye(2) * 0.96)
    assert np.allclose(matrix @ [150, 120, 1], [48, 24 - 0.05 * 96])
    crop = cut_mouths([picture()], mesh(1))[0]
    u, v = 70, 30  # the centre of a pixel of the crop, looked up in the frame by hand
    x, y = np.linalg.solve(matrix[:, :2], np.array([u + 0.5, v + 0.5]) - matrix[:, 2]) - 0.5
    whole = cv2.getRectSubPix(picture()[..., 0], (1, 1), (float(x), float(y)))
    assert abs(int(crop[v, u]) - int(whole[0, 0])) <= 2


def test_mouth_crop_does_not_depend_on_size_or_roll():
    plain = cut_mouths([picture()], mesh(1))[0].astype(float)
    large = cv2.resize(picture(), None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR)
    assert np.abs(cut_mouths([large], mesh(1, 4.0))[0] - plain).mean() < 2
    turn = cv2.getRotationMatrix2D((150 - 0.5, 120 - 0.5), -20, 1)
    rolled = cv2.warpAffine(picture(), turn, (300, 240), flags=cv2.INTER_CUBIC)
    assert np.abs(cut_mouths([rolled], mesh(1, angle=math.radians(20)))[0] - plain).mean() < 3
    grey = picture()[..., 0]
    assert np.abs(cut_mouths([grey], mesh(1))[0] - plain).max() <= 1


def test_a_turned_head_keeps_its_scale():
    points = mesh(1)
    points[0, 33], points[0, 263] = (120, 60, 40), (180, 60, -40)  # 60 to the side, 80 in depth: 100
    assert np.hypot(*mouth_matrices(points)[0, 0, :2]) == pytest.approx(0.96)


def test_mouths_without_a_face_or_outside_of_the_frame():
    points = mesh(3)
    points[1] = np.nan
    points[2, :, 0] += 400
    crops = cut_mouths([picture()] * 3, points)
    assert crops[0].any() and not crops[1].any()
    assert crops.shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(MouthExtractor()(np.stack([picture()] * 3), {"mesh": points})["mouth"], crops)
    with pytest.raises(UserError, match="same length"):
        cut_mouths([picture()], points)
    with pytest.raises(UserError, match="478"):
        mouth_matrices(points[:, :68])


@pytest.fixture
def shard(tmp_path) -> Path:
    """A shard of two clips with speech and one picture, and the clip of one of them on disk."""
    folder = tmp_path / "material"
    folder.mkdir()
    with VideoWriter(folder / "said.mp4") as writer:
        for t in range(6):
            writer.write(np.roll(picture(), 3 * t, axis=1))
    clips = [make_clip("said.mp4", 6, 0), make_clip("gone.mp4", 5, 1), make_clip("still.png", 1, 2, is_image=True)]
    points = mesh(6).astype(np.float32)
    points[3] = np.nan
    crop = np.array([[1.5, 0, 11], [0, 1.5, 7]])
    points[..., :2] = points[..., :2] * 1.5 + crop[:, 2]
    points[..., 2] *= 1.5
    clips[0] = replace(clips[0], landmarks=points, crop=crop, split="train", lag=0.0)
    with ShardWriter(folder / "shard") as writer:
        for clip in clips:
            writer.add(clip)
    return folder / "shard"


def test_mouths_beside_a_shard(shard, tmp_path):
    with pytest.raises(UserError, match=r"prepare-mouths"):
        mouths_of(Shard(shard))
    assert PrepareMouths(data=shard.parent, shard=shard).run() == 6
    stored = mouths_of(Shard(shard))
    assert list(stored) == [0]
    wanted = cut_mouths([np.roll(picture(), 3 * t, axis=1) for t in range(6)], mesh(6))
    assert np.abs(stored[0].astype(float) - wanted).mean() < 4  # the frames were compressed
    assert stored[0][3].any()  # a frame without a face takes its neighbours' place
    (tmp_path / "other").mkdir()
    cv2.imwrite(str(tmp_path / "other" / "a.png"), picture())
    with pytest.raises(UserError, match="no clip with speech"):
        PrepareMouths(data=tmp_path / "other", shard=shard).run()


# The sync expert


def test_band_energies_follow_the_frames():
    wave = babble(1.0, seed=3).astype(np.float32)[: 24 * SAMPLES]
    columns = band_energies(wave)
    assert columns.shape == (96, 40)
    later = band_energies(wave[2 * SAMPLES :])
    inner = slice(2, 80)
    drift = columns[8:][inner] - later[inner]
    assert np.abs(drift - np.median(drift)).max() < 1e-4  # the same but for the level
    assert np.allclose(band_energies(0.1 * wave)[inner], columns[inner], atol=2e-2)
    click = np.zeros(10 * SAMPLES)
    click[5 * SAMPLES + 80] = 1  # the middle of the first column of frame 5
    assert int(band_energies(click).sum(1).argmax()) == 20
    assert band_energies(np.zeros(100)).shape == (0, 40)
    assert np.isfinite(band_energies(np.zeros(SAMPLES))).all()
    with pytest.raises(UserError, match="shape"):
        band_energies(np.zeros((2, 640)))


def test_expert_embeds_windows_of_five_frames():
    torch.manual_seed(0)
    expert = SyncExpert(TINY).eval()
    rng = np.random.default_rng(0)
    mouths = rng.integers(1, 255, (13, HEIGHT, WIDTH), dtype=np.uint8)
    wave = rng.normal(size=12 * SAMPLES) * 0.1
    video, audio = expert.embed(mouths, wave)
    assert video.shape == audio.shape == (8, 16)
    assert np.allclose(np.linalg.norm(video, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(audio, axis=1), 1, atol=1e-5)
    for batch in (1, 3):
        again = expert.embed(mouths, wave, batch)
        assert np.allclose(again[0], video, atol=1e-5) and np.allclose(again[1], audio, atol=1e-5)
    changed = mouths.copy()
    changed[7] = 255 - changed[7]
    differs = np.abs(expert.embed(changed, wave)[0] - video).max(1) > 1e-4
    assert differs.tolist() == [False] * 3 + [True] * 5
    changed[7] = 0  # no face
    assert np.isnan(expert.embed(changed, wave)[0]).all(1).tolist() == differs.tolist()
    lighter = np.clip(mouths * 0.5 + 60, 0, 255).astype(np.uint8)
    assert np.abs(expert.embed(lighter, wave)[0] - video).max() < 0.15
    with pytest.raises(UserError, match="5 frames or more, this clip has 4"):
        expert.embed(mouths[:4], wave)
    with pytest.raises(ValueError, match="mouths of shape"):
        expert.video(torch.zeros(1, 4, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="sound of shape"):
        expert.audio(torch.zeros(1, 20, 80))


def test_expert_from_a_folder_of_weights(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="weights are missing"):
        load_sync_expert(tmp_path)
    torch.manual_seed(0)
    expert = SyncExpert(TINY).eval()
    state = {k: v.contiguous() for k, v in expert.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "raw")
    add_weights(tmp_path / "raw", "sync", path=tmp_path, config=to_dict(TINY), data="nothing", steps=0)
    extractor = SyncExpertExtractor(tmp_path)
    assert extractor.settings()["weights"] == weights.manifest(tmp_path)["sync.safetensors"].sha256
    rng = np.random.default_rng(0)
    mouths = rng.integers(1, 255, (9, HEIGHT, WIDTH), dtype=np.uint8)
    wave = (rng.normal(size=9 * SAMPLES) * 0.1).astype(np.float32)
    found = extractor({"mouth": mouths}, wave)
    video, audio = expert.embed(mouths, wave)
    assert np.allclose(found["sync_expert_video"], video, atol=5e-3)  # stored as float16
    assert np.allclose(found["sync_expert_audio"], audio, atol=5e-3)
    assert extractor({"mouth": mouths}, None)["sync_expert_video"].shape == (0, 16)
    assert extractor({"mouth": mouths[:3]}, wave)["sync_expert_audio"].shape == (0, 16)


# The stage


def spoken(number: int, frames: int = 40) -> SpeechClip:
    """A mouth that is as dark as the sound is loud."""
    rng = np.random.default_rng(number)
    loud = np.repeat(rng.uniform(0, 1, frames // 2), 2)
    mouths = np.full((frames, HEIGHT, WIDTH), 160, np.uint8)
    for t in range(frames):
        cv2.ellipse(mouths[t], (48, 22), (18, 1 + int(14 * loud[t])), 0, 0, 360, 40, -1)
    gain = np.interp(np.arange(frames * SAMPLES) / SAMPLES - 0.5, np.arange(frames), loud)
    wave = (rng.normal(size=frames * SAMPLES) * 6000 * (0.02 + gain)).clip(-32768, 32767).astype(np.int16)
    energies = band_energies(wave / 32768).astype(np.float16)
    return SpeechClip(mouths, wave, energies, f"person {number % 3}")


LOOP = LoopConfig(steps=30, batch_size=4, lr=3e-3, ema=0.5, device="cpu", log_every=10, save_every=30, validate_every=0)


def test_items_are_pure_functions_and_keep_lips_and_sound_together():
    clips = [spoken(n) for n in range(4)]
    plain = SegmentDataset(clips, SegmentConfig(frames=12, augment=False), seed=5)
    for i in (0, 7, 123456):
        item = plain[i]
        where = [
            (n, t)
            for n, clip in enumerate(clips)
            for t in range(29)
            if np.array_equal(clip.mouths[t : t + 12], item["mouths"].numpy())
        ]
        sounds = [clips[n].energies[4 * t : 4 * t + 48].astype(np.float32) for n, t in where]
        assert any(np.array_equal(sound, item["sound"].numpy()) for sound in sounds)
    varied = SegmentDataset(clips, SegmentConfig(frames=12), seed=5)
    a, b = varied[3], varied[3]
    assert torch.equal(a["mouths"], b["mouths"]) and torch.equal(a["sound"], b["sound"])
    assert a["mouths"].shape == (12, HEIGHT, WIDTH) and a["mouths"].dtype == torch.uint8
    assert torch.isfinite(a["sound"]).all()
    with pytest.raises(UserError, match="no clips"):
        SegmentDataset([], SegmentConfig())
    with pytest.raises(ConfigError, match="frames must be at least"):
        SegmentConfig(frames=5)


class Loudness(SyncExpert):
    """An expert that compares the darkness of the mouth with the loudness of the sound."""

    def video(self, mouths):
        return self._point((mouths < 80).float().mean((2, 3)).unfold(1, 5, 1))

    def audio(self, energies):
        return self._point((energies.float().mean(2).exp()).unfold(1, 20, 4).unflatten(-1, (5, 4)).mean(-1))

    def _point(self, values):
        return torch.nn.functional.normalize(values - values.mean(-1, keepdim=True), dim=-1)


def test_sound_can_be_delayed_by_a_known_offset():
    """The expert tells the offset that was made, with its sign."""
    clip = spoken(1, 60)
    expert = Loudness(TINY)
    for late in (-8, -1, 0, 5):
        assert stage.offset_scores(expert, clip, late).offset == -late


def test_a_few_steps_lower_the_loss(tmp_path):
    clips = [spoken(n) for n in range(6)]
    config = stage.Config(expert=TINY, segment=SegmentConfig(frames=22, augment=False), loop=LOOP, slack_from=20)
    made = stage.SyncStage(config, clips, clips[:3])
    batch = torch.utils.data.default_collate([made.data[i] for i in range(900, 908)])
    before = float(made.loss("expert", batch, 0)[0].detach())
    results = fit(made, LOOP, tmp_path)
    after = float(made.loss("expert", batch, 0)[0].detach())
    assert after < 0.7 * before
    assert results["clips"] == 3
    assert results["chance"] == pytest.approx(3 / 31)
    assert results["found"] == pytest.approx(1 - results["miss"])
    assert results["confidence"] > results["confidence_exchanged"]
    add_weights(tmp_path, "sync", path=tmp_path / "weights")
    loaded = load_sync_expert(tmp_path / "weights")
    assert loaded.config == TINY
    score = sync_expert_score(*loaded.embed(clips[0].mouths, clips[0].sound()))
    assert abs(score.offset) <= 1


def test_neighbouring_windows_are_no_negatives():
    config = stage.Config(expert=TINY, segment=SegmentConfig(frames=22), loop=LOOP)
    made = stage.SyncStage(config, [spoken(0)], [])
    torch.manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(2, 18, 16), dim=-1)
    loss, logs = made._contrast(one, one)
    assert float(logs["found"]) == 1
    near = one.clone()
    near[:, 1] = one[:, 0]  # two equal neighbours cost nothing in the contrast of either
    other = one.clone()
    other[:, 9] = one[:, 0]
    assert float(made._contrast(near, near)[1]["within"]) < float(made._contrast(other, other)[1]["within"])
    assert torch.isfinite(loss)


def test_slack_takes_the_best_shift_of_each_segment():
    torch.manual_seed(0)
    video = torch.nn.functional.normalize(torch.randn(3, 20, 16), dim=-1)
    audio = torch.stack([torch.roll(one, k, 0) for one, k in zip(video, (-2, 0, 1), strict=True)])
    lips, sound = stage._aligned(video, audio, 2)
    assert lips.shape == sound.shape == (3, 16, 16)
    assert torch.equal(lips, sound)
    assert torch.equal(lips, video[:, 2:18])
    assert stage._aligned(video, audio, 0) == (video, audio)
    far = torch.stack([torch.roll(one, 5, 0) for one in video])  # beyond the slack
    assert not torch.equal(*stage._aligned(video, far, 2))
    with pytest.raises(ConfigError, match="slack must be between 0 and 5"):
        stage.Config(segment=SegmentConfig(frames=22), slack=6)


def test_build_reads_a_shard_and_says_what_is_missing(shard, tmp_path):
    config = load_yaml(stage.Config, Path(__file__).parents[2] / "configs" / "sync.yaml")
    assert config.loop.steps > 0
    with pytest.raises(UserError, match=r"index\.npz"):
        stage.build(stage.Config(shards=(tmp_path / "none",)))
    with pytest.raises(ConfigError, match="no shards"):
        stage.Config(shards=())
    PrepareMouths(data=shard.parent, shard=shard).run()
    clips = load_speech_clips([shard], "train", 1)
    assert len(clips) == 1
    assert len(clips[0].mouths) == 4  # one frame at each end is cut off
    assert len(clips[0].wave) == 4 * SAMPLES and clips[0].energies.shape == (16, 40)
    assert np.array_equal(clips[0].wave, np.round(Shard(shard).wave(0) * 32768)[SAMPLES:-SAMPLES])
    assert load_speech_clips([shard], "val", 1) == []


def test_lags_of_clips_are_found(shard, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no shard"):
        SyncClips(shard=tmp_path / "none").run()
    PrepareMouths(data=shard.parent, shard=shard).run()
    with pytest.raises(UserError, match="has no mouths"):
        SyncClips(shard=shard).run()  # its clips are too short

    monkeypatch.setattr("flowvqtalker_eval.evaluators.sync_clips.load_sync_expert", lambda folder: Loudness(TINY))
    late, clips = (0, 2, -1), [spoken(n, 60) for n in range(3)]
    with ShardWriter(tmp_path / "more") as writer:
        for number, (clip, lag) in enumerate(zip(clips, late, strict=True)):
            late_sound = np.roll(clip.wave, lag * SAMPLES)
            writer.add(replace(make_clip(f"{number}.mp4", 60, number), audio=late_sound))
    np.save(tmp_path / "more" / "mouths.npy", np.concatenate([clip.mouths for clip in clips]))
    np.savez(tmp_path / "more" / "mouths.npz", start=np.array([0, 60, 120]))
    SyncClips(shard=tmp_path / "more").run()
    with np.load(tmp_path / "more" / "lags.npz") as found:
        assert found["offset"].tolist() == [-lag for lag in late]
        assert (found["confidence"] > 0).all()
