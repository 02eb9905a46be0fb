"""Figure 6: maps of latents, their numbers, and its command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowvqtalker.data.shards import SAMPLES, Clip, Shard, ShardWriter
from flowvqtalker.errors import UserError
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig
from flowvqtalker.speech.encoder import AudioConfig
from flowvqtalker_eval.figures import latent, style

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture
def groups() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents (90, 64) around three distant means, labels, and the nine means."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((9, 64)) * 3
    labels = np.repeat([0, 4, 6], 30)
    return means[labels] + 0.3 * rng.standard_normal((90, 64)), labels, means


def test_principal_components_by_hand(groups) -> None:
    latents = groups[0]
    points = latent.embed(latents, "pca")
    centred = latents - latents.mean(0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(points), np.abs(left[:, :2] * singular[:2]))


def test_neighbours_stay_neighbours_and_the_map_repeats(groups) -> None:
    latents, labels, _ = groups
    points = latent.embed(latents, "tsne")
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(90)
    assert (labels[distance.argmin(1)] == labels).all()
    assert np.array_equal(points, latent.embed(latents, "tsne"))


def test_numbers_of_known_groups(groups) -> None:
    latents, labels, means = groups
    assert latent.nearest_mean(latents, labels, means) == 1
    assert latent.nearest_mean(latents, np.full(90, 8), means) == 0
    one = np.concatenate([np.full(80, 0), np.full(10, 1)])  # every label counts alike
    assert latent.nearest_mean(np.repeat(means[:1], 90, axis=0), one, means) == 0.5
    assert latent.silhouette(latents, labels) > 0.8
    # By hand: two groups on a line, a = 1 within, b = 9 or 10 or 11 between.
    line, sides = np.array([[0.0], [1.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])
    assert latent.silhouette(line, sides) == pytest.approx(((1 - 1 / 10.5) + (1 - 1 / 9.5)) / 2)
    assert np.isnan(latent.silhouette(line, np.zeros(4, int)))


@pytest.mark.parametrize("bad", [np.zeros((3, 64)), np.zeros(64), np.full((9, 64), np.nan)])
def test_too_few_or_broken_latents_are_refused(bad) -> None:
    with pytest.raises(UserError, match="at least 4 finite latents"):
        latent.embed(bad)


def test_the_figure_is_written_as_png_and_pdf(groups, tmp_path) -> None:
    latents, labels, _ = groups
    panels = [latent.Panel("SMM", latents, labels, {"silhouette": 0.5}), latent.Panel("GMM", latents, labels)]
    png, pdf = style.save(latent.make(panels), tmp_path / "latent.png")
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    assert (pixels.max(-1) - pixels.min(-1) > 60).mean() > 0.001  # coloured points
    assert pdf.read_bytes().startswith(b"%PDF")
    for nothing in (([], ("pca",)), (panels, ())):
        with pytest.raises(UserError, match="nothing to draw"):
            latent.make(*nothing)


def test_the_colours_of_the_emotions_differ() -> None:
    assert len(set(style.EMOTION_COLOURS.values())) == len(set(style.EMOTION_MARKERS.values())) == 9


# ------------------------------------------------------------------------------------------------------------ command


def flow(kind: str = "student") -> ExpFlow:
    torch.manual_seed(0)
    audio = AudioConfig(width=16, layers=2, lookahead=1)
    made = ExpFlow(ExpFlowConfig(steps=2, width=16, heads=2, audio=audio, latent=kind))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in made.each_step():  # so that the class matters
            step.norm.initialised.fill_(True)
            step.norm.mean.add_(0.3 * torch.randn(9, 64, generator=generator))
    return made.eval()


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "shard"
    rng = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(12):
            length = 14 + number
            writer.add(
                Clip(
                    name=f"clip{number}",
                    source="test",
                    identity=f"person{number % 4}",
                    split="train" if number % 4 else "val",
                    emotion=(0, 4, 5)[number // 4],
                    speech=number % 2 == 0,
                    is_image=False,
                    identity_shape=np.zeros(80, np.float32),
                    crop=np.eye(2, 3),
                    valid=np.zeros((4, 2), np.float32),
                    native=512.0,
                    lag=0.0,
                    correlation=1.0,
                    shifted=0.0,
                    expression=rng.standard_normal((length, 64)).astype(np.float32),
                    pose=np.zeros((length, 6), np.float32),
                    blendshapes=np.zeros((length, 52), np.float16),
                    residual=np.zeros(length, np.float16),
                    landmarks=np.zeros((length, 478, 3), np.float32),
                    audio=rng.integers(-3000, 3000, length * SAMPLES).astype(np.int16) if number % 2 == 0 else None,
                    images=[],
                )
            )
    return folder


def test_latents_are_those_of_each_clip_alone(shard) -> None:
    """Brute force: every frame by itself, with its true past, as the flow's own batch would give it."""
    clips = latent.pick_clips(Shard(shard), "train", 10)
    assert [clip.emotion for clip in clips] == [0, 0, 0, 4, 4, 4, 5, 5, 5]
    made = flow()
    z, labels, scores = latent.encode(made, clips, frames=1000)
    assert len(z) == sum(len(clip.frames) for clip in clips)
    clip = clips[4]
    windows = torch.from_numpy(clip.windows(np.clip(np.arange(-3, len(clip.frames) + 1), 0, len(clip.frames) - 1)))
    audio = made.audio(windows[None])[0]
    frames = torch.from_numpy(clip.frames)
    speech = torch.full((len(frames),), clip.speech)
    left = frames - made.predict_lips(audio, speech)
    found = []
    for t in range(len(frames)):
        history = torch.cat([torch.zeros(made.config.history, 64), left[:t]])[-made.config.history :]
        context = made.encode(audio[t : t + 1], history[None], torch.tensor([4]), speech=speech[:1], source=frames[:1])
        found.append(made.forward_and_logdet(left[t : t + 1], context)[0])
    start = sum(len(other.frames) for other in clips[:4])
    # Kept rows are in the order of the clips, whose emotions are in order.
    assert np.allclose(z[start : start + len(frames)], torch.cat(found).detach().numpy(), atol=1e-4)
    assert (labels[start : start + len(frames)] == 4).all()
    assert set(scores) == {"nearest mean", "by likelihood", "silhouette"}


