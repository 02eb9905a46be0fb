"""The flows' data and training stages on clips made up here."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowvqtalker import EMOTIONS, weights
from flowvqtalker.data.retarget import Retargeter
from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import fit as fit_face
from flowvqtalker.face.model import FaceModel
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, PoseFlow, PoseFlowConfig
from flowvqtalker.motion.likelihood import rollout
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.sampler import TEMPERATURE
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder, SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.features import log_mel
from flowvqtalker.speech.features import windows as all_windows
from flowvqtalker.train import emotion_bias, expflow, poseflow
from flowvqtalker.train.config import LoopConfig, from_dict, to_dict
from flowvqtalker.train.corpus import NEUTRAL, Corpus, MotionClip, encode_corpus
from flowvqtalker.train.emotion_bias import fit_emotion_bias
from flowvqtalker.train.flow_stage import Features, Losses, correlation, load_speech_encoder, whole_clips
from flowvqtalker.train.identity_split import SMILE, Pair
from flowvqtalker.train.loop import fit
from flowvqtalker.train.neutral_estimate import estimate_neutral
from flowvqtalker.train.neutral_map import learn_neutral_map
from flowvqtalker.train.sequences import SequenceConfig, SequenceDataset

AUDIO = AudioConfig(width=8, layers=2, lookahead=1)
LOOP = LoopConfig(steps=6, batch_size=4, lr=3e-3, log_every=2, validate_every=3, save_every=3, device="cpu", ema=0.5)


def clip(number: int, length: int = 40, dim: int = 64, speech: bool = True, who: str | None = None) -> MotionClip:
    random = np.random.default_rng(number)
    frames = np.cumsum(0.1 * random.normal(size=(length, dim)), axis=0).astype(np.float32)
    mel = random.normal(size=(1 + length * 640 // 200, 80)).clip(-4, 4).astype(np.float16) if speech else None
    return MotionClip(frames, mel, number % 9, speech, who or f"person {number % 5}")


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """No measurement of the emotions' bias, which takes most of the time of an export."""
    monkeypatch.setattr(expflow, "fit_emotion_bias", lambda *_, **__: None)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus([clip(n, 20 + 3 * n, speech=n % 3 > 0) for n in range(18)])


def dataset(corpus: Corpus, plain: bool = False, **settings) -> SequenceDataset:
    return SequenceDataset(corpus, SequenceConfig(**{"frames": 16, **settings}), AUDIO, 10, seed=5, plain=plain)


def test_windows_equal_those_of_the_front_end():
    wave = np.random.default_rng(0).normal(size=40 * 640).astype(np.float32) * 0.1
    one = MotionClip(np.zeros((40, 64), np.float32), log_mel(wave).astype(np.float16), 0, True, "a")
    assert np.allclose(one.windows(np.arange(40)), all_windows(wave).numpy(), atol=3e-3)  # float16


def test_fine_windows_equal_those_of_the_front_end():
    wave = np.random.default_rng(0).normal(size=40 * 640).astype(np.float32) * 0.1
    mel = log_mel(wave, "whisper").astype(np.float16)
    one = MotionClip(np.zeros((40, 64), np.float32), mel, 0, True, "a", frontend="whisper")
    assert np.allclose(one.windows(np.arange(40)), all_windows(wave, "whisper").numpy(), atol=3e-3)


def test_item_is_a_pure_function_of_seed_and_number(corpus):
    first, second = dataset(corpus), dataset(corpus)
    for i in (0, 7, 123456):
        a, b = first[i], second[i]
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert not torch.equal(first[1]["frames"], first[2]["frames"])


def test_item_holds_the_true_past(corpus):
    data = dataset(corpus, plain=True)
    one = corpus.clips[9]
    random = np.random.default_rng(0)
    start = data.item(9, 0, random)
    assert float(start["frames"][:10].abs().max()) == 0
    assert np.array_equal(start["frames"][10:].numpy(), one.frames[:16])
    middle = data.item(9, 20, random)
    assert np.array_equal(middle["frames"].numpy(), one.frames[10:36])
    assert middle["windows"].shape == (16 + 4, 80, 16)
    assert np.array_equal(middle["windows"].numpy(), one.windows(np.arange(17, 37)))
    end = data.item(9, len(one.frames) - 5, random)
    assert end["mask"].tolist() == [True] * 5 + [False] * 11
    assert np.array_equal(end["windows"][-1].numpy(), one.windows(np.array([len(one.frames) - 1]))[0])


