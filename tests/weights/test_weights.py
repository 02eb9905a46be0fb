"""The manifest, the hashes, and what each kind of wrong file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flowvqtalker import weights
from flowvqtalker.batch.job import weights_hashes
from flowvqtalker.cli import main
from flowvqtalker.doctor import examine
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.tracker import LANDMARKER_SHA256, LANDMARKER_VARIABLE, find_landmarker
from flowvqtalker.train.release import add_weights

CONFIG = {"width": 4, "warp": {"prior": "mesh"}}


def run_folder(path: Path, stage: str = "expflow") -> Path:
    """A finished run as the training loop leaves it."""
    path.mkdir()
    tensors = {"layer.weight": torch.randn(4, 4), "layer.bias": torch.tensor([1e6, 0, 1, 2]), "index": torch.arange(3)}
    save_file(tensors, path / "weights.safetensors")
    about = {"stage": stage, "step": 123, "scores": {}, "config": CONFIG, "loop": {}}
    (path / "config.json").write_text(json.dumps(about))
    return path


@pytest.fixture
def place(tmp_path):
    add_weights(run_folder(tmp_path / "run"), "expflow", path=tmp_path / "weights", data="four clips")
    return tmp_path / "weights"


def test_a_run_becomes_an_entry(tmp_path, place):
    entry = weights.manifest(place)["expflow.safetensors"]
    assert entry.sha256 == weights.sha256(place / "expflow.safetensors")
    assert (entry.stage, entry.steps, entry.data, entry.parameters) == ("expflow", 123, "four clips", 20)
    assert "non-commercial" in entry.terms
    tensors, config = weights.load("expflow", place)
    assert config == CONFIG
    source = load_file(tmp_path / "run" / "weights.safetensors")
    torch.testing.assert_close(tensors["layer.weight"], source["layer.weight"], atol=2e-3, rtol=1e-3)
    assert tensors["layer.weight"].dtype == torch.float32
    assert torch.equal(tensors["index"], source["index"])
    assert sorted(p.name for p in place.iterdir()) == ["expflow.safetensors", "manifest.json"]


def test_storage_is_half_precision_where_it_can_be(place):
    stored = load_file(place / "expflow.safetensors")
    assert stored["layer.weight"].dtype == torch.float16
    assert stored["layer.bias"].dtype == torch.float32  # 1e6 is more than float16 holds
    assert stored["layer.bias"][0] == 1e6


def test_a_second_file_keeps_the_first(tmp_path, place):
    add_weights(run_folder(tmp_path / "other", "poseflow"), "poseflow", path=place)
    assert set(weights.manifest(place, own=True)) == {"expflow.safetensors", "poseflow.safetensors"}


def test_missing_weights_say_how_to_get_them(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"weights are missing: .*weights-add"):
        weights.load("vqig", tmp_path / "empty")
    (place / "expflow.safetensors").unlink()  # the manifest names it: the package's must not stand in for it
    with pytest.raises(UserError, match=r"expflow.safetensors are missing; .*flowvqtalker train expflow"):
        weights.load("expflow", place)
    with pytest.raises(UserError, match="does not exist"):
        weights.load("vqig", tmp_path / "nowhere")
    with pytest.raises(UserError, match="choose one of face_model"):
        weights.load("texture", place)


def test_what_a_folder_lacks_comes_from_the_package(place):
    assert weights.place("expflow", place) == place
    assert weights.place("vqig", place) == weights.folder()
    entries = weights.manifest(place)
    assert entries["expflow.safetensors"].data == "four clips"
    assert entries["vqig.safetensors"] == weights.manifest()["vqig.safetensors"]
    assert torch.equal(weights.load("face_model", place)[0]["mean"], weights.load("face_model")[0]["mean"])
    assert weights_hashes(place)["expflow.safetensors"] == weights.sha256(place / "expflow.safetensors")


def test_doctor_shows_the_terms_of_every_file(place):
    shown = {finding.name: finding.detail for finding in examine(place)}
    assert shown["terms expflow"] == f"no commercial use ({weights.TERMS}); from four clips"
    assert shown["terms face_landmarker"].startswith("commercial use allowed (Apache License 2.0")
    assert {f"terms {Path(file).stem}" for file in weights.manifest()} <= set(shown)
    assert str(place) in shown["weights expflow"] or "do not fit" in shown["weights expflow"]


def test_damaged_weights_name_both_hashes(place):
    file = place / "expflow.safetensors"
    good = weights.sha256(file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        weights.load("expflow", place)
    assert good in str(caught.value)
    assert weights.sha256(file) in str(caught.value)


def test_unlisted_weights_are_refused(place):
    (place / "vqig.safetensors").write_bytes((place / "expflow.safetensors").read_bytes())
    with pytest.raises(UserError, match="not in manifest"):
        weights.load("vqig", place)


def test_weights_of_another_stage_are_refused(tmp_path, place):
    with pytest.raises(UserError, match="stage 'expflow', but vqig needs 'vqig'"):
        add_weights(tmp_path / "run", "vqig", path=place)
    content = json.loads((place / "manifest.json").read_text())
    content["expflow.safetensors"]["stage"] = "poseflow"
    (place / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="are of stage 'poseflow', not 'expflow'") as caught:
        weights.load("expflow", place)
    assert weights.sha256(place / "expflow.safetensors") in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"expflow.safetensors": {"colour": 1}}', "[]"])
def test_a_broken_manifest_is_named(place, text):
    (place / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest.*is broken"):
        weights.load("expflow", place)


def test_a_module_of_another_shape_is_refused_with_the_hash(place):
    class Module(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(4, width)
            self.register_buffer("index", torch.zeros(3, dtype=torch.int64))

    tensors, _ = weights.load("expflow", place)
    module = Module(4)
    weights.restore(module, tensors, "expflow", place)
    assert torch.equal(module.layer.weight, tensors["layer.weight"])
    with pytest.raises(UserError, match=r"layer.weight has shape \(4, 4\), not \(5, 4\)") as caught:
        weights.restore(Module(5), tensors, "expflow", place)
    assert weights.sha256(place / "expflow.safetensors") in str(caught.value)
    with pytest.raises(UserError, match="index is unknown"):
        weights.restore(nn.ModuleDict({"layer": nn.Linear(4, 4)}), tensors, "expflow", place)


def test_command_line(tmp_path, place, capsys):
    run_folder(tmp_path / "other", "poseflow")
    assert main(["weights-add", "poseflow", str(tmp_path / "other"), "--folder", str(place), "--data", "x"]) == 0
    assert main(["weights-list", "--folder", str(place)]) == 0
    (place / "poseflow.safetensors").write_bytes(b"")
    assert main(["weights-list", "--folder", str(place)]) == 2
    assert "poseflow.safetensors missing or damaged" in capsys.readouterr().err
    assert main(["weights-add", "poseflow", str(tmp_path / "nowhere")]) == 2


def test_the_landmarker_ships_with_the_weights(monkeypatch, tmp_path):
    monkeypatch.delenv(LANDMARKER_VARIABLE, raising=False)
    assert find_landmarker() == weights.folder() / weights.LANDMARKER
    assert weights.manifest()[weights.LANDMARKER].sha256 == LANDMARKER_SHA256
    (tmp_path / "a.task").write_bytes(b"other")
    monkeypatch.setenv(LANDMARKER_VARIABLE, str(tmp_path / "a.task"))
    with pytest.raises(MissingDependency, match="expected 64184e"):
        find_landmarker()
    with pytest.raises(MissingDependency, match=r"not found at .*none\.task; take another"):
        find_landmarker(tmp_path / "none.task")


def test_release_script_takes_every_run(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for stage in ("expflow", "poseflow"):
        run_folder(runs / stage, stage)
    script = Path(__file__).parents[2] / "tools" / "release_weights.py"
    line = [sys.executable, str(script), str(runs), "--folder", str(tmp_path / "weights"), "--data", "clips"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(weights.manifest(tmp_path / "weights", own=True)) == {"expflow.safetensors", "poseflow.safetensors"}


def test_packaged_weights_are_whole():
    """Every file that the package's manifest lists is there, unharmed, and together they are small."""
    entries = weights.manifest()
    for name, entry in entries.items():
        assert weights.sha256(weights.folder() / name) == entry.sha256
        assert entry.terms
        assert entry.data
    assert sum((weights.folder() / name).stat().st_size for name in entries) <= 60 * 2**20
    shipped = {f.name for pattern in ("*.safetensors", "*.task") for f in weights.folder().glob(pattern)}
    assert set(entries) == shipped


