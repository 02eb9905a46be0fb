"""Configurations: all problems at once, YAML round trip, command line."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import yaml

import flowvqtalker.train as training
from flowvqtalker.errors import UserError
from flowvqtalker.train.config import ConfigError, LoopConfig, check, from_dict, load_yaml, save_yaml, to_dict
from flowvqtalker.train.monitor import CsvLog
from flowvqtalker_eval import evaluators


@dataclass(frozen=True)
class Model:
    kind: Literal["paper", "lite"] = "lite"
    channels: tuple[int, ...] = (4, 8)
    window: tuple[int, int] = (1, 2)
    path: Path | None = None

    def __post_init__(self) -> None:
        check((len(self.channels) > 0, "channels must not be empty"))


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    loop: LoopConfig = field(default_factory=LoopConfig)
    name: str = "x"
    scale: float = 1.0
    tags: dict[str, int] = field(default_factory=dict)


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Config(
        Model("paper", (1, 2, 3), (5, 6), Path("a/b")), LoopConfig(lr=3e-5, betas=(0.5, 0.9)), "y", 2.5, {"a": 1}
    )
    save_yaml(config, tmp_path / "c.yaml")
    assert load_yaml(Config, tmp_path / "c.yaml") == config
    assert from_dict(Config, to_dict(config)) == config
    assert from_dict(Config, {}) == Config()
    (tmp_path / "empty.yaml").write_text("")
    assert load_yaml(Config, tmp_path / "empty.yaml") == Config()


def test_numbers_that_yaml_reads_as_text() -> None:
    assert from_dict(Config, yaml.safe_load("{loop: {lr: 1e-4}, scale: 2}")) == Config(
        loop=LoopConfig(lr=1e-4), scale=2.0
    )


def test_every_problem_is_listed() -> None:
    bad = {
        "loop": {"steps": 0, "lr": -1, "precision": "fp8", "batch": 3, "seed": "x"},
        "model": {"kind": "huge", "channels": "abc", "window": [1]},
        "nane": 1,
        "tags": {"a": "b"},
    }
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, bad)
    named = sorted(problem.split(":")[0] for problem in caught.value.problems)
    own = ["loop.precision", "loop.batch", "loop.seed", "nane", "tags.a"]
    assert named == sorted([*own, "model.kind", "model.channels", "model.window.1"])
    assert "\n" not in str(caught.value)
    assert "'paper' or 'lite'" in str(caught.value)
    assert "nane: unknown; allowed: loop, model, name, scale, tags" in caught.value.problems
    assert any(
        problem.startswith("loop.batch: unknown; allowed: accumulate, batch_size,") for problem in caught.value.problems
    )


def test_every_broken_rule_is_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(Config, {"loop": {"steps": 0, "lr": -1}, "model": {"channels": []}})
    assert sorted(caught.value.problems) == [
        "loop.lr must be positive, got -1.0",
        "loop.steps must be positive, got 0",
        "model.channels must not be empty",
    ]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(Config, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("{a: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_yaml(Config, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="configuration: Input should be a dictionary"):
        load_yaml(Config, tmp_path / "list.yaml")


def test_train_runs_a_stage_and_keeps_its_configuration(tmp_path: Path) -> None:
    calls: list[Any] = []
    module: Any = ModuleType("toy_stage")
    module.run = lambda config, out, resume: calls.append((config, out, resume))
    training.train(module, Config(name="n"), tmp_path)
    training.train(module, Config(name="other"), tmp_path, resume=True)
    assert calls == [(Config(name="n"), tmp_path, False), (Config(name="other"), tmp_path, True)]
    assert load_yaml(Config, tmp_path / "config.yaml").name == "n"
    with pytest.raises(UserError, match="choose one of face-model, codebook, vqig, speech"):
        training.train("sing", Config(), tmp_path)


def test_csv_log_widens_and_drops_rows_of_the_future(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "log.csv")
    log.write({"step": 1, "a": 1.0})
    log.write({"step": 2, "a": 2.0, "b": 0.5})
    log.write({"step": 3, "b": 1 / 3})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,a,b", "1,1,", "2,2,0.5", "3,,0.333333"]
    CsvLog(tmp_path / "log.csv", keep_below=3).write({"step": 4, "a": 4.0})
    assert (tmp_path / "log.csv").read_text().splitlines() == ["step,a,b", "1,1,", "2,2,0.5", "4,4,"]


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    stages = training.STAGES | evaluators.STAGES
    stage = max((name for name in stages if path.stem.startswith(name)), key=len)
    load_yaml(importlib.import_module(stages[stage]).Config, path)