def test_every_class_is_seen_often(corpus):
    clips = [replace(c, emotion=5) for c in corpus.clips] + [clip(n, 15, speech=False) for n in range(9)]
    rare = Corpus(clips)  # eight of nine classes have 15 of 800 frames each
    random = np.random.default_rng(0)
    counts = np.bincount([rare.clips[rare.pick(random, 0.5)].emotion for _ in range(4000)], minlength=9)
    assert (counts[[0, 1, 2, 3, 4, 6, 7, 8]] > 0.5 / 9 * 4000 * 0.75).all()
    spoken = [rare.clips[rare.pick(random, 0.0)] for _ in range(200)]
    assert all(c.speech for c in spoken)


def test_people_with_a_known_neutral_face_get_their_share():
    clips = [replace(clip(n, 100, who=f"stranger {n}"), emotion=0) for n in range(9)]
    clips += [
        replace(clip(20, 10, who="a"), emotion=0),
        replace(clip(21, 10, who="a"), emotion=EMOTIONS.index("neutral")),
    ]
    random = np.random.default_rng(0)
    mixed = Corpus(clips, known_neutral=0.6)
    picked = [mixed.pick(random, 1.0) for _ in range(3000)]
    angry = [n for n in picked if mixed.clips[n].emotion == 0]
    assert np.mean([n == 9 for n in angry]) == pytest.approx(0.6, abs=0.05)


def test_expression_retargeting_moves_an_emotion_to_the_speakers_face():
    neutral = EMOTIONS.index("neutral")
    shift = np.linspace(-1, 1, 64, dtype=np.float32)
    calm = replace(clip(0, 60, who="a"), emotion=neutral)
    angry = replace(clip(1, 60, who="a", speech=False), emotion=0)
    angry = replace(angry, frames=np.tile(calm.frames.mean(0) + shift, (60, 1)))
    speaker = replace(clip(2, 60, who="b"), emotion=neutral)
    angry = replace(angry, identity="a")
    both = Corpus([calm, angry, speaker], lips=np.zeros((64, 64), np.float32), known_neutral=0.5)
    data = dataset(both, frames=60, retarget_expression=1.0, source_dropout=0.0, source_noise=0.0, augment=False)
    item = data.item(1, 0, np.random.default_rng(0), speaker=2)
    moved = item["frames"][10:].numpy().mean(0) - speaker.frames.mean(0)
    assert np.allclose(moved, shift, atol=0.05)
    assert np.allclose(item["source"], speaker.frames.mean(0), atol=1e-6), "the source is the neutral speaker"
    stays = dataset(both, frames=60, retarget_expression=0.0, augment=False).item(
        1, 0, np.random.default_rng(0), speaker=2
    )
    assert np.allclose(stays["frames"][10:].numpy().mean(0), angry.frames.mean(0), atol=0.05)


def test_expression_retargeting_uses_the_estimated_neutral_face():
    random = np.random.default_rng(0)
    neutral, shift = EMOTIONS.index("neutral"), np.linspace(-1, 1, 64)
    faces = {f"person {n}": random.normal(size=64) for n in range(40)}
    clips = []
    for who, face in faces.items():
        stranger = int(who.split()[1]) >= 30  # ten of forty are only seen angry
        for label in (0,) if stranger else (neutral, 0):
            rest = face + (shift if label == 0 else 0)
            frames = (rest + 0.01 * random.normal(size=(20, 64))).astype(np.float32)
            clips.append(replace(clip(0, 20, who=who), frames=frames, emotion=label))
    known, estimated = (Corpus(clips, lips=np.zeros((64, 64), np.float32), estimate=e) for e in (False, True))
    number = len(clips) - 1
    assert not known.has_neutral(number) and estimated.has_neutral(number)
    face = faces[clips[number].identity]
    assert np.abs(estimated.neutral(number) - face).max() < 0.1 < np.abs(known.neutral(number) - face).mean()
    data = dataset(estimated, frames=20, retarget_expression=1.0, source_dropout=0.0, source_noise=0.0, augment=False)
    moved = data.item(number, 0, np.random.default_rng(1), speaker=0)["frames"][10:].numpy().mean(0)
    assert np.allclose(moved - clips[0].frames.mean(0), shift, atol=0.1)


