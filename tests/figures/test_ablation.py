"""The ablation of the image generator: training what is missing, loading the variants, measuring and drawing them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.region import RegionConfig
from flowvqtalker.render.vqig import ABLATION, VQIG
from flowvqtalker.render.vqvae import VQAutoencoder
from flowvqtalker.train.config import LoopConfig, save_yaml
from flowvqtalker.train.region_vqig import RegionVQIGTraining
from flowvqtalker.train.vqig import Config, Data, build
from flowvqtalker_eval.figures import ablation
from flowvqtalker_eval.figures.ablation import Ablation, configuration, load_variant, make, train_missing
from flowvqtalker_eval.metrics.reenactment import BASELINES, Pair, Reenactment, Scores
from flowvqtalker_eval.metrics.ssim import ssim
from tests.render.test_codebook import TINY
from tests.render.test_generator import SMALL, face
from tests.train.test_vqig import shard

pytest.importorskip("matplotlib")
__all__ = ["face", "shard"]


@pytest.fixture(scope="module")
def base(shard: Path, face: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A tiny configuration whose variants begin with the weights of one whole generator."""
    folder = tmp_path_factory.mktemp("ablation")
    torch.manual_seed(0)
    model = VQIG(SMALL)
    save_file(VQAutoencoder(TINY).state_dict(), folder / "codebook.safetensors")
    save_file(
        {k: v for k, v in model.state_dict().items() if not k.startswith("autoencoder.")}, folder / "start.safetensors"
    )
    face.save(folder / "face.safetensors")
    return Config(
        data=Data(
            shard,
            folder / "codebook.safetensors",
            folder / "face.safetensors",
            start=folder / "start.safetensors",
            validation=1,
        ),
        model=SMALL,
        loop=LoopConfig(steps=2, batch_size=1, lr=1e-3, log_every=1, ema=0.0, threads=1, validate_every=0),
        code_steps=0,
        adversarial_start=1000,
        perceptual="none",
    )


def _image(value: int) -> np.ndarray:
    return np.full((512, 512, 3), value, np.uint8)


def _pair(name: str, target: int, **images: int) -> Pair:
    return Pair(
        name, _image(0), _image(target), {k: _image(v) for k, v in images.items()}, {"mouth": (36, 136, 128, 128)}
    )


def test_a_variant_begins_with_what_it_shares_with_the_given_weights(base: Config, tmp_path: Path) -> None:
    config = configuration(base, "phi")
    assert config.model == replace(SMALL, use_attention=False, use_codes=False)
    model = build(config).generator
    given = load_file(base.data.start)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("autoencoder.")}
    assert own and all(torch.equal(v, given[k]) for k, v in own.items())
    assert set(given) - set(own) and all(k.startswith(("attention.", "transformer.")) for k in set(given) - set(own))
    with pytest.raises(UserError, match="unknown variant 'X'"):
        configuration(base, "X")
    with pytest.raises(UserError, match=r"nowhere\.safetensors not found"):
        build(replace(config, data=replace(config.data, start=tmp_path / "nowhere.safetensors")))
    with pytest.raises(UserError, match="holds no image generator of this size"):
        build(replace(config, data=replace(config.data, start=base.data.face_model)))


def test_variants_of_the_default_generator() -> None:
    base = Config(region=RegionVQIGTraining())
    region = configuration(base, "phi").region
    assert region is not None and region.model == replace(RegionConfig(), use_attention=False, use_codes=False)
    assert configuration(base, "mobilenet").region == base.region
    with pytest.raises(UserError, match="needs the mesh; omit no-mesh"):
        configuration(base, "no-mesh")