def test_large_matrices_of_the_speech_encoder_are_stored_in_a_byte_each(tmp_path):
    torch.manual_seed(0)
    given = {"audio.a": torch.randn(300, 256), "audio.b": torch.randn(8, 8), "audio.c": torch.zeros(256, 256)}
    save_file(given, str(tmp_path / "speech_encoder.safetensors"))
    source = tmp_path / "speech_encoder.safetensors"
    entry = add_weights(source, "speech_encoder", path=tmp_path / "w", config={"dim": 8}, data="x", steps=1)
    stored = load_file(str(tmp_path / "w" / "speech_encoder.safetensors"))
    assert stored["audio.a"].dtype == torch.int8 and stored["audio.b"].dtype == torch.float16
    read, config = weights.load("speech_encoder", tmp_path / "w")
    assert config == {"dim": 8} and entry.parameters == sum(tensor.numel() for tensor in given.values())
    assert read.keys() == given.keys()
    largest = given["audio.a"].abs().amax(1, keepdim=True)
    assert ((read["audio.a"] - given["audio.a"]).abs() <= largest / 127 * 0.52).all()
    assert torch.equal(read["audio.c"], given["audio.c"])


def test_the_speech_encoder_is_needed_by_flows_that_hear_with_it(tmp_path):
    add_weights(run_folder(tmp_path / "run"), "expflow", path=tmp_path / "w", config={"speech_encoder": False})
    (tmp_path / "run" / "config.json").write_text(json.dumps({"stage": "poseflow"}))
    add_weights(tmp_path / "run", "poseflow", path=tmp_path / "w", config={"speech_encoder": False})
    assert "speech_encoder" not in weights.needed(tmp_path / "w")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"stage": "expflow"}))
    add_weights(run_folder(tmp_path / "run2"), "expflow", path=tmp_path / "w", config={"speech_encoder": True})
    assert "speech_encoder" in weights.needed(tmp_path / "w")