def test_neutral_estimate_is_the_best_linear_unbiased_prediction():
    """Against generalised least squares with the whole covariance matrix, for the variances that were found."""
    random = np.random.default_rng(1)
    emotions = [0, 0, 5, 5, 6, 6, 0, 5]
    people = ["a", "b", "a", "c", "c", "d", "d", "e"]
    x = random.normal(size=(8, 3)) * [1, 2, 0.5]
    found = estimate_neutral(x, emotions, people)
    design = np.array([[e == c for c in (0, 5, 6)] for e in emotions], float)
    member = np.array([[p == q for q in "abcde"] for p in people], float)
    for d in range(3):
        cover = found.person[d] * member @ member.T + found.rest[d] * np.eye(8)
        inverse = np.linalg.inv(cover)
        effect = np.linalg.solve(design.T @ inverse @ design, design.T @ inverse @ x[:, d])
        person = found.person[d] * member.T @ inverse @ (x[:, d] - design @ effect)
        assert np.allclose([found.emotions[c][d] for c in (0, 5, 6)], effect)
        assert np.allclose([found.people[q][d] for q in "abcde"], person)
    assert np.allclose(found.face("a", 6), found.emotions[6] + found.people["a"])
    assert np.allclose(found.face("nobody", 6), found.emotions[6])
    with pytest.raises(UserError, match="one emotion and one name"):
        estimate_neutral(x, emotions[:3], people)


def test_neutral_estimate_finds_the_variances():
    random = np.random.default_rng(2)
    people = [f"p{n}" for n in range(200) for _ in range(3)]
    emotions = random.integers(0, 4, size=600).tolist()
    of_person = random.normal(size=(200, 2)) * [2, 0.5]
    x = np.repeat(of_person, 3, axis=0) + random.normal(size=(600, 2)) * [1, 1]
    found = estimate_neutral(x, emotions, people)
    assert np.allclose(found.person, [4, 0.25], rtol=0.25)
    assert np.allclose(found.rest, [1, 1], rtol=0.15)


def test_people_share_the_speech_by_square_root():
    clips = [clip(0, 400, who="much"), clip(1, 100, who="little")]
    random = np.random.default_rng(1)
    both = Corpus(clips)
    share = np.mean([both.clips[both.pick(random, 0.0)].identity == "much" for _ in range(4000)])
    assert share == pytest.approx(2 / 3, abs=0.03)


def test_source_is_the_neutral_face_or_hidden(corpus):
    random, settings = np.random.default_rng(0), SequenceConfig()
    drawn = np.stack([corpus.source(4, random, settings.source_dropout, settings.source_noise) for _ in range(400)])
    hidden = ~drawn.any(1)
    assert 50 < hidden.sum() < 115
    error = drawn[~hidden] - corpus.neutral(4)
    assert error.std() == pytest.approx(settings.source_noise, rel=0.1)
    assert np.abs(error.mean(0)).max() < 0.1


def test_retargeted_clips_share_the_speech_and_keep_the_person(corpus):
    face = FaceModel.load(weights.folder() / "face_model.safetensors")
    spoken = Corpus([replace(clip(n, 40, who=f"p{n}"), emotion=EMOTIONS.index("natural")) for n in range(6)])
    more = spoken.with_retargeted(Retargeter(face, None), seed=0)
    made = more.clips[6:]
    assert len(made) == 6
    assert all(one.retargeted and one.mel is spoken.clips[n].mel for n, one in enumerate(made))
    assert NEUTRAL not in more.labels[6:]
    for n in range(6):
        assert np.array_equal(more.neutral(n), spoken.neutral(n)), "the emotion is no part of the neutral face"
        assert made[n].energy.shape == (40,)


