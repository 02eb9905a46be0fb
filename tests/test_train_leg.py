"""Training in legs: the state in few files, exact continuation, deadlines, and what a user is told."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.train import stage_module
from flowvqtalker.train.codebook import CodebookStage
from flowvqtalker.train.config import LoopConfig, load_yaml, to_dict
from flowvqtalker.train.hardware import Utilisation, process_age
from flowvqtalker.train.leg import Leg, main, run_leg
from flowvqtalker.train.leg_plan import parse_stages
from flowvqtalker.train.leg_state import Limits, fitting, read_bundle, write_bundle
from flowvqtalker.train.loop import Watch, fit
from tests.test_render_codebook import TINY
from tests.test_train_loop import Toy

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of three people, smooth noise."""
    folder = tmp_path_factory.mktemp("leg_data")
    (folder / "faces").mkdir()
    people = [next(f"{s}{i}" for i in range(999) if split_of(f"{s}{i}") == s) for s in ("train", "val")]
    with open(folder / "faces.csv", "w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "identity"))
        for number, person in enumerate([*people, people[0]]):
            small = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / "faces" / f"{number}.png"), cv2.resize(small, (512, 512)))
            writer.writerow((f"{number}.png", person))
    return folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leg_configs")
    values = {
        "data": {"augmentation": {"crop": 64, "min_scale": 0.5}, "validation": 1},
        "model": to_dict(TINY),
        "loop": {"steps": STEPS, "batch_size": 2, "lr": 1e-3, "warmup": 2, "decay": "cosine", "ema": 0.9, "threads": 1,
                 "device": "cpu", "channels_last": True, "log_every": 2, "save_every": 100, "validate_every": 0},
        "perceptual": "none", "adversarial_start": 2, "revive_every": 3, "discriminator_width": 4,
        "discriminator_layers": 2,
    }  # fmt: skip
    (folder / "codebook.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture(autouse=True)
def _no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; one test looks at what is drawn."""
    if "curves" not in request.node.name:
        monkeypatch.setattr("flowvqtalker.train.leg_report.draw_curves", lambda runs, folder: [])


def _stop(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """A signal after a step, as from a machine that is taken away; 0: none."""
    plain = CodebookStage.on_step_end

    def on_step_end(self: CodebookStage, step: int) -> None:
        plain(self, step)
        if step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CodebookStage, "on_step_end", on_step_end)


def _leg(tmp_path: Path, data: Path, configs: Path, name: str, **changes: Any) -> Leg:
    return replace(
        Leg(data, tmp_path / name, configs=configs, stages=("codebook",), samples=1, work=tmp_path / f"{name}-work"),
        **changes,
    )


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds."""
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    tensors = {f"ema/{key}": value for key, value in content["ema"]["shadow"].items()}
    tensors |= {f"model/{key}": value for key, value in content["model"].items()}
    for name, value in content["optimizers"].items():
        for number, entry in value["state"].items():
            tensors |= {f"{name}/{number}/{key}": x for key, x in entry.items()}
    return tensors


def _two_legs(
    tmp_path: Path, data: Path, configs: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> tuple[dict[str, torch.Tensor], list[float]]:
    with monkeypatch.context() as patch:
        _stop(patch, 5)
        first = run_leg(_leg(tmp_path, data, configs, f"{state}1", state=state))
    assert first["stages"]["codebook"] | {"step": 5, "done": False} == first["stages"]["codebook"]
    second = run_leg(_leg(tmp_path, data, configs, f"{state}2", state=state, earlier=(tmp_path / f"{state}1",)))
    assert second["stages"]["codebook"] | {"step": STEPS, "done": True} == second["stages"]["codebook"]
    assert len(second["legs"]) == 2
    work = tmp_path / f"{state}2-work" / "codebook"
    with open(work / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == sorted({int(row["step"]) for row in rows})
    return _tensors(work), [float(row["generator/loss"]) for row in rows]


@pytest.fixture(scope="module")
def whole(
    data: Path, configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training in one go."""
    tmp_path = tmp_path_factory.mktemp("leg_whole")
    torch.manual_seed(0)
    config = load_yaml(stage_module("codebook").Config, configs / "codebook.yaml")
    config = replace(config, data=replace(config.data, pictures=data / "faces", table=data / "faces.csv"))
    fit(stage_module("codebook").build(config), config.loop, tmp_path / "whole")
    with open(tmp_path / "whole" / "log.csv", newline="") as file:
        losses = [float(row["generator/loss"]) for row in csv.DictReader(file)]
    return _tensors(tmp_path / "whole"), losses


def test_two_legs_are_one_run_to_the_last_bit(
    tmp_path: Path, data: Path, configs: Path, monkeypatch: pytest.MonkeyPatch, whole: Any
) -> None:
    tensors, losses = _two_legs(tmp_path, data, configs, monkeypatch, "full")
    assert tensors.keys() == whole[0].keys()
    for key, value in whole[0].items():
        assert torch.equal(value, tensors[key]), key
    assert losses[-1] == whole[1][-1]
    exported = load_file(tmp_path / "full2-work" / "codebook" / "weights.safetensors")
    other = read_bundle(tmp_path / "full2", None, tmp_path / "again")
    assert other["kept"]["codebook"]["kept"] == "export"
    for key, value in load_file(tmp_path / "again" / "codebook" / "weights.safetensors").items():
        assert torch.equal(value, exported[key]), key
    with zipfile.ZipFile(tmp_path / "full2" / "report.zip") as report:
        names = set(report.namelist())
        assert {"codebook/log.csv", "codebook/validation.csv", "codebook-pictures.png"} <= names
        sheet = cv2.imdecode(np.frombuffer(report.read("codebook-pictures.png"), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape == (256, 512, 3)
    assert not list((tmp_path / "full2").glob(".writing"))


@pytest.mark.parametrize("state, near", [("half", 0.003), ("weights", 0.1)])
def test_a_reduced_state_goes_on_smoothly(
    tmp_path: Path, data: Path, configs: Path, monkeypatch: pytest.MonkeyPatch, whole: Any, state: str, near: float
) -> None:
    tensors, losses = _two_legs(tmp_path, data, configs, monkeypatch, state)
    assert tensors.keys() == whole[0].keys()
    assert any(not torch.equal(value, tensors[key]) for key, value in whole[0].items())
    assert losses[-1] == pytest.approx(whole[1][-1], rel=near)  # the mean of the last two of three steps
    step = next(value for key, value in tensors.items() if key.endswith("/step") and key.startswith("generator"))
    assert int(step) == (STEPS if state == "half" else STEPS - 5)


class _Run:
    """A checkpoint as the loop writes one, with one frozen parameter."""

    def __init__(self, folder: Path, width: int = 3) -> None:
        stage = Toy()
        stage.module["g"] = nn.Linear(4, width)
        stage.module["d"] = nn.Linear(width, 1)
        stage.module.register_parameter("given", nn.Parameter(torch.arange(5.0)))
        self.stage, self.folder = stage, folder
        fit(stage, LoopConfig(steps=3, batch_size=2, device="cpu"), folder)
        self.checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_bundle_keeps_its_limits_and_a_tensor_may_lie_in_two_files(tmp_path: Path) -> None:
    run = _Run(tmp_path / "run", width=9000)
    about = {"stages": {"toy": {"done": False}}}
    limits = Limits(max_files=8, max_file_mib=0.25)
    files = write_bundle({"toy": run.folder}, tmp_path / "out", about, limits=limits)
    assert len(files) <= 8
    assert all(path.stat().st_size <= 0.25 * 2**20 for path in files)
    pieces = [key for path in files if path.suffix == ".safetensors" for key in load_file(path)]
    assert len(pieces) > len({key.rpartition("@")[0] for key in pieces})
    manifest = read_bundle(tmp_path / "out", None, tmp_path / "work")
    assert not any(key.endswith("given") for key in manifest["tensors"])
    back = torch.load(tmp_path / "work" / "toy" / "checkpoint.pt", weights_only=True)
    for key, value in back["model"].items():
        assert torch.equal(value, run.checkpoint["model"][key]), key
    again = Toy()
    again.module["g"], again.module["d"] = nn.Linear(4, 9000), nn.Linear(9000, 1)
    again.module.register_parameter("given", nn.Parameter(torch.arange(5.0)))
    config = LoopConfig(steps=4, batch_size=2, device="cpu")
    assert fit(again, config, tmp_path / "work" / "toy", resume=True)["step"] == 4
    # Another frozen part is another network.
    read_bundle(tmp_path / "out", None, tmp_path / "other")
    again.module.given.data += 1
    with pytest.raises(UserError, match="other frozen parts"):
        fit(again, config, tmp_path / "other" / "toy", resume=True)


def test_what_does_not_fit_is_said_and_the_earlier_bundle_stays(tmp_path: Path) -> None:
    small, large = _Run(tmp_path / "small"), _Run(tmp_path / "large", width=9000)
    about = {"stages": {"toy": {"done": False}}}
    write_bundle({"toy": small.folder}, tmp_path / "out", about)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=r"takes 0\.8 MiB \(toy 0\.8\).*--state half or weights.*--leave-out"):
        write_bundle({"toy": large.folder}, tmp_path / "out", about, limits=Limits(4, 0.25))
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    write_bundle({"toy": large.folder}, tmp_path / "out", about, kind="weights", limits=Limits(4, 0.25))
    assert not before.keys() & {p.name for p in (tmp_path / "out").glob("state-*")}
    with pytest.raises(UserError, match="at least 3 files"):
        Limits(2, 16)


def test_the_kind_that_fits_is_known_before(tmp_path: Path) -> None:
    limits = Limits(8, 16)  # six files of 16 MiB for the state
    assert fitting(6 * 2**20 - 2**16, 0, limits) == "full"
    assert fitting(6 * 2**20, 2**20, limits) == "half"
    assert fitting(20 * 2**20, 0, limits) == "weights"
    with pytest.raises(UserError, match=r"this stage 100\.0"):
        fitting(25 * 2**20, 0, limits)
    with pytest.raises(UserError, match="--state half or weights"):
        fitting(12 * 2**20, 0, limits, "full")


def test_damage_is_found(tmp_path: Path) -> None:
    run = _Run(tmp_path / "run")
    write_bundle({"toy": run.folder}, tmp_path / "out", {"stages": {"toy": {"done": False}}})
    shard = next((tmp_path / "out").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_bundle(tmp_path / "out", None, tmp_path / "work")
    shard.unlink()
    with pytest.raises(UserError, match="holds no whole leg"):
        read_bundle(tmp_path / "out", None, tmp_path / "work")


def test_a_finished_stage_travels_as_weights_or_is_left_out(tmp_path: Path) -> None:
    run = _Run(tmp_path / "run")
    about = {"stages": {"toy": {"done": True}}}
    write_bundle({"toy": run.folder}, tmp_path / "one", about)
    write_bundle({"toy": run.folder}, tmp_path / "two", about, leave_out=["toy"])
    assert not list((tmp_path / "two").glob("*.safetensors"))
    for folder in ("one", "two"):  # later bundles add to earlier ones
        read_bundle(tmp_path / folder, None, tmp_path / "work")
    own = load_file(run.folder / "weights.safetensors")
    back = load_file(tmp_path / "work" / "toy" / "weights.safetensors")
    assert own.keys() == back.keys()
    assert all(value.dtype == torch.float16 and torch.equal(value, own[key]) for key, value in back.items())
    assert (tmp_path / "work" / "toy" / "config.json").is_file()


def test_a_deadline_is_kept_with_what_saving_takes(tmp_path: Path) -> None:
    class Slow(Toy):
        def on_step_end(self, step: int) -> None:
            time.sleep(0.05)

    done: list[int] = []

    def saved(step: int) -> None:
        time.sleep(0.3)
        done.append(step)

    shown: list[bool] = []
    stage = Slow()
    config = LoopConfig(steps=1000, batch_size=2, device="cpu", save_every=3, validate_every=0)
    deadline = time.monotonic() + 1.6
    watch = Watch(deadline, saved, lambda fabric: shown.append(stage.module.training))
    result = fit(stage, config, tmp_path, watch=watch)
    assert time.monotonic() < deadline + 0.25
    assert 3 <= result["step"] == done[-1] < 40
    assert shown == [False]
    assert stage.module.training


def test_steps_are_chosen_to_fit_the_minutes(tmp_path: Path, data: Path, configs: Path) -> None:
    minutes = 4.0
    leg = _leg(
        tmp_path, data, configs, "timed", stages=(f"codebook={minutes}",), probe=1.0, minutes=0.08, reserve=1.0,
    )  # fmt: skip
    begun = time.monotonic()
    entry = run_leg(leg)["stages"]["codebook"]
    assert time.monotonic() - begun < 0.08 * 60 + 1.5
    assert 0 < entry["step"] < entry["steps"]
    assert entry["steps"] > STEPS
    assert entry["config"]["loop"]["steps"] == entry["steps"]
    assert entry["config"]["adversarial_start"] == pytest.approx(entry["steps"] * 2 / STEPS, abs=1)
    assert {"steps_per_s", "items_per_s", "data_wait", "memory_mib"} <= entry["speed"].keys()
    log = json.loads((tmp_path / "timed" / "leg.json").read_text())["stages"]["codebook"]
    assert log["step"] == entry["step"]


def test_users_are_told_before_anything_trains(tmp_path: Path, data: Path, configs: Path) -> None:
    with pytest.raises(UserError, match=r"'codebok' is no stage.*vqig needs .*pictures.*must be a number"):
        parse_stages(["codebok", "vqig=3", "codebook=x"], data)
    with pytest.raises(UserError, match="holds no data of any stage"):
        parse_stages((), tmp_path)
    assert parse_stages((), data) == {"codebook": 0.0}
    with pytest.raises(UserError, match="no configuration of codebook"):
        run_leg(_leg(tmp_path, data, tmp_path, "a"))
    with pytest.raises(UserError, match=r"loop\.stepz: unknown"):
        run_leg(_leg(tmp_path, data, configs, "b", settings=("codebook.loop.stepz=3",)))
    with pytest.raises(UserError, match="names no stage"):
        run_leg(_leg(tmp_path, data, configs, "c", settings=("vqig.loop.steps=3",)))
    with pytest.raises(UserError, match="only a stage that an earlier leg finished"):
        run_leg(_leg(tmp_path, data, configs, "d", leave_out=("codebook",)))
    with pytest.raises(UserError, match="leaves no time"):
        run_leg(_leg(tmp_path, data, configs, "e", minutes=0.1))
    with pytest.raises(UserError, match="on one device"):
        run_leg(_leg(tmp_path, data, configs, "f", settings=("codebook.loop.devices=2",)))
    limits = Limits(3, 0.05)
    with pytest.raises(UserError, match="the state takes"):
        run_leg(_leg(tmp_path, data, configs, "g", limits=limits))
    assert not any((tmp_path / f"{name}-work").exists() for name in "abcdefg")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "leg.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a leg"):
        run_leg(_leg(tmp_path, data, configs, "h"))


def test_the_command_line_is_the_same_leg(tmp_path: Path, data: Path, configs: Path) -> None:
    from flowvqtalker import cli

    arguments = ["--data", data, "--configs", configs, "--samples", 0]
    arguments += ["--set", "codebook.loop.steps=2", "codebook.data.augmentation.flip=false"]
    names = []
    for number in (1, 2):
        given = [*arguments, "--out", tmp_path / f"{number}", "--work", tmp_path / f"work{number}"]
        given = [str(x) for x in given]
        if number == 1:
            assert cli.main(["train", "leg", *given]) == 0
        else:
            main(given)
        entry = json.loads((tmp_path / f"{number}" / "leg.json").read_text())["stages"]["codebook"]
        assert entry["done"] and entry["step"] == 2
        assert entry["config"]["data"]["augmentation"]["flip"] is False
        names.append({p.name for p in (tmp_path / f"{number}").glob("state-*")})
    assert names[0] == names[1]  # they are named after what they hold
    assert cli.main(["train", "leg", "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 2


def test_vgg19_is_a_switch_of_the_stage(
    tmp_path: Path, data: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights of the right shapes: ImageNet's are a download."""
    from flowvqtalker.render import perceptual

    torch.manual_seed(0)
    file = tmp_path / "vgg19.pth"
    torch.save(perceptual.VGG19Features().state_dict(), file)
    monkeypatch.setattr(perceptual, "find_weights", lambda kind, path=None: Path(path))
    config = load_yaml(stage_module("codebook").Config, configs / "codebook.yaml")
    config = replace(
        config, data=replace(config.data, pictures=data / "faces", table=data / "faces.csv"),
        perceptual="vgg19", perceptual_weights=file, loop=replace(config.loop, steps=1),
    )  # fmt: skip
    stage = stage_module("codebook").build(config)
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    assert [tuple(x.shape[1:]) for x in stage.perceptual.features(picture)] == [
        (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)
    ]  # fmt: skip
    loss, logs = stage.loss("generator", picture, 0)
    assert torch.isfinite(loss) and float(logs["perceptual"]) > 0
    loss.backward()
    assert all(p.grad is None for p in stage.perceptual.parameters())
    assert stage.autoencoder.decoder.last_weight.grad.abs().sum() > 0


def test_the_age_of_a_process_counts_its_imports() -> None:
    code = "import time; time.sleep(0.3); from flowvqtalker.train.hardware import process_age; print(process_age())"
    begun = time.monotonic()
    found = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    if sys.platform == "linux":
        assert 0.3 <= found <= time.monotonic() - begun + 0.1
    assert process_age() >= 0


def test_utilisation_is_a_mean_and_survives_a_driver() -> None:
    values = iter([0.5, 1.0])
    with Utilisation(torch.device("cpu"), lambda: next(values), period=0.005) as found:
        end = time.monotonic() + 5
        while len(found._values) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        assert found.means() == {"gpu_busy": 0.75}
        assert found.means() == {}
    with Utilisation(torch.device("cpu")) as nothing:
        assert nothing.means() == {}


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_yaml(stage_module(path.stem).Config, path)
    if path.parent.name == "paper" and path.stem in ("codebook", "vqig"):
        assert config.model == type(config.model).paper()
        assert config.perceptual == "vgg19"


def test_compiled_parts_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, quick = Toy(dropout=0.0), Toy(dropout=0.0)
    parts = [quick.module["g"], quick.module["d"]]
    quick.compiled = lambda: parts  # type: ignore[method-assign]
    for part in parts:
        part.compile = lambda part=part: nn.Module.compile(part, backend="eager")  # type: ignore[method-assign]
    config = LoopConfig(steps=3, batch_size=2, device="cpu")
    fit(plain, config, tmp_path / "plain")
    fit(quick, replace(config, compile=True), tmp_path / "quick")
    assert all(part._compiled_call_impl is not None for part in parts)
    for a, b in zip(plain.module.parameters(), quick.module.parameters(), strict=True):
        assert torch.allclose(a, b)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("plain", "quick"))
    assert a.keys() == b.keys()


def test_curves_are_drawn_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowvqtalker.train.leg_report import draw_curves, last_rows

    run = tmp_path / "toy"
    run.mkdir()
    (run / "log.csv").write_text(
        "step,g/loss,lr,steps_per_s,memory_mib\n2,3,.1,1,50\n4,2,.1,3,90\n6,1,.1,5,70\n"
    )  # fmt: skip
    drawn = draw_curves({"toy": run}, tmp_path)
    assert [path.name for path in drawn] == ["toy-curves.png"]
    assert cv2.imread(str(drawn[0])).std() > 1
    assert last_rows(run) == {"steps_per_s": 4.0, "memory_mib": 90.0}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert draw_curves({"toy": run}, tmp_path) == []