def test_clips_are_spread_over_people(shard) -> None:
    clips = latent.pick_clips(Shard(shard), "train", 2)
    assert len({clip.identity for clip in clips if clip.emotion == 0}) == 2
    with pytest.raises(UserError, match="no clip with a known emotion"):
        latent.pick_clips(Shard(shard), "test", 2)


def test_the_command_sets_flows_side_by_side(shard, tmp_path) -> None:
    from safetensors.torch import save_file

    from flowvqtalker.train.config import to_dict
    from flowvqtalker.train.release import add_weights

    given = []
    for name, kind in (("SMM", "student"), ("GMM", "gaussian-mixture")):
        folder, made = tmp_path / name, flow(kind)
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in made.state_dict().items()}, folder / "raw")
        add_weights(folder / "raw", "expflow", path=folder, config=to_dict(made.config), data="nothing", steps=0)
        given.append(f"{name}={folder}")
    command = latent.Latent(shard=shard, weights=tuple(given), frames=20, output=tmp_path / "latent.png")
    panels = command.panels()
    assert [one.name for one in panels] == ["SMM", "GMM"]
    assert all(len(one.latents) == 60 for one in panels)
    command.run()
    assert (tmp_path / "latent.png").stat().st_size > 10_000
    assert (tmp_path / "latent.pdf").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "must be positive"),
        ({"output": Path("latent.jpg")}, r"\.png, \.pdf"),
        ({"weights": ("folder",)}, "NAME=PATH"),
        ({"shard": Path("nowhere")}, "no shard"),
    ],
)
def test_bad_input_of_the_command(options, message) -> None:
    with pytest.raises(UserError, match=message):
        latent.Latent(**{"shard": Path("nowhere"), **options}).panels()