def test_neutral_map_keeps_the_person_and_drops_the_emotion():
    random = np.random.default_rng(0)
    smile = np.float32(3) * np.eye(64, dtype=np.float32)[0]
    clips = []
    for n in range(60):
        person = np.concatenate([[0], random.normal(size=63)])
        for label, added in ((NEUTRAL, 0 * smile), (EMOTIONS.index("happy"), smile)):
            frames = (person + added + 0.05 * random.normal(size=(20, 64))).astype(np.float32)
            clips.append(MotionClip(frames, None, label, False, f"p{n}"))
    found = learn_neutral_map(None, Corpus(clips), [])
    person = np.concatenate([[0], random.normal(size=63)]).astype(np.float32)
    from_smile = found.numpy() @ np.append(person + smile, 1)
    assert abs(from_smile[0]) < 0.5, "the smile is gone"
    assert np.corrcoef(from_smile[1:], person[1:])[0, 1] > 0.95


def test_neutral_map_takes_any_smile_off_when_it_has_seen_smiling_pictures():
    face = FaceModel.load(weights.folder() / "face_model.safetensors")
    random = np.random.default_rng(1)
    shown = face.arkit[list(SMILE)].mean(0)
    smile = 10 * shown[:-1] / shown[:-1].norm()
    pose = torch.tensor([0, 0, 0, 0, 0, 13.0])
    neutral, smiling = (face.project(torch.zeros(80), b * smile, pose).numpy() for b in (0, 0.4))
    clips = [
        MotionClip(random.normal(size=(1, 64)).astype(np.float32).repeat(5, 0), None, NEUTRAL, False, f"p{n}")
        for n in range(30)
    ]
    found = learn_neutral_map(face, Corpus(clips), [Pair("p", "train", neutral, smiling)])
    person = torch.from_numpy(clips[0].frames[0])
    fitted = [torch.from_numpy(fit_face(face, landmarks).expression[0]) for landmarks in (neutral, smiling)]
    laughing = (person + 2 * (fitted[1] - fitted[0])) @ found[:, :-1].mT + found[:, -1]
    assert float(laughing @ shown[:-1] + shown[-1]) == pytest.approx(0, abs=1e-4)
    assert torch.corrcoef(torch.stack([laughing, person]))[0, 1] > 0.7


def emotional_corpus(lips=None, gap=None) -> Corpus:
    """One person: a neutral clip with speech, a silent happy clip."""
    neutral = replace(clip(1, 60, who="a"), emotion=EMOTIONS.index("neutral"))
    happy = replace(clip(2, 21, speech=False, who="a"), emotion=EMOTIONS.index("happy"))
    happy.frames[:] += 3
    return Corpus([neutral, happy], lips, gap)


def test_strength_moves_the_mean_expression_and_the_class_weights():
    both = emotional_corpus()
    data = dataset(both, frames=21)
    random = np.random.default_rng(0)
    plain, half, none = (data.item(1, 0, random, strength=s) for s in (1.0, 0.5, 0.0))
    happy, neutral = EMOTIONS.index("happy"), EMOTIONS.index("neutral")
    assert [float(half["emotion"][i]) for i in (happy, neutral)] == [0.5, 0.5]
    assert float(none["emotion"][neutral]) == 1
    gap = torch.from_numpy(both.means[1] - both.means[0])
    assert torch.allclose(plain["frames"][10:] - half["frames"][10:], 0.5 * gap, atol=1e-5)
    assert torch.allclose(none["frames"][10:].mean(0), torch.from_numpy(both.means[0]), atol=1e-4)
    assert torch.allclose(half["mean"], half["frames"][10:].mean(0), atol=1e-4)