def test_what_is_missing_is_trained_once_and_loads_again(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_missing(base, ["B", "W"], tmp_path)
    first = load_variant(tmp_path / "B")
    assert not first.config.use_warp and load_variant(tmp_path / "W" / "weights.safetensors").config.use_warp
    assert first.warping is None
    for key, value in load_file(base.data.codebook).items():
        assert torch.equal(first.autoencoder.state_dict()[key], value)  # the run's own, not the package's

    started: list[Path] = []
    monkeypatch.setattr(ablation, "train", lambda stage, config, out, resume: started.append(out) or {"step": 2.0})
    train_missing(base, ["B", "W", "phi"], tmp_path)
    assert started == [tmp_path / "phi"]
    with pytest.raises(UserError, match=r"B was trained with another configuration \(loop\)"):
        train_missing(replace(base, loop=replace(base.loop, steps=3)), ["B"], tmp_path)
    monkeypatch.setattr(ablation, "train", lambda stage, config, out, resume: {"step": 1.0})
    with pytest.raises(UserError, match="M stopped at step 1 of 2; run the same command again"):
        train_missing(base, ["M"], tmp_path)


def test_bad_weights_are_named(base: Config, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="do not exist"):
        load_variant(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="must name stage vqig, got none"):
        load_variant(file)
    file.with_suffix(".json").write_text('{"stage": "codebook", "config": {}}')
    with pytest.raises(UserError, match="must name stage vqig, got codebook"):
        load_variant(file)
    file.with_suffix(".json").write_text('{"stage": "vqig", "config": {}}')
    with pytest.raises(UserError, match="does not fit"):
        load_variant(file)
    file.with_suffix(".json").write_text(json.dumps({"stage": "vqig", "config": SMALL.to_dict()}))
    save_yaml(base, tmp_path / "config.yaml")
    with pytest.raises(UserError, match="does not fit its configuration or codebook"):
        load_variant(file)
    file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        load_variant(file)


def test_pairs_show_what_the_generators_make(shard: Path, face: FaceModel) -> None:
    torch.manual_seed(0)
    models = {"B": VQIG(SMALL.ablated("B")), "+W": VQIG(SMALL.ablated("W"))}
    pairs = Reenactment(shard, face, models, warped=("+W",), dtype=torch.float32)
    assert len(pairs) == 2 and pairs.people == 1
    first, second = pairs
    assert tuple(first.images) == pairs.methods == (*BASELINES, "I_w of +W", "B", "+W")
    assert first.name == "clip1/1" and second.name == "clip1/2"
    assert np.array_equal(first.source, second.source) and np.array_equal(first.images["copied source"], first.source)
    assert not np.array_equal(first.target, second.target) and first.change > 0
    assert first.images["B"].shape == (512, 512, 3)
    # Without W nothing of the motion reaches the image; with it, something does.
    assert np.array_equal(first.images["B"], second.images["B"])
    assert not np.array_equal(first.images["+W"], second.images["+W"])
    x, y, w, h = first.boxes["mouth"]
    assert 0 <= x <= 512 - w and 0 <= y <= 512 - h and w == h == 128
    with pytest.raises(UserError, match="no image generator"):
        Reenactment(shard, face, {})


class _Distance(torch.nn.Module):
    """In place of a perceptual network, whose weights a test cannot ask for: the colours themselves are its tap."""

    def __init__(self, *unused: object) -> None:
        super().__init__()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image]


def test_scores_have_closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    import flowvqtalker_eval.metrics.reenactment as module

    monkeypatch.setattr(module, "PerceptualLoss", _Distance)
    scores = Scores(fid=False)
    with pytest.raises(UserError, match="no pair"):
        scores.table("nothing")
    scores.add(_pair("a/1", 51, same=51, off=0))
    scores.add(_pair("a/2", 102, same=102, off=0))
    table = scores.table("title", ("a note",))
    same, off = table.rows
    assert (same.name, same.clips, same.frames) == ("same", 1, 2)
    assert same.values["l1"] == same.values["perceptual"] == same.values["mouth"] == 0
    assert same.values["psnr"] == np.inf and same.values["ssim"] == 1
    assert off.values["l1"] == pytest.approx(0.3)
    # Squared differences over the target's mean square, of levels 51 and 102 in [-1, 1].
    wanted = ((0.4 / 0.6) ** 2 + (0.8 / 0.2) ** 2) / 2
    assert off.values["perceptual"] == pytest.approx(wanted, rel=1e-3) == off.values["mouth"]
    assert off.values["psnr"] == pytest.approx(-20 * (np.log10(0.2) + np.log10(0.4)) / 2)
    expected = float(ssim(_image(51), _image(0))[0] + ssim(_image(102), _image(0))[0]) / 2
    assert off.values["ssim"] == pytest.approx(expected)
    assert [c.title for c in table.columns if not c.extra][3:] == [
        "MobileNet-perceptual",
        "MobileNet-perceptual, mouth",
    ]
    assert table.notes == ("a note",)


