"""Generation from speech: determinism, blocks, intensity, references, bad input."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from flowvqtalker import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, PoseFlow, PoseFlowConfig
from flowvqtalker.motion.likelihood import rollout
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.reference import reference_latent
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.speech.encoder import AudioConfig

AUDIO = AudioConfig(mels=6, columns=8, width=8, layers=2, lookahead=1)
EXP = ExpFlowConfig(dim=8, steps=3, width=8, heads=2, history=4, soft_clamp=50.0, audio=AUDIO)
# Another look-ahead than the expression's: the slower of the two decides.
POSE = PoseFlowConfig(steps=2, width=8, heads=2, history=3, audio=replace(AUDIO, lookahead=3))


@pytest.fixture(scope="module")
def flows():
    torch.manual_seed(0)
    exp, pose = ExpFlow(EXP), PoseFlow(POSE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*exp.parameters(), *pose.parameters()]:
            p += 0.1 * torch.randn(p.shape, generator=generator)
        for step in exp.each_step():
            step.norm.mean.add_(0.3 * torch.randn(9, 8, generator=generator))
    return exp.eval(), pose.eval()


@pytest.fixture(scope="module")
def bank(flows):
    emotion = torch.arange(900) % 9
    offsets = torch.randn(900, 8, generator=torch.Generator().manual_seed(2))
    return LatentBank(flows[0].latent.mean[emotion] + offsets, emotion, minimum=20)


@pytest.fixture(scope="module")
def windows():
    return torch.randn(21, 6, 8, generator=torch.Generator().manual_seed(3))


def make(flows, bank=None, **settings):
    given = {
        "beta0": torch.linspace(-1, 1, 8),
        "pose0": torch.arange(6.0),
        "emotion": "happy",
        "warm_up": 0,
        **settings,
    }
    return MotionGenerator(*flows, bank, **given)


def run(flows, windows, bank=None, **settings):
    return both(make(flows, bank, **settings)(windows, last=True))


def both(motion):
    return motion.expression, motion.pose


def test_one_frame_for_each_window(flows, windows):
    beta, pose = run(flows, windows)
    assert beta.shape == (21, 8)
    assert pose.shape == (21, 6)
    assert torch.isfinite(beta).all()
    assert torch.isfinite(pose).all()


def test_autoregressive_sampling_is_deterministic_given_seed(flows, windows, bank):
    first, again, other = (run(flows, windows, bank, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert (first[0] - other[0]).abs().max() > 0.01
    assert (first[1] - other[1]).abs().max() > 1e-4


def test_sampling_leaves_the_global_generator_alone(flows, windows):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(flows, windows)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", range(4))
def test_chunked_equals_unchunked(flows, windows, bank, seed):
    whole = run(flows, windows, bank)
    sizes = torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(seed)).tolist()
    generator, parts, at = make(flows, bank), [], 0
    for size in sizes:
        parts.append(generator(windows[at : at + size]))
        at += size
    assert at >= 21
    parts.append(generator(windows[21:], last=True))
    beta, pose = both(Motion.join(parts))
    assert torch.equal(beta, whole[0]) and torch.equal(pose, whole[1])


def test_frames_come_late_by_the_lookahead(flows, windows):
    generator = make(flows)
    assert generator.lookahead == 3
    assert [len(generator(windows[i : i + 1])) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert len(generator(windows[:0], last=True)) == 3


def test_later_speech_changes_nothing_before_the_lookahead(flows, windows):
    changed = windows.clone()
    changed[15:] += 1
    first, second = run(flows, windows)[0], run(flows, changed)[0]
    assert torch.equal(first[:14], second[:14])  # the expression looks one window ahead
    assert not torch.equal(first[14], second[14])


def test_streaming_encoder_equals_the_training_path(flows, windows):
    """Teacher forcing pads a clip by repeating its outermost windows; the stream must do the same."""
    exp = flows[0]
    beta = run(flows, windows, temperature=0.0, manifold=0.0, articulation=1.0)[0]
    padded = torch.cat([windows[:1].expand(3, -1, -1), windows, windows[-1:]])
    source = exp.neutral_face(torch.linspace(-1, 1, 8)[None])
    label = torch.tensor([EMOTIONS.index("happy")])
    expected = rollout(exp, padded[None], label, torch.Generator(), source=source, temperature=0.0)
    assert torch.allclose(beta, expected[0], atol=1e-4)


def test_warm_up_fills_the_histories(flows, windows):
    """The first frame then has frames before it; blocks do not matter, and the pose still starts at the source."""
    cold, warm = run(flows, windows), run(flows, windows, warm_up=6)
    assert not torch.equal(cold[0][0], warm[0][0])
    generator, parts = make(flows, warm_up=6), []
    for k in range(0, len(windows), 3):
        parts.append(generator(windows[k : k + 3], last=k + 3 >= len(windows)).expression)
    assert torch.equal(torch.cat(parts), warm[0])
    torch.testing.assert_close(warm[1][0], torch.arange(6.0))
    assert make(flows, warm_up=6)(windows[:0], last=True).expression.shape == (0, 8)


def test_one_window_and_no_window(flows, windows):
    assert run(flows, windows[:1])[0].shape == (1, 8)
    beta, pose = run(flows, windows[:0])
    assert beta.shape == (0, 8)
    assert pose.shape == (0, 6)


def test_intensity_zero_equals_neutral(flows, windows, bank):
    zero, neutral = run(flows, windows, intensity=0.0), run(flows, windows, emotion="neutral", intensity=1.7)
    assert torch.equal(zero[0], neutral[0])
    assert not torch.equal(zero[0], run(flows, windows)[0])


def test_intensity_moves_away_from_neutral(flows, windows):
    neutral = run(flows, windows, emotion="neutral", temperature=0.0)[0].mean(0)
    gaps = [
        float((run(flows, windows, intensity=s, temperature=0.0)[0].mean(0) - neutral).norm())
        for s in (0.0, 0.5, 1.0, 2.0)
    ]
    assert gaps == sorted(gaps)
    assert gaps[0] == 0


def test_every_emotion_differs(flows, windows):
    means = torch.stack([run(flows, windows, emotion=e, temperature=0.0)[0].mean(0) for e in EMOTIONS])
    assert float(torch.pdist(means).min()) > 0.05


def test_temperature_zero_is_the_same_for_every_seed(flows, windows, bank):
    a, b = (run(flows, windows, seed=s, temperature=0.0, pose_temperature=0.0) for s in (0, 1))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_articulation_scales_the_lip_prior_only(flows, windows):
    still, once, twice = (run(flows, windows, articulation=a)[0] for a in (0.0, 1.0, 2.0))
    assert (once - still).abs().max() > 1e-3
    assert torch.allclose(twice - still, 2 * (once - still), atol=1e-5)


def test_lip_damping_touches_the_lips_only(flows, windows):
    exp = flows[0]
    loud = run(flows, windows, articulation=0.0)[0]
    with torch.no_grad():
        exp.opening[2] = 0.5
        quiet = run(flows, windows, articulation=0.0)[0]
        exp.opening.zero_()
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(quiet[:, others], loud[:, others])
    assert quiet[:, 2].diff().abs().mean() < 0.7 * loud[:, 2].diff().abs().mean()
    assert torch.equal(quiet[0], loud[0])


def test_manifold_projection_moves_samples_towards_the_bank(flows, windows, bank):
    free, pulled = run(flows, windows, bank, manifold=0.0), run(flows, windows, bank, manifold=1.0)
    assert not torch.equal(free[0], pulled[0])
    assert torch.equal(free[0], run(flows, windows)[0])
    assert torch.equal(free[1], pulled[1])  # the pose is not projected
    point = replace(bank, latents=flows[0].latent.mean[bank.emotion])  # a bank without any spread
    assert torch.allclose(
        run(flows, windows, point, manifold=1.0)[0], run(flows, windows, temperature=0.0)[0], atol=1e-3
    )


def test_head_starts_at_the_portrait_and_moves_around_it(flows, windows):
    here, there = (run(flows, windows, pose0=torch.full((6,), x))[1] for x in (0.0, 2.0))
    assert torch.equal(here[0], torch.zeros(6))
    assert torch.allclose(there - here, torch.full((21, 6), 2.0), atol=1e-5)
    assert here.std(0).min() > 0


def test_long_speech_stays_finite(flows):
    exp, pose = (copy.deepcopy(flow) for flow in flows)
    with torch.no_grad():
        pose.encoder.ar_prior.gain.fill_(1.5)
        exp.encoder.ar_prior.gain.fill_(1.5)
    beta, rho = run((exp, pose), torch.randn(150, 6, 8), pose0=torch.zeros(6), articulation=0.0)
    assert float(beta.abs().max()) <= EXP.soft_clamp + 1e-4
    assert float(rho.abs().max()) <= 2 * POSE.soft_clamp


def test_source_expression_matters(flows, windows):
    a, b = (run(flows, windows, beta0=torch.full((8,), x))[0] for x in (0.0, 1.0))
    assert not torch.allclose(a, b)


def test_reference_takes_its_own_class(flows, windows):
    """Frames drawn from one class at low temperature are most likely under that class."""
    exp = flows[0]
    right = 0
    for label, name in enumerate(EMOTIONS):
        drawn = run(flows, windows, emotion=name, temperature=0.3)[0]
        found, centre = reference_latent(exp, drawn)
        right += found == label
        assert centre.shape == (8,)
    assert right >= 5
    assert reference_latent(exp, drawn, emotion=2)[0] == 2


def test_reference_drives_the_motion(flows, windows):
    references = [torch.full((5, 8), x) for x in (-1.0, 1.0)]
    a, b = (run(flows, windows, emotion=None, reference=r)[0] for r in references)
    assert not torch.allclose(a, b)
    neutral = run(flows, windows, emotion="neutral")[0]
    assert torch.equal(run(flows, windows, emotion=None, reference=references[0], intensity=0.0)[0], neutral)
    assert run(flows, windows, emotion=None, reference=references[0][:1])[0].shape == (21, 8)  # one image
    assert make(flows, emotion="sad", reference=references[0]).emotion == "sad"


def test_bad_input_is_named(flows, windows):
    with pytest.raises(UserError, match=r"unknown emotion 'joy'; choose one of angry, contempt.*natural"):
        make(flows, emotion="joy")
    with pytest.raises(UserError, match="give one"):
        make(flows, emotion=None)
    with pytest.raises(UserError, match=r"intensity must be between 0 and 2, got 2\.5"):
        make(flows, intensity=2.5)
    with pytest.raises(UserError, match="reference must hold"):
        make(flows, reference=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="windows must be"):
        make(flows)(windows[:, :3])
    generator = make(flows)
    generator(windows, last=True)
    with pytest.raises(RuntimeError, match="last windows"):
        generator(windows)