def test_lip_retargeting_puts_spoken_lips_on_an_emotional_face():
    lips = np.zeros((64, 64), np.float32)
    lips[0, 0] = lips[1, 1] = 1
    both = emotional_corpus(lips, np.eye(64, dtype=np.float32)[0])
    data = dataset(both, frames=16, audio_dropout=0.0, augment=False)
    retargeted = data.item(1, 0, np.random.default_rng(0), speaker=0)
    spoken, happy = both.clips[0].frames, both.clips[1].frames
    got = retargeted["frames"][10:].numpy()
    assert np.allclose(got[:, 1] - both.means[1, 1], spoken[:16, 1] - both.means[0, 1], atol=1e-4)
    assert np.allclose(got[:, 0], spoken[:16, 0], atol=1e-4), "the mouth opens as much as the speaker's"
    assert all((np.abs(happy[:, 2:] - row[2:]).max(1) < 1e-5).any() for row in got), "the rest is the happy clip's"
    assert retargeted["has_speech"]
    assert retargeted["speech"]
    assert np.array_equal(retargeted["windows"][3:-1].numpy(), both.clips[0].windows(np.arange(16)))
    assert int(retargeted["emotion"].argmax()) == EMOTIONS.index("happy")


def test_augmented_items_stay_in_their_share():
    lips = np.eye(64, dtype=np.float32)
    data = dataset(emotional_corpus(lips), balanced=1.0, strength=0.0)
    items = [data[i] for i in range(400)]
    happy = [item for item in items if item["emotion"][EMOTIONS.index("happy")] == 1]
    assert 0.4 < np.mean([item["has_speech"] for item in happy]) < 0.6
    plain = dataset(emotional_corpus(lips), plain=True, balanced=1.0)
    assert all(set(plain[i]["emotion"].tolist()) == {0.0, 1.0} for i in range(40))
    assert not any(plain[i]["has_speech"] for i in range(40) if plain[i]["emotion"][EMOTIONS.index("happy")])


def test_speech_is_hidden_for_some_items(corpus):
    items = [dataset(corpus)[i] for i in range(300)]
    spoken = [item for item in items if item["has_speech"]]
    muted = sum(not item["speech"] for item in spoken)
    assert 0.07 < muted / len(spoken) < 0.25
    assert not any(item["speech"] for item in items if not item["has_speech"])
    plain = dataset(corpus, plain=True)
    assert all(plain[i]["speech"] == plain[i]["has_speech"] for i in range(50))


def test_a_frozen_encoder_runs_once_for_every_clip():
    clips = Corpus([clip(n, 30 + n, speech=n != 2) for n in range(4)])
    plain = dataset(clips, plain=True)
    torch.manual_seed(0)
    encoder = AudioEncoder(AUDIO).eval()
    windows = [plain.item(n, 9, np.random.default_rng(0))["windows"] for n in (0, 1)]
    encode_corpus(clips, encoder, copies=3)
    for n in (0, 1):
        assert clips.clips[n].features.shape == (3, 30 + n, 8)
        ready = plain.item(n, 9, np.random.default_rng(0))["windows"]
        assert torch.allclose(ready, encoder(windows[n][None])[0], atol=2e-3)  # float16
    assert np.abs(clips.clips[0].features[0] - clips.clips[0].features[1]).max() > 0.01
    assert clips.clips[2].features.shape == (1, 32, 8)
    varied = dataset(clips)
    shapes = {tuple(varied[i]["windows"].shape) for i in range(20)}
    assert shapes == {(16, 8)}


def test_empty_corpus_is_named():
    with pytest.raises(UserError, match="no clips to train on"):
        Corpus([])


def test_correlation_counts_masked_frames_only():
    a = torch.randn(2, 9)
    b = a.clone()
    b[0, 5:] = 7
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:] = False
    assert torch.allclose(correlation(a, b, mask), torch.ones(2), atol=1e-5)
    assert torch.allclose(correlation(a, -b, mask), -torch.ones(2), atol=1e-5)


