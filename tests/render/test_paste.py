"""Rendered faces in the whole picture: nothing changes outside, nothing jumps at the rim, poses stay in bounds."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker.constants import CROP
from flowvqtalker.face.portrait import load_portrait
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_face_model
from flowvqtalker.render.mesh_flow import MeshFlow, warp
from flowvqtalker.render.paste import POSE_LIMITS, Paster, limit_pose, paste_frames


@pytest.fixture(scope="module")
def model():
    return load_face_model(None)


@pytest.fixture(scope="module")
def portrait(model, astronaut):
    return load_portrait(model, astronaut)


def pasted_by(model, portrait):
    return Paster(
        model, portrait.crop, portrait.picture, portrait.image, portrait.identity, portrait.expression, portrait.pose
    )


def posed(portrait, pitch=0.0, yaw=0.0, roll=0.0, across=0.0):
    away = torch.tensor([*map(math.radians, (pitch, yaw, roll)), across, 0, 0])
    return portrait.pose + away


def rendered(model, portrait, beta, rho):
    """What a perfect generator would give: the crop, warped by the mesh."""
    points = [
        model.project(portrait.identity, b, r)[None] for b, r in ((portrait.expression, portrait.pose), (beta, rho))
    ]
    image = torch.from_numpy(portrait.image).permute(2, 0, 1)[None].float()
    return warp(image, MeshFlow(model)(*points))[0].permute(1, 2, 0).round().byte().numpy()


POSES = [{}, {"yaw": 14}, {"yaw": -14}, {"pitch": 10}, {"roll": 10}, {"across": 0.2}]


@pytest.mark.parametrize("side", [300, 512, 1200])
def test_only_the_field_changes(model, astronaut, side):
    picture = cv2.resize(astronaut, (side, side), interpolation=cv2.INTER_AREA)
    picture = np.ascontiguousarray(np.pad(picture, ((0, 0), (90, 40), (0, 0))))  # not square, face off the middle
    portrait = load_portrait(model, np.asarray(cv2.resize(picture, None, fx=1.3, fy=1.3)))
    paster = pasted_by(model, portrait)
    outside = np.ones(portrait.picture.shape[:2], bool)
    outside[paster.area] = ~paster.touched
    assert 0.4 < outside.mean() < 0.97
    changed = np.zeros_like(outside)
    for pose in POSES:
        result = paster(np.full((CROP, CROP, 3), 200, np.uint8), portrait.expression, posed(portrait, **pose))
        assert result.shape == portrait.picture.shape
        assert np.array_equal(result[outside], portrait.picture[outside])
        changed |= (result != portrait.picture).any(-1)
    assert changed.mean() > 0.02
    assert not np.shares_memory(result, portrait.picture)


def test_the_portrait_itself_comes_back(model, portrait):
    result = pasted_by(model, portrait)(portrait.image, portrait.expression, portrait.pose)
    assert np.abs(result.astype(float) - portrait.picture).mean() < 0.2
    assert np.quantile(np.abs(result.astype(float) - portrait.picture), 0.999) < 30  # interpolation in eyes and hair


@pytest.mark.parametrize("pose", POSES)
def test_layers_agree_at_the_rim(model, portrait, pose):
    """Where face and picture meet they show the same, however the head is turned: no seam and no double contour."""
    rho = posed(portrait, **pose)
    frame = rendered(model, portrait, portrait.expression, rho)
    under, over, mask, part = pasted_by(model, portrait).layers(frame, portrait.expression, rho)
    rim = (mask > 0.1) & (mask < 0.9)
    apart = np.abs(under[part].astype(float) - over)[rim].mean()
    still = np.abs(portrait.picture[paster_area(model, portrait)][part].astype(float) - over)[rim].mean()
    assert rim.sum() > 500
    assert apart < 5
    if pose:
        assert apart < 0.5 * still  # pasted on the picture as it was, the face would not fit


def paster_area(model, portrait):
    return pasted_by(model, portrait).area


def test_drift_of_colour_is_taken_out(model, portrait):
    paster = pasted_by(model, portrait)
    rho = posed(portrait, yaw=5)
    frame = rendered(model, portrait, portrait.expression, rho)
    clean = paster(frame, portrait.expression, rho).astype(float)
    # A tint, and light that falls off to one side.
    light = np.linspace(-8, 8, CROP)[None, :, None] + np.array([5.0, -4.0, 3.0])
    tinted = np.clip(frame + light, 0, 255).astype(np.uint8)
    assert np.abs(tinted.astype(float) - frame).mean() > 4
    assert np.abs(paster(tinted, portrait.expression, rho) - clean)[paster.area].mean() < 0.7
    # Nothing of one frame stays for the next.
    assert np.array_equal(paster(frame, portrait.expression, rho), clean)


def test_motion_does_not_fold_at_the_limits(model, portrait):
    """The bent picture at the farthest poses: no pixel outside of the face loses nine tenths of its area."""
    paster = pasted_by(model, portrait)
    for axis in range(6):
        for sign in (-1, 1):
            rho = portrait.pose.clone()
            rho[axis] += sign * POSE_LIMITS[axis] * (float(rho[5]) if axis == 5 else 1)
            _, bend, mask = paster.field(portrait.expression, rho)
            down, right = np.gradient(bend / 4, axis=(0, 1))  # cells of four pixels
            area = (1 + right[..., 0]) * (1 + down[..., 1]) - right[..., 1] * down[..., 0]
            assert area[mask < 0.5].min() > 0.1, (axis, sign)


def test_a_face_cut_by_the_border(model, astronaut):
    """The crop goes far beyond the picture; the picture keeps its size and what is far from the face."""
    picture = np.ascontiguousarray(astronaut[50:330, 120:330])
    portrait = load_portrait(model, picture)
    corners = portrait.crop.points_back(np.array([[0.0, 0.0], [CROP, CROP]]))
    assert corners[0].min() < -10
    paster = pasted_by(model, portrait)
    for pose in POSES:
        rho = posed(portrait, **pose)
        result = paster(rendered(model, portrait, portrait.expression, rho), portrait.expression, rho)
        assert result.shape == picture.shape
        # Motion fades towards the border: what is there hardly changes, and nothing black comes in.
        assert np.abs(result[0].astype(float) - picture[0]).mean() < 6
        assert np.abs(result.astype(float) - picture).mean() < 14


def test_a_bad_frame_is_refused(model, portrait):
    with pytest.raises(ValueError, match=r"\(512, 512, 3\)"):
        pasted_by(model, portrait)(np.zeros((256, 256, 3), np.uint8), portrait.expression, portrait.pose)


def test_poses_are_held_smoothly(portrait, caplog):
    yaw = torch.linspace(0, 1.2, 200)
    rho = portrait.pose.repeat(200, 1)
    rho[:, 1] += yaw
    beta = torch.zeros(200, 64)
    with caplog.at_level(logging.WARNING):
        held = Motion.join(
            limit_pose([Motion(beta[:100], rho[:100]), Motion(beta[100:], rho[100:])], portrait.pose)
        ).pose
    away = held[:, 1] - portrait.pose[1]
    free = yaw < 0.7 * POSE_LIMITS[1]
    torch.testing.assert_close(away[free], yaw[free], atol=1e-5, rtol=0)
    assert away.max() <= POSE_LIMITS[1] + 1e-6
    assert (away.diff() > -1e-6).all()
    assert away.diff().diff().abs().max() < 2e-3  # no kink
    torch.testing.assert_close(held[:, [0, 2, 3, 4, 5]], rho[:, [0, 2, 3, 4, 5]], atol=1e-5, rtol=0)
    assert len(caplog.records) == 1
    assert "yaw of the head leaves the portrait's by more than 20 degrees" in caplog.text


def test_small_movements_are_left_alone_without_a_word(portrait, caplog):
    rho = portrait.pose + 0.1 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    rho[:, 5] = portrait.pose[5]
    rho[0, 2] += 2 * math.pi  # a whole turn is none
    (held,) = limit_pose([Motion(torch.zeros(50, 64), rho)], portrait.pose)
    rho[0, 2] -= 2 * math.pi
    torch.testing.assert_close(held.pose, rho, atol=1e-5, rtol=0)
    assert not caplog.records


def test_frames_meet_their_own_motion(portrait):
    """A renderer that holds frames back, as the real one does."""
    seen = []

    def render(blocks):
        rows = sum(map(len, blocks))
        yield from (np.full((CROP, CROP, 3), i, np.uint8) for i in range(rows))

    def paster(frame, beta, rho):
        seen.append((int(frame[0, 0, 0]), float(beta[0]), float(rho[0])))
        return frame

    beta = torch.arange(7.0)[:, None].repeat(1, 64)
    rho = 10 + torch.arange(7.0)[:, None].repeat(1, 6)
    frames = list(paste_frames(paster, render, [Motion(beta[:3], rho[:3]), Motion(beta[3:], rho[3:])]))
    assert len(frames) == 7
    assert seen == [(i, float(i), 10.0 + i) for i in range(7)]


def test_huge_pictures_are_reduced_for_video(portrait, caplog):
    picture = np.asarray(cv2.resize(portrait.picture, (5120, 2560), interpolation=cv2.INTER_NEAREST))
    stretched = replace(
        portrait, picture=picture, crop=replace(portrait.crop, matrix=portrait.crop.matrix / [10.0, 5.0, 1.0])
    )
    small = stretched.reduced(2048)
    assert small.picture.shape == (1024, 2048, 3)
    points = np.array([[5000.0, 100.0], [300.0, 2000.0]])
    np.testing.assert_allclose(small.crop.points(points * 0.4), stretched.crop.points(points), atol=1e-6)
    assert "5120x2560 pixels is reduced to 2048x1024" in caplog.text
    assert portrait.reduced() is portrait
