"""Head motion from clips, scaled and fixed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.motion.head_pose import PoseTrack

from .conftest import joined, make, windows


def test_head_motion_is_taken_as_it_is_around_its_mean():
    poses = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    course = PoseTrack(poses)
    got = torch.cat([course.at(i) for i in range(35)])
    torch.testing.assert_close(got, (poses - poses.mean(0))[:35])


def test_a_short_clip_repeats_without_a_jump():
    time = torch.arange(100)[:, None] / 25
    poses = torch.cat([torch.sin(time * (1 + k)) * 0.1 + 0.02 * time for k in range(6)], dim=1)
    course = PoseTrack(poses)
    assert course.period == 75
    long = torch.cat([course.at(i) for i in range(1000)])
    normal = poses.diff(dim=0).abs().amax(0)
    assert (long.diff(dim=0).abs() < 2 * normal).all()
    bend = poses.diff(n=2, dim=0).abs().amax(0)
    assert (long.diff(n=2, dim=0).abs() < bend + 0.02).all()  # nor does the speed
    torch.testing.assert_close(long[75 + 25 : 150], long[25:75])
    single = PoseTrack(torch.ones(1, 6))
    assert not any(single.at(i).any() for i in (0, 1, 500))


def test_wrong_head_motion_is_refused():
    for poses in (torch.zeros(0, 6), torch.zeros(3, 5), torch.full((3, 6), math.nan)):
        with pytest.raises(UserError, match="head motion must be"):
            PoseTrack(poses)


def test_clip_motion_starts_at_the_portrait_and_moves_around_it(tiny):
    poses = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).cumsum(0) * 0.01 + 3
    here = torch.linspace(-1, 1, 6)
    drawn = make(tiny, emotion="happy", pose0=here)
    lent = make(tiny, emotion="happy", pose0=here, poses=PoseTrack(poses))
    heard = windows(120)
    own, lent_motion = drawn(heard, last=True), lent(heard, last=True)
    pose = lent_motion.pose
    assert torch.equal(own.expression, lent_motion.expression)  # the face does not depend on the head
    torch.testing.assert_close(pose[0], here)
    torch.testing.assert_close(pose[90:], (poses - poses.mean(0) + here)[90:120], atol=0.02, rtol=0)


def test_still_and_pose_scale_and_pose_from(talker, speech, tmp_path):
    pose0 = talker.front_pose()
    moved, still, scaled = (
        joined(talker.motion(speech, blink_rate=40, **choice))
        for choice in ({}, {"fixed_pose": True}, {"pose_scale": 0.0})
    )
    assert torch.equal(still[1], pose0.expand(25, -1))
    assert torch.equal(scaled[1], still[1])
    assert torch.equal(still[0], moved[0])  # blinks and all
    poses = (np.random.default_rng(0).standard_normal((40, 6)) * 0.1).astype(np.float32)
    stored = Coefficients(np.zeros((40, 64), np.float32), poses, np.zeros(80, np.float32))
    stored.save(tmp_path / "pose.npz")
    first, second = (
        joined(talker.motion(speech, pose_from=source, pose_scale=scale))[1]
        for source, scale in ((tmp_path / "pose.npz", 1.0), (stored, 0.5))
    )
    torch.testing.assert_close(second - pose0, (first - pose0) / 2, atol=1e-5, rtol=0)
    assert (first - pose0).abs().max() > 0.05