def exp_config(**settings) -> expflow.Config:
    flow = ExpFlowConfig(steps=2, width=8, heads=2, history=10, audio=AUDIO)
    given = {"flow": flow, "loop": LOOP, "sequences": SequenceConfig(frames=12), "bank": 20, **settings}
    return expflow.Config(**given)


def exp_stage(corpus: Corpus, **settings) -> expflow.ExpFlowStage:
    basis = torch.randn(64, 478, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    return expflow.ExpFlowStage(exp_config(**settings), corpus, corpus, basis)


@pytest.fixture(scope="module")
def exp_run(corpus, tmp_path_factory) -> tuple[expflow.ExpFlowStage, dict[str, float], Path]:
    """A whole run of the stage ``expflow`` with a shorter measurement of the emotions' bias: stage, scores, folder."""
    out, stage = tmp_path_factory.mktemp("exp") / "run", exp_stage(corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emotion_bias, "_FRAMES", 18)
        return stage, fit(stage, LOOP, out), out


def test_expflow_stage_trains_exports_and_loads(exp_run):
    stage, scores, run = exp_run
    rows = list(csv.DictReader((run / "validation.csv").read_text().splitlines()))
    assert float(rows[-1]["nll"]) < float(rows[0]["nll"])
    assert {"lips", "lips_regression", "lips_range", "speed"} <= set(scores)
    assert all(bool(step.norm.initialised) for step in stage.flow.each_step())

    state = load_file(str(run / "weights.safetensors"))
    assert state["emotion_bias"].any()
    config = json.loads((run / "config.json").read_text())["config"]
    flow = ExpFlow.load(state, config)
    assert flow.config == stage.config.flow
    bank = LatentBank.load(state)
    assert bank is not None
    assert sorted(set(bank.emotion.tolist())) == list(range(len(EMOTIONS)))
    assert torch.bincount(bank.emotion).max() <= 20
    assert bank.latents.shape[1] == 64


@pytest.mark.usefixtures("quick_export")
def test_expflow_starts_from_an_earlier_run(corpus, exp_run, tmp_path):
    run = exp_run[2]
    stored = load_file(str(run / "weights.safetensors"))
    stage = exp_stage(corpus)
    stage.flow.blink.fill_(3)
    expflow.start_from(stage.flow, run)
    state = stage.flow.own_state()
    taken = [key for key in state if not key.startswith("blink") and key not in ExpFlow.optional]
    assert all(torch.equal(state[key], stored[key].to(state[key])) for key in taken)
    assert float(stage.flow.blink.min()) == 3, "blinks are those of the new data"
    scores = fit(stage, replace(LOOP, steps=1, lr=1e-9, ema=0.0), tmp_path / "next")
    before = json.loads((run / "config.json").read_text())["scores"]
    assert scores["nll"] == pytest.approx(before["nll"], abs=0.05), "the steps' start is not measured anew"
    other = exp_stage(corpus, flow=ExpFlowConfig(steps=2, width=16, heads=2, audio=AUDIO))
    with pytest.raises(UserError, match="does not fit this flow"):
        expflow.start_from(other.flow, run)
    with pytest.raises(UserError, match="is no finished run"):
        expflow.start_from(stage.flow, tmp_path / "none")


@pytest.mark.usefixtures("quick_export")
def test_expflow_resume_is_exact(corpus, exp_run, tmp_path):
    fit(exp_stage(corpus), replace(LOOP, steps=3), tmp_path)
    fit(exp_stage(corpus), LOOP, tmp_path, resume=True)
    a, b = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["model"] for folder in (exp_run[2], tmp_path)
    )
    (bias,) = (key for key in a if key.endswith("emotion_bias"))  # measured at an export, and not here
    assert a.pop(bias).any() and not b.pop(bias).any()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_lip_regression_learns_lips_from_sound(corpus):
    """Speech that is the lips: the auxiliary loss falls below what the mean gives."""
    clips = []
    for n in range(6):
        one = clip(n, 40)
        one.frames[:, 0] = np.sin(np.arange(40) / 3 + n)
        mel = np.repeat(one.frames[:, :1] * 3, 4, axis=0)[:129].astype(np.float16)
        clips.append(replace(one, mel=np.broadcast_to(mel, (len(mel), 80))))
    stage = exp_stage(
        Corpus(clips), losses=Losses(consistency=0, lips=1.0), sequences=SequenceConfig(12, augment=False)
    )
    stage.lips = torch.zeros_like(stage.lips)
    stage.lips[0, 0] = 1
    optimizer = torch.optim.Adam(stage.module.parameters(), lr=1e-2)
    data = stage.dataset("train")
    batch = torch.utils.data.default_collate([data[i] for i in range(8)])
    for _ in range(40):
        extra, logs = stage.auxiliary(batch, stage.flow.audio(batch["windows"]))
        assert extra is not None
        extra.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(logs["lips"]) < 0.3


