"""Temporal stability: closed forms, brute force, scenarios of motion, the renderer watched, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS, RIGID
from flowvqtalker.io.media import VideoWriter
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics.stability import (
    COLUMNS,
    SCENARIOS,
    Stability,
    consecutive_flows,
    drive,
    measure,
    motion_of,
    mouth_only,
    real_frames,
    still_blocks,
    takes,
)
from tests.test_render_generator import SMALL, face
from tests.test_train_vqig import shard

__all__ = ["face", "shard"]

SIDE = 32


def _flow(value: float = 0.0, side: int = 16) -> np.ndarray:
    return np.full((2, side, side), value, np.float32)


def _flat(*levels: int) -> list[np.ndarray]:
    return [np.full((SIDE, SIDE, 3), level, np.uint8) for level in levels]


def test_a_flickering_still_video_has_a_closed_form() -> None:
    found = measure(_flat(100, 103, 100, 103), [_flow()] * 3, row=4)
    values = found.result()
    assert values["flicker"] == pytest.approx(6) and values["change"] == pytest.approx(3) and values["largest"] == 3
    assert values["warping"] is None and values["still"] == 100 and values["codes_still"] is None
    assert np.allclose(found.deviation, 1.5) and found.slice.shape == (4, SIDE, 3)
    assert found.slice[:, 0, 0].tolist() == [100, 103, 100, 103]
    assert measure(_flat(9, 9, 9), [_flow()] * 2).result()["flicker"] == 0
    # A steady fade changes, but does not flicker.
    fade = measure(_flat(10, 12, 14, 16), [_flow()] * 3).result()
    assert fade["flicker"] == 0 and fade["change"] == 2


def test_numbers_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(5)]
    flows = [rng.normal(0, 0.3, (2, SIDE, SIDE)).astype(np.float32) for _ in range(4)]
    codes = [rng.integers(0, 3, (4, 4)) for _ in range(5)]
    valid = rng.random((SIDE, SIDE)) < 0.7
    values = measure(frames, flows, codes, still=0.4, valid=valid).result()
    change, flicker, largest, still = [], [], 0.0, []
    blocks: dict[bool, list[bool]] = {True: [], False: []}
    for t in range(1, 5):
        for i in range(4):
            for j in range(4):
                part = flows[t - 1][:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
                rests = bool((np.sqrt((part**2).sum(0)) < 0.4).all())
                blocks[rests].append(codes[t][i, j] != codes[t - 1][i, j])
        for y in range(SIDE):
            for x in range(SIDE):
                if not valid[y, x]:
                    continue
                rests = np.hypot(*flows[t - 1][:, y, x]) < 0.4
                still.append(rests)
                step = np.abs(frames[t][y, x].astype(float) - frames[t - 1][y, x])
                if rests:
                    change.append(step.mean())
                    largest = max(largest, step.max())
                if t >= 2 and rests and np.hypot(*flows[t - 2][:, y, x]) < 0.4:
                    a, b, c = (frames[t - k][y, x].astype(float) for k in (2, 1, 0))
                    flicker.append(np.abs(a - 2 * b + c).mean())
    assert values["change"] == pytest.approx(np.mean(change), rel=1e-5)
    assert values["flicker"] == pytest.approx(np.mean(flicker), rel=1e-5)
    assert values["largest"] == largest and values["still"] == pytest.approx(100 * np.mean(still))
    assert values["codes_moving"] == pytest.approx(100 * np.mean(blocks[False]))
    assert values["codes_still"] == (pytest.approx(100 * np.mean(blocks[True])) if blocks[True] else None)


def test_the_warping_error_of_a_moved_picture_is_zero() -> None:
    rng = np.random.default_rng(1)
    wide = rng.integers(0, 256, (SIDE, SIDE + 8, 3), dtype=np.uint8)
    frames = [np.ascontiguousarray(wide[:, t : t + SIDE]) for t in (0, 2, 4)]  # the scene goes left by 2 a frame
    flow = np.stack([np.full((SIDE, SIDE), 2.0, np.float32), np.zeros((SIDE, SIDE), np.float32)])
    inside = np.zeros((SIDE, SIDE), bool)
    inside[:, : SIDE - 2] = True
    values = measure(frames, [flow, flow], valid=inside).result()
    assert values["warping"] == pytest.approx(0, abs=1e-4) and values["change"] is None and values["still"] == 0
    wrong = measure(frames, [-flow, -flow], valid=inside).result()
    assert wrong["warping"] is not None and wrong["warping"] > 50


def test_codes_are_told_apart_by_the_motion_of_their_block() -> None:
    flow = _flow(side=16)
    flow[0, 3, 9] = 1.0  # one cell of block (0, 2) of 4 x 4
    assert np.argwhere(~still_blocks(flow, 4)).tolist() == [[0, 2]]
    assert still_blocks(flow, 4, still=1.1).all() and not still_blocks(_flow(0.2), 4).any()
    zero, one = np.zeros((4, 4), int), np.zeros((4, 4), int)
    one[0, 2] = one[3, 3] = 1
    values = measure(_flat(1, 1, 1), [flow, flow], [zero, one, zero]).result()
    assert values["codes_moving"] == 100 and values["codes_still"] == pytest.approx(100 / 15)
    with pytest.raises(UserError, match="5x5 blocks"):
        still_blocks(flow, 5)
    with pytest.raises(UserError, match=r"got \(3, 16, 16\)"):
        still_blocks(np.zeros((3, 16, 16)))


def test_bad_videos_are_named() -> None:
    frame = _flat(0)[0]
    with pytest.raises(UserError, match="three frames or more, got 2"):
        measure(_flat(0, 0), [_flow()]).result()
    with pytest.raises(UserError, match="positive"):
        Stability(still=0)
    with pytest.raises(UserError, match="the first frame, and no other"):
        Stability().add(frame, _flow())
    with pytest.raises(UserError, match="there are more frames"):
        measure(_flat(0, 0, 0), [_flow()])
    with pytest.raises(UserError, match="one size"):
        measure([frame, frame[:16]], [_flow()])
    with pytest.raises(UserError, match="uint8"):
        Stability().add(frame.astype(float), None)
    with pytest.raises(UserError, match="mask of valid pixels"):
        Stability(valid=np.ones((3, 3), bool)).add(frame, None)
    found = Stability()
    found.add(frame, None)
    with pytest.raises(UserError, match="codes of all frames or of none"):
        found.add(frame, _flow(), np.zeros((4, 4), int))
    with pytest.raises(UserError, match="no row"):
        _ = measure(_flat(0), []).slice
    with pytest.raises(UserError, match="no frame"):
        _ = Stability().deviation


def test_flows_point_back_to_the_frame_before(face: FaceModel) -> None:
    zero = torch.zeros(3, 80), torch.zeros(3, 64)
    pose = torch.tensor([[0, 0, 0, 0, 0, 16.0], [0, 0, 0, 0.02, 0, 16], [0, 0, 0, 0.02, 0, 16]])
    vertices = face.project(*zero, pose)
    moved, rested = consecutive_flows(MeshFlow(face, 64), vertices)
    shift = float((vertices[0, :, 0] - vertices[1, :, 0]).mean())
    assert abs(shift) > 1 and moved.shape == (2, 64, 64)
    assert float(moved[0, 32, 32]) == pytest.approx(shift, abs=0.1) and abs(float(moved[1, 32, 32])) < 0.02
    assert rested.abs().max() < 1e-4


def test_the_mouth_moves_alone(face: FaceModel) -> None:
    """Half of this basis moves the lips, half what is held: the first half passes, the second does not."""
    basis = torch.zeros(64, 478, 3)
    generator = torch.Generator().manual_seed(0)
    basis[:32, list(LIPS)] = torch.randn(32, len(LIPS), 3, generator=generator)
    basis[32:, list(RIGID)] = torch.randn(32, len(RIGID), 3, generator=generator)
    model = FaceModel(
        face.mean, face.identity, basis, face.arkit, face.triangles, face.mouth_triangles, face.eye_triangles
    )
    rest = torch.randn(64, generator=generator)
    change = torch.randn(5, 64, generator=generator)
    found = mouth_only(model, rest + change, rest) - rest
    assert torch.allclose(found[:, :32], change[:, :32], atol=0.01) and found[:, 32:].abs().max() < 1e-4
    with pytest.raises(UserError, match=r"\(T, 64\)"):
        mouth_only(model, change[0], rest)


def test_a_take_is_driven_by_the_renderer_itself(shard: Path, face: FaceModel) -> None:
    torch.manual_seed(0)
    model = VQIG(SMALL).eval()
    (take,) = takes(Shard(shard), 5)
    assert take.name == "clip1" and len(take.expression) == 3 and take.stored is not None and take.stored[1] == 0
    assert np.array_equal(take.stored[0], take.portrait)
    motion = motion_of("tracked", face, take)
    frames = list(drive(model, face, take, motion, batch_size=2, dtype=torch.float32))
    start = torch.from_numpy(take.start)
    renderer = Renderer(
        model, face, take.portrait, torch.from_numpy(take.alpha), start[:64], start[64:], batch_size=2,
        dtype=torch.float32,
    )  # fmt: skip
    expected = list(renderer.render([(motion[:, :64], motion[:, 64:])]))
    assert len(frames) == len(expected) == 3 and not model._forward_hooks
    assert all(np.array_equal(a.image, b) for a, b in zip(frames, expected, strict=True))
    assert frames[0].codes is not None and frames[0].codes.shape == (16, 16)
    # The first frame is the portrait's own: I_w is the portrait.
    assert np.abs(frames[0].warped.astype(int) - take.portrait).max() <= 1
    plain = VQIG(SMALL.ablated("M")).eval()
    assert next(drive(plain, face, take, motion, dtype=torch.float32)).codes is None


def test_frozen_motion_gives_a_constant_video(shard: Path, face: FaceModel) -> None:
    torch.manual_seed(0)
    model = VQIG(SMALL).eval()
    (take,) = takes(Shard(shard))
    motion = motion_of("frozen", face, take)
    assert motion.shape == (3, 70) and (motion == motion[0]).all() and not torch.equal(motion[0, :64], torch.zeros(64))
    frames = [f.image for f in drive(model, face, take, motion, dtype=torch.float32)]
    assert all(np.array_equal(frame, frames[0]) for frame in frames)
    assert not np.array_equal(frames[0], take.portrait)
    mouth = motion_of("mouth", face, take)
    assert (mouth[:, 64:] == torch.from_numpy(take.start[64:])).all() and set(SCENARIOS) == {
        "tracked", "mouth", "frozen",
    }  # fmt: skip
    with pytest.raises(UserError, match="unknown scenario 'x'"):
        motion_of("x", face, take)
    with pytest.raises(UserError, match="three frames or more, got 2"):
        takes(Shard(shard), frames=2)


def test_real_frames_must_be_those_of_the_shard(shard: Path, tmp_path: Path) -> None:
    data = Shard(shard)
    (take,) = takes(data)
    with pytest.raises(UserError, match="does not exist"):
        real_frames(data, take, tmp_path)

    def write(frames: list[np.ndarray]) -> None:
        with VideoWriter(tmp_path / "clip.mp4", crf=5) as writer:
            for frame in frames:
                writer.write(frame)

    take = replace(take, name="clip.mp4")
    pictures = [data.image(n) for n in data.images_of(np.array([take.number]))]
    write(pictures)
    found = real_frames(data, take, tmp_path)
    assert len(found) == 3 and np.abs(found[1].astype(int) - pictures[1]).mean() < 6
    write(pictures[:2])
    with pytest.raises(UserError, match="has 2 frames"):
        real_frames(data, take, tmp_path)
    write([np.full((512, 512, 3), 255, np.uint8)] * 3)
    with pytest.raises(UserError, match="does not show what the shard stored"):
        real_frames(data, take, tmp_path)


def test_the_figure_has_a_column_for_each_video() -> None:
    pytest.importorskip("matplotlib")
    from flowvqtalker_eval.figures.stability import Video, make

    found = measure(_flat(10, 20, 30), [_flow()] * 2, row=3)
    video = Video(_flat(1)[0], found.deviation, found.slice, 3)
    figure = make({"a": video, "b": video})
    assert len(figure.axes) == 2 * 3 + 1 and [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"]
    with pytest.raises(UserError, match="no video"):
        make({})
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
