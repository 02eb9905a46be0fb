"""Published weights: where they are looked for, how they are checked, what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.weights import sha256
from flowvqtalker_eval.metrics import emotion_fan, inception, syncnet
from flowvqtalker_eval.metrics.published import PublishedWeights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(2, 3), nn.BatchNorm1d(3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint: under ``state_dict``, names with ``module.``, no counters, an old classifier."""
    torch.manual_seed(0)
    state = {f"module.{k}": v for k, v in Net().state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "net.pth"
    torch.save({"epoch": 3, "state_dict": {**state, "module.old.weight": torch.zeros(1)}}, path)
    return path


def test_weights_are_looked_for_in_order(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("SOME_NET", raising=False)
    digest = sha256(file)
    weights = PublishedWeights("Net weights", "SOME_NET", "http://x/net.pth", digest[:8], "net.pth")
    with pytest.raises(MissingDependency, match=r"^Net weights not found.*http://x/net.pth to .*SOME_NET"):
        weights.find()
    with pytest.raises(MissingDependency, match=r"not found at nowhere\.pth"):
        weights.find("nowhere.pth")
    place = tmp_path / "hub" / "hub" / "checkpoints" / "net.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(file.read_bytes())
    assert weights.find() == (place, digest)
    monkeypatch.setenv("SOME_NET", str(file))
    assert weights.find() == (file, digest) and weights.find(place) == (place, digest)
    with pytest.raises(MissingDependency, match=f"have sha256 {digest}, not 0123"):
        PublishedWeights("Net weights", "SOME_NET", "it", "0123").find()
    monkeypatch.delenv("SOME_NET")
    with pytest.raises(MissingDependency, match=r"Net weights not found; download it, or set SOME_NET"):
        PublishedWeights("Net weights", "SOME_NET", "it").find()


@pytest.mark.parametrize("module", [emotion_fan, inception, syncnet])
def test_every_published_network_says_how_to_get_it(
    module: object, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: PublishedWeights = module.WEIGHTS
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(weights.variable, raising=False)
    with pytest.raises(MissingDependency, match=rf"(robots\.ox|github\.com).* {weights.variable}"):
        weights.find()
    if weights.digest:
        with pytest.raises(MissingDependency, match=f"not {weights.digest}"):
            weights.find(file)


def test_a_file_that_fits_is_loaded(file: Path) -> None:
    model = Net()
    PublishedWeights("Net weights", "X", "it").load(model, file, unused=("old.",))
    torch.manual_seed(0)
    assert torch.equal(model.fc.weight, Net().fc.weight) and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_what_does_not_fit_is_named(file: Path, tmp_path: Path) -> None:
    weights = PublishedWeights("Net weights", "X", "it")
    state = torch.load(file, weights_only=True)["state_dict"]
    state.pop("module.fc.weight")
    state["module.bn.bias"] = torch.zeros(7)
    other = tmp_path / "other.pth"
    torch.save(state, other)
    with pytest.raises(
        UserError, match=r"fc\.weight is missing; old\.weight is unknown; bn\.bias has shape \(7,\), not \(3,\)"
    ):
        weights.load(Net(), other)
    torch.save([1], other)
    with pytest.raises(UserError, match="hold no state dict"):
        weights.load(Net(), other)
    other.write_text("404 not found")
    with pytest.raises(UserError, match="cannot be read"):
        weights.load(Net(), other)
    with pytest.raises(UserError, match="cannot be read"):
        weights.load(Net(), tmp_path / "none.pth")