SPEECH_ENCODER = SpeechEncoderConfig(dim=8, heads=2, attention=1, back=2, ahead=1, reach=((1, 0),), width=8)


@pytest.fixture
def speech_run(tmp_path):
    """A run of the stage ``speech``, as it is written."""
    torch.manual_seed(3)
    speech_encoder, lip_prior = SpeechEncoder(SPEECH_ENCODER), torch.nn.Linear(8, 64)
    state = {f"audio.{key}": value for key, value in speech_encoder.state_dict().items()}
    state |= {f"lip_prior.{key}": value for key, value in lip_prior.state_dict().items()}
    (tmp_path / "speech").mkdir()
    save_file(state, str(tmp_path / "speech" / "weights.safetensors"))
    about = {"stage": "speech", "config": to_dict(SPEECH_ENCODER)}
    (tmp_path / "speech" / "config.json").write_text(json.dumps(about))
    return tmp_path / "speech"


@pytest.mark.usefixtures("quick_export")
@pytest.mark.slow
def test_a_speech_encoder_stays_frozen(tmp_path, speech_run):
    def fresh(dim: int) -> Corpus:
        clips = [clip(n, 20 + 3 * n, dim=dim, speech=n % 3 > 0) for n in range(18)]
        return Corpus([replace(one, frontend="whisper") for one in clips])

    speech_encoder, lip_prior = load_speech_encoder(speech_run)
    before = {key: value.clone() for key, value in speech_encoder.state_dict().items()}
    config = exp_config()
    config = replace(config, flow=replace(config.flow, speech_encoder=True))
    stage = expflow.ExpFlowStage(
        config, fresh(64), fresh(64), torch.randn(64, 478, 3), speech=(speech_encoder, lip_prior)
    )
    fit(stage, LOOP, tmp_path / "exp")
    state = load_file(str(tmp_path / "exp" / "weights.safetensors"))
    assert not any(key.startswith("audio.") for key in state)
    assert not torch.equal(state["lip_prior.weight"], lip_prior["weight"])
    assert all(torch.equal(before[key], value) for key, value in speech_encoder.state_dict().items())
    settings = json.loads((tmp_path / "exp" / "config.json").read_text())["config"]
    again = ExpFlow.load(state, settings, speech_encoder)
    assert again.audio is speech_encoder
    with pytest.raises(ValueError, match="needs a speech encoder"):
        ExpFlow.load(state, settings)

    flow = PoseFlowConfig(steps=2, width=8, heads=2, speech_encoder=True)
    poses = poseflow.PoseFlowStage(poseflow.Config(flow=flow, loop=LOOP), fresh(6), fresh(6), speech_encoder)
    fit(poses, LOOP, tmp_path / "pose")
    assert not any(key.startswith("audio.") for key in load_file(str(tmp_path / "pose" / "weights.safetensors")))


