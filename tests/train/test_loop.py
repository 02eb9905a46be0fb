"""The training loop: exact resume, averaging, accumulation, limits, atomic files."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowvqtalker.errors import UserError
from flowvqtalker.train import checkpoint
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loader import RangeSampler
from flowvqtalker.train.loop import Stage, average_of, fit, learning_rate, step_seed


class Items(torch.utils.data.Dataset[Tensor]):
    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(i))


class Resized(Items):
    """Uses OpenCV as much as would start its threads."""

    def __getitem__(self, i: int) -> Tensor:
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500))
        return super().__getitem__(i)


@dataclass(frozen=True)
class ToyConfig:
    width: int = 3


class Toy(Stage):
    """Two groups with dropout and a buffer, like a generator and its discriminator."""

    name = "toy"
    monitor = "error"

    def __init__(self, config: ToyConfig | None = None, stop_at: int = 0, dropout: float = 0.5) -> None:
        torch.manual_seed(0)
        self.config = config or ToyConfig()
        width = self.config.width
        self.module = nn.ModuleDict({"g": nn.Linear(4, width), "d": nn.Linear(width, 1), "drop": nn.Dropout(dropout)})
        self.module.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.stop_at = stop_at
        self.started = 0

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {key: list(self.module[key].parameters()) for key in ("g", "d")}

    def loss(self, group: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        for key in ("g", "d"):
            assert all(p.requires_grad == (key == group) for p in self.module[key].parameters())
        hidden = self.module["drop"](self.module["g"](batch))
        value = self.module["d"](hidden).square().mean() + (hidden - 1).square().mean()
        self.losses.append(float(value.detach()))
        return value, {"hidden": hidden.mean()}

    def dataset(self, split: str) -> Items:
        return Items()

    def validate(self, fabric: Any) -> dict[str, float]:
        assert not self.module.training
        torch.rand(3)  # must not disturb the training
        batch = torch.stack([Items()[i] for i in range(1000, 1008)])
        return {"error": float((self.module["g"](batch) - 1).square().mean())}

    def on_start(self, batch: Tensor) -> None:
        self.started += 1
        self.module["g"].bias.data += batch.mean()

    def on_step_end(self, step: int) -> None:
        self.module.seen += 1
        if step + 1 == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


CONFIG = LoopConfig(
    steps=12,
    batch_size=4,
    lr=0.02,
    device="cpu",
    save_every=4,
    validate_every=4,
    log_every=3,
    ema=0.9,
    warmup=3,
    workers=0,
)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_resume_is_exact_to_the_bit(tmp_path: Path) -> None:
    whole = Toy()
    fit(whole, CONFIG, tmp_path / "whole")
    first = Toy(stop_at=5)
    result = fit(first, CONFIG, tmp_path / "parts")
    assert result["step"] == 5
    second = Toy()
    assert fit(second, CONFIG, tmp_path / "parts", resume=True)["step"] == 12
    assert first.losses + second.losses == whole.losses
    assert (first.started, second.started) == (1, 0)
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[key]), key
    assert torch.equal(second.module.seen, torch.tensor(12.0))
    a, b = (torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "parts"))
    assert a["progress"] == b["progress"]
    for key, value in a["parts"]["average"].items():
        assert torch.equal(value, b["parts"]["average"][key]), key
    steps = [int(row["step"]) for row in rows(tmp_path / "parts" / "log.csv")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12
    assert [r["error"] for r in rows(tmp_path / "parts" / "validation.csv")][-1] == [
        r["error"] for r in rows(tmp_path / "whole" / "validation.csv")
    ][-1]


def test_files_of_a_run(tmp_path: Path) -> None:
    stage = Toy()
    fit(stage, CONFIG, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        "best.json",
        "best.safetensors",
        "checkpoint.pt",
        "config.json",
        "log.csv",
        "validation.csv",
        "weights.safetensors",
    }
    weights = load_file(tmp_path / "weights.safetensors")
    average = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["parts"]["average"]
    assert weights["g.weight"].dtype == torch.float16
    assert torch.equal(weights["g.weight"], average["module.0"].half())
    assert not torch.equal(weights["g.weight"], stage.module["g"].weight.half())
    about = json.loads((tmp_path / "config.json").read_text())
    assert (about["step"], about["config"], about["stage"]) == (12, {"width": 3}, "toy")
    scores = rows(tmp_path / "validation.csv")
    assert [int(r["step"]) for r in scores] == [0, 4, 8, 12]
    assert float(scores[-1]["error"]) < float(scores[0]["error"])
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["scores"]["error"] == pytest.approx(min(float(r["error"]) for r in scores), rel=1e-4)


def test_a_second_run_needs_resume_and_the_same_configuration(tmp_path: Path) -> None:
    short = replace(CONFIG, steps=2)
    fit(Toy(), short, tmp_path)
    with pytest.raises(UserError, match="--resume"):
        fit(Toy(), short, tmp_path)
    with pytest.raises(UserError, match="differs in width"):
        fit(Toy(ToyConfig(width=5)), short, tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        fit(Toy(), short, tmp_path, resume=True)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    stages = []
    for name, batch, parts in (("large", 8, 1), ("parts", 2, 4)):
        stages.append(Toy(dropout=0.0))
        config = replace(CONFIG, steps=3, batch_size=batch, accumulate=parts, warmup=0, clip=0.5)
        stages[-1].on_start = lambda batch: None  # type: ignore[method-assign]
        fit(stages[-1], config, tmp_path / name)
    for key, value in stages[0].module.state_dict().items():
        torch.testing.assert_close(value, stages[1].module.state_dict()[key], atol=1e-5, rtol=1e-4)


def test_minutes_limit_saves_and_stops(tmp_path: Path) -> None:
    result = fit(Toy(), replace(CONFIG, minutes=1e-9), tmp_path)
    assert result["step"] == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == 1


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(Toy(), replace(CONFIG, steps=2), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def broken(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(UserError, match="cannot be written"):
        fit(Toy(), replace(CONFIG, steps=4), tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".json", ".pt", ".safetensors"}


def test_bad_batch_is_skipped_and_many_end_the_run(tmp_path: Path) -> None:
    class Bad(Toy):
        worst = 2

        def loss(self, group: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
            value, logs = super().loss(group, batch, step)
            return value * (float("nan") if 1 <= step < self.worst else 1.0), logs

    fit(Bad(), CONFIG, tmp_path / "one")
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path / "one" / "weights.safetensors").values())
    Bad.worst = 1000
    with pytest.raises(FloatingPointError, match=r"lower loop\.lr"):
        fit(Bad(), replace(CONFIG, steps=100), tmp_path / "many")


def test_a_group_without_loss_is_left_alone(tmp_path: Path) -> None:
    class Late(Toy):
        def loss(self, group: str, batch: Tensor, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
            if group == "d" and step < 3:
                return None, {}
            return super().loss(group, batch, step)

    stage = Late()
    before = stage.module["d"].weight.clone()
    fit(stage, replace(CONFIG, steps=3), tmp_path)
    assert torch.equal(stage.module["d"].weight, before)
    fit(stage, replace(CONFIG, steps=4), tmp_path, resume=True)
    assert not torch.equal(stage.module["d"].weight, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_the_data_is_raised(tmp_path: Path, workers: int) -> None:
    class Broken(Items):
        def __getitem__(self, i: int) -> Tensor:
            if i >= 8:
                raise KeyError("item 8")
            return super().__getitem__(i)

    stage = Toy()
    stage.dataset = lambda split: Broken()  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="item 8"):
        fit(stage, replace(CONFIG, workers=workers), tmp_path)


@pytest.mark.slow
def test_workers_read_the_same_items(tmp_path: Path) -> None:
    losses = []
    threads = cv2.getNumThreads()
    for workers in (0, 2):
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500))  # starts OpenCV's threads, which a fork loses
        stage = Toy()
        stage.dataset = lambda split: Resized()  # type: ignore[method-assign]
        fit(stage, replace(CONFIG, steps=2, workers=workers), tmp_path / str(workers))
        losses.append(stage.losses)
    assert losses[0] == losses[1]
    assert cv2.getNumThreads() == threads


def test_bfloat16_and_channels_last(tmp_path: Path) -> None:
    class Pictures(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"g": nn.Conv2d(3, 8, 3)})
            self.seen: list[tuple[bool, torch.dtype]] = []

        def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
            return {"g": list(self.module.parameters())}

        def loss(self, group: str, batch: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
            y = self.module["g"](batch)
            self.seen.append((batch.is_contiguous(memory_format=torch.channels_last), y.dtype))
            return y.float().square().mean(), {}

        def dataset(self, split: str) -> Any:
            return [torch.ones(3, 6, 6)] * 100

        def validate(self, fabric: Any) -> dict[str, float]:
            return {}

        on_start = Stage.on_start
        on_step_end = Stage.on_step_end

    stage = Pictures()
    fit(stage, replace(CONFIG, steps=2, precision="bf16-mixed", channels_last=True), tmp_path)
    assert stage.seen == [(True, torch.bfloat16)] * 2
    assert all(p.dtype == torch.float32 for p in stage.module.parameters())


def test_overfit_repeats_the_first_batch() -> None:
    assert list(RangeSampler(3, 5, 2, overfit=True)) == [[0, 1], [0, 1]]
    assert list(RangeSampler(3, 5, 2)) == [[6, 7], [8, 9]]


def test_ranks_share_the_items_without_overlap() -> None:
    one = [i for batch in RangeSampler(0, 4, 4) for i in batch]
    two = [i for a, b in zip(RangeSampler(0, 4, 2, 0, 2), RangeSampler(0, 4, 2, 1, 2), strict=True) for i in a + b]
    assert one == two


def test_average_follows_its_formula_and_can_be_off() -> None:
    live = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    average, off = average_of(live, decay=0.25), average_of(live, decay=0.0)
    expected = 0.0
    for n, value in enumerate([2.0, 3.0, 5.0, 8.0]):
        live[0].data.fill_(value)
        average.update_parameters(live)
        off.update_parameters(live)
        decay = min(0.25, (1 + n) / (10 + n)) if n else 0.0  # the first update copies
        expected = decay * expected + (1 - decay) * value
        assert next(average.parameters()).item() == pytest.approx(expected)
        assert next(off.parameters()).item() == value


def test_learning_rate() -> None:
    config = LoopConfig(steps=110, lr=1.0, warmup=10, decay="cosine")
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.525)
    assert learning_rate(110, config) == pytest.approx(0.05)
    assert learning_rate(10_000, replace(config, decay="constant")) == 1.0


def test_step_seeds_differ() -> None:
    seeds = {step_seed(s, t, r) for s in range(4) for t in range(-2, 50) for r in range(3)}
    assert len(seeds) == 4 * 52 * 3
    assert all(0 <= s < 2**63 for s in seeds)