def test_the_frechet_distance_of_two_shifted_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal covariances: the squared distance of the means, whatever the images are."""
    import flowvqtalker_eval.metrics.reenactment as module

    class Mean:
        def __init__(self, *unused: object, **options: object) -> None: ...

        def __call__(self, frames: np.ndarray, known: dict) -> dict:
            return {"mobilenet512": frames.mean((1, 2)).astype(np.float32)}

        def settings(self) -> dict:
            return {"features": "mean colour"}

    monkeypatch.setattr(module, "PerceptualLoss", _Distance)
    monkeypatch.setattr(module, "MobileNetFeatures", Mean)
    scores = Scores()
    for i, value in enumerate((40, 80, 100, 200)):
        scores.add(_pair(f"a/{i}", value, same=value, moved=value + 10))
    table = scores.table("t")
    same, moved = (row.values["frechet_mobilenet"] for row in table.rows)
    assert same == pytest.approx(0, abs=1e-3) and moved == pytest.approx(300, abs=1e-2)
    assert "4 real and 4 generated" in table.notes[0]


def test_the_figure_has_a_column_for_each_method() -> None:
    pairs = [_pair("a/1", 50, x=40, y=60), _pair("b/1", 90, x=80, y=100)]
    figure = make(pairs, {"x": "X", "y": "Y"}, cell=0.5)
    assert [text.get_text() for text in figure.texts] == ["Source", "Target", "X", "Y"]
    assert len(figure.axes) == 2 * (4 + 3)  # images, and a detail of each but the source
    assert len(make(pairs, {"x": "X"}, zoom=False, cell=0.5).axes) == 6
    with pytest.raises(UserError, match="no image by z"):
        make(pairs, {"z": "Z"})
    with pytest.raises(UserError, match="no pair of images"):
        make([], {"x": "X"})


@pytest.mark.slow
def test_the_command_trains_measures_and_writes(
    base: Config, shard: Path, face: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import flowvqtalker_eval.metrics.reenactment as module

    def untrained(stage: str, config: Config, out: Path, resume: bool) -> dict[str, float]:
        assert stage == "vqig" and config.data.shard == shard and resume
        out.mkdir(parents=True)
        model = VQIG(config.model)
        save_file({k: v for k, v in model.state_dict().items() if not k.startswith("autoencoder.")},
                  out / "weights.safetensors")  # fmt: skip
        about = {"stage": stage, "step": config.loop.steps, "config": config.model.to_dict()}
        (out / "config.json").write_text(json.dumps(about))
        save_yaml(config, out / "config.yaml")
        return {"step": float(config.loop.steps)}

    monkeypatch.setattr(ablation, "train", untrained)
    monkeypatch.setattr(ablation, "load_face_model", lambda path: face)
    monkeypatch.setattr(module, "PerceptualLoss", _Distance)
    monkeypatch.setattr(module.Scores.__init__, "__kwdefaults__", {"fid": False, "device": "cpu"})
    save_yaml(replace(base, data=replace(base.data, shard=Path("elsewhere"))), tmp_path / "tiny.yaml")
    command = Ablation(
        shard=shard, output=tmp_path / "out.png", runs=tmp_path / "runs", train=True, config=tmp_path / "tiny.yaml",
        steps=1, limit=2, rows=2, device="cpu",
    )  # fmt: skip
    with pytest.raises(UserError, match="has no weights of B, W, phi, M, C; add --train"):
        replace(command, train=False).run()
    command.run()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == sorted(ABLATION)
    for suffix in ("png", "pdf", "md", "csv", "json"):
        assert (tmp_path / f"out.{suffix}").stat().st_size > 0
    text = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert names == [*BASELINES, *ABLATION.values()]
    assert "each variant trained for 1 steps, starting from the matching parts of start.safetensors" in text
    replace(command, train=False, limit=1, rows=1).run()  # what is there needs no training
    with pytest.raises(UserError, match="trained with another configuration"):
        replace(command, steps=2).run()


def test_the_command_refuses_what_it_cannot_do(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    command = Ablation(shard=shard, output=tmp_path / "out.png", runs=tmp_path / "runs")
    with pytest.raises(UserError, match="omit them or --variant"):
        replace(command, train=True, variant=(f"a={tmp_path / 'w'}",)).run()
    with pytest.raises(UserError, match=r"weights\.safetensors do not exist"):
        replace(command, variant=(f"a={tmp_path / 'w'}",)).run()
    with pytest.raises(UserError, match="does not exist; give --config"):
        replace(command, train=True, config=tmp_path / "no.yaml").run()
    with pytest.raises(UserError, match="--rows must be at least 1"):
        replace(command, rows=0).run()
    with pytest.raises(UserError, match="must end in one of"):
        replace(command, output=tmp_path / "out.gif").run()


def test_extra_variants_change_one_thing() -> None:
    base = Config()
    whole = configuration(base, "C")
    for name in ablation.EXTRA:
        changed = configuration(base, name)
        assert changed != whole or name == whole.perceptual
    assert configuration(base, "no-mesh").model.warp.prior == "none"
    assert configuration(base, "vgg19") == replace(whole, perceptual="vgg19")