def test_missing_speech_encoder_is_named(tmp_path):
    with pytest.raises(UserError, match="no finished run of `flowvqtalker train speech`"):
        load_speech_encoder(tmp_path / "none")
    features = Features(speech_encoder=tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        expflow.build(replace(exp_config(), features=features))


def test_poseflow_stage_trains_exports_and_loads(tmp_path):
    poses = Corpus([clip(n, 50, dim=6, speech=n % 3 > 0) for n in range(8)])
    flow = PoseFlowConfig(steps=2, width=8, heads=2, audio=AUDIO)
    stage = poseflow.PoseFlowStage(poseflow.Config(flow=flow, loop=LOOP), poses, poses)
    scores = fit(stage, LOOP, tmp_path / "run")
    assert {"nll", "range", "speed"} <= set(scores)
    assert (stage.flow.data_std != 1).all(), "poses are scaled to numbers near one"
    state = load_file(str(tmp_path / "run" / "weights.safetensors"))
    again = PoseFlow.load(state, json.loads((tmp_path / "run" / "config.json").read_text())["config"])
    assert again.config == flow


def test_configurations_round_trip_and_name_problems():
    for config in (exp_config(), poseflow.Config()):
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UserError, match="no lips"):
        poseflow.Config(losses=Losses(lips=1))
    with pytest.raises(UserError, match=r"bank must be positive.*no shards"):
        expflow.Config(bank=0, shards=())


def test_varied_speech_is_sometimes_degraded():
    one = clip(1)
    assert one.mel is not None
    index = np.arange(10)
    degraded = replace(one, degraded=np.full_like(one.mel, 1.5), share=1.0)
    assert np.array_equal(degraded.windows(index), one.windows(index)), "only varied speech is"
    varied = degraded.windows(index, np.random.default_rng(0))
    plain = replace(degraded, share=0.0).windows(index, np.random.default_rng(0))
    assert varied[..., 4].std(0).max() < 0.5 < plain[..., 4].std(0).max()


def test_corrected_emotions_have_the_strength_of_the_training_people():
    """After calibration the drawn difference to neutral is that of the people, times the strength; whatever the flow
    learnt (here nothing), and whoever is only seen in an emotion."""
    random = np.random.default_rng(0)
    neutral, happy = EMOTIONS.index("neutral"), EMOTIONS.index("happy")
    smile, opening = np.linspace(-2, 2, 64), random.normal(size=64)
    smile = smile - smile @ opening / (opening @ opening) * opening
    clips = []
    for n in range(30):
        face = random.normal(size=64)
        for label in (neutral, happy) if n < 20 else (happy,):
            frames = face + (smile if label == happy else 0) + 0.1 * random.normal(size=(40, 64))
            mel = clip(n).mel
            clips.append(MotionClip(frames.astype(np.float32), mel, label, label == neutral, f"person {n}"))
    corpus = Corpus(clips)
    torch.manual_seed(0)
    flow = ExpFlow(ExpFlowConfig(steps=2, width=8, heads=2, history=10, audio=AUDIO)).eval()
    with torch.no_grad():
        flow.opening.copy_(torch.from_numpy(0.02 * opening))
    data = dataset(corpus)
    fit_emotion_bias(flow, corpus, data, strength=1.5)
    assert not flow.emotion_bias[neutral].any()
    assert not flow.emotion_bias[EMOTIONS.index("angry")].any(), "nobody is angry"
    assert abs(float(flow.emotion_bias[happy] @ flow.opening)) < 1e-4, "nothing parts the lips throughout"

    batch = whole_clips(corpus, [n for n, c in enumerate(clips) if c.speech][:24], data, 40)
    source = torch.stack([torch.from_numpy(corpus.neutral(2 * n)) for n in range(20)])
    means = []
    for label in (neutral, happy):
        drawn = rollout(
            flow,
            batch.windows,
            torch.full((20,), label),
            torch.Generator().manual_seed(0),
            source=source,
            temperature=TEMPERATURE,
        )
        means.append(drawn[:, 15:].mean((0, 1)))
    shown = (means[1] - means[0] + flow.emotion_bias[happy]).numpy()
    shown = shown - shown @ opening / (opening @ opening) * opening
    assert np.abs(shown - 1.5 * smile).max() < 0.25
    before = flow.emotion_bias.clone()
    fit_emotion_bias(flow, corpus, data, strength=1.5)
    assert torch.allclose(before, flow.emotion_bias, atol=1e-5), "calibrated twice is calibrated once"
