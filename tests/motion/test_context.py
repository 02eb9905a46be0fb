"""Context: every part counts, data dropout, history."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.motion.context import ContextEncoder, history_of

from .flows import EXP, make


@pytest.mark.parametrize("part", ["audio", "history", "source", "emotion", "speech"])
def test_conditioning_changes_output(part):
    flow = make(EXP)
    generator = torch.Generator().manual_seed(5)
    given = {
        "audio": torch.randn(2, 8, generator=generator).double(),
        "history": torch.randn(2, 4, 8, generator=generator).double(),
        "emotion": torch.tensor([0, 1]),
        "speech": torch.tensor([True, True]),
        "source": torch.randn(2, 8, generator=generator).double(),
    }
    x = torch.randn(2, 8, dtype=torch.float64)
    first = flow.log_prob(x, flow.encode(**given))
    given[part] = ~given[part] if part == "speech" else (given[part] + 1) % 3 if part == "emotion" else given[part] + 1
    assert (flow.log_prob(x, flow.encode(**given)) - first).abs().min() > 1e-6


def test_silent_frames_ignore_the_sound():
    flow = make(EXP)
    history, emotion = torch.zeros(1, 4, 8).double(), torch.tensor([0])
    quiet = {"speech": torch.tensor([False]), "source": torch.zeros(1, 8).double()}
    a, b = (flow.encode(torch.randn(1, 8).double(), history, emotion, **quiet).tokens for _ in range(2))
    assert torch.equal(a, b)


def test_data_dropout_masks_only_history():
    encoder = ContextEncoder(8, 8, 2, 10, 8, classes=3, source=True, dropout=0.4).train()
    history = torch.ones(2000, 10, 8)
    dropped = encoder.drop(history, torch.Generator().manual_seed(0))
    frames = dropped.mean(-1)
    assert set(frames.unique().tolist()) == {0.0, 1.0}, "whole frames go, and what stays is not rescaled"
    count, trials = int((frames == 0).sum()), frames.numel()
    assert abs(count - 0.4 * trials) < 4 * (trials * 0.4 * 0.6) ** 0.5
    encoder.dropout = 0.999999
    given = {"speech": torch.ones(5, dtype=torch.bool), "source": torch.randn(5, 8)}
    audio, emotion = torch.randn(5, 8), torch.eye(3)[:1].expand(5, -1)
    hidden = encoder(audio, torch.randn(5, 10, 8), emotion, **given).tokens
    assert torch.allclose(hidden, encoder(audio, torch.zeros(5, 10, 8), emotion, **given).tokens, atol=1e-6)
    for name, other in (("audio", audio + 1), ("emotion", torch.eye(3)[1:2].expand(5, -1))):
        changed = encoder(
            other if name == "audio" else audio, torch.zeros(5, 10, 8), emotion if name == "audio" else other, **given
        )
        assert not torch.allclose(hidden, changed.tokens, atol=1e-3), f"{name} must never be dropped"
    encoder.eval()
    assert torch.equal(encoder.drop(history), history)


def test_history_holds_the_frames_before():
    sequence = torch.arange(8.0)[None, :, None]  # three frames of past, five frames
    history = history_of(sequence, 3)
    assert history.shape == (1, 5, 3, 1)
    assert history[0, :, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
