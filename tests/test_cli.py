"""The commands as a user meets them: exit codes, one line for each error, nothing left behind."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowvqtalker import EMOTIONS, __version__, cli
from flowvqtalker.cli import main
from flowvqtalker.face.export import COLUMNS
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.io.video import probe

from .conftest import babble, write_wav


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the real program."""
    line = [sys.executable, "-m", "flowvqtalker", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL)


@pytest.fixture
def animate(portrait_file, tiny_weights, tmp_path):
    """``animate`` with tiny weights, in this process: (exit code, files beside the speech)."""

    def run(portrait: Path = portrait_file, speech: Path | None = None, output: str = "out.mp4", options=()):
        source = speech or write_wav(tmp_path / "speech.wav", babble(0.4))
        line = ["animate", str(portrait), str(source), "-o", str(tmp_path / output)]
        usual = {"--weights": str(tiny_weights), "--device": "cpu"}
        usual.update(zip(options[::2], options[1::2], strict=True))
        return main([*line, *(part for pair in usual.items() for part in pair)])

    return run


def test_help_is_quick_and_complete():
    started = time.process_time()
    shown = command("--help")
    assert shown.returncode == 0
    for name in ("animate", "track", "motion", "render", "train", "prepare", "doctor"):
        assert name in shown.stdout
    assert all(emotion in shown.stdout for emotion in EMOTIONS)
    assert time.process_time() - started < 5


def test_help_imports_nothing_heavy():
    code = "import sys; from flowvqtalker.cli import main; main(['animate', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "tyro" in loaded
    assert not loaded & {"torch", "mediapipe", "av", "cv2", "lightning_fabric", "scipy", "matplotlib"}


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"flowvqtalker {__version__}"


def test_animate_writes_a_video(animate, tmp_path, capsys):
    assert animate() == 0
    assert "10 frames, 512x512" in capsys.readouterr().out
    found = probe(tmp_path / "out.mp4")
    assert (found.kind, found.width, found.height, found.fps, found.sound) == ("video", 512, 512, 25, True)


def test_motion_then_render(tmp_path, tiny_weights, portrait_file, capsys):
    speech = write_wav(tmp_path / "short.wav", babble(0.3))
    shared = ["--weights", str(tiny_weights)]
    assert main(["motion", str(speech), "-o", str(tmp_path / "a.npz"), "--emotion", "happy", *shared]) == 0
    with np.load(tmp_path / "a.npz") as content:
        assert content["expression"].shape == (8, 64)
        assert content["pose"].shape == (8, 6)
        assert content["identity"].shape == (80,)
        assert float(content["fps"]) == 25
    line = ["render", str(portrait_file), str(tmp_path / "a.npz"), "-o", str(tmp_path / "b.mp4")]
    assert main([*line, "--speech", str(speech), "--device", "cpu", *shared]) == 0
    assert probe(tmp_path / "b.mp4").sound
    assert main([*line, "--full", "--absolute-pose", "--device", "cpu", *shared]) == 0
    assert not probe(tmp_path / "b.mp4").sound
    assert capsys.readouterr().err == ""


def test_motion_as_blendshapes(tmp_path, tiny_weights, speech):
    line = ["motion", str(speech), "--weights", str(tiny_weights), "--fps", "60"]
    assert main([*line, "-o", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert set(rows[0]) == {"Timecode", "BlendshapeCount", *COLUMNS}
    assert all(0 <= float(row["JawOpen"]) <= 1 for row in rows)


def test_motion_as_gltf(tmp_path, tiny_weights, speech, capsys):
    assert main(["motion", str(speech), "--weights", str(tiny_weights), "-o", str(tmp_path / "a.glb")]) == 0
    assert (tmp_path / "a.glb").read_bytes()[:4] == b"glTF"
    assert "a.glb: 25 frames" in capsys.readouterr().out
    assert main(["motion", str(speech), "--fps", "0", "-o", str(tmp_path / "b.glb")]) == 2
    assert "fps must be between 1 and 240" in capsys.readouterr().err
    assert not (tmp_path / "b.glb").exists()


def test_takes_differ_by_their_seeds(tmp_path, tiny_weights, capsys):
    speech = write_wav(tmp_path / "s.wav", babble(0.2))
    line = ["motion", str(speech), "--weights", str(tiny_weights), "--pose-scale", "0.5", "--emotion", "happy:1,sad:3"]
    assert main([*line, "-o", str(tmp_path / "a.npz"), "--takes", "2", "--seed", "7"]) == 0
    assert main([*line, "-o", str(tmp_path / "b.npz"), "--seed", "8"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["a_1.npz", "a_2.npz", "b.npz"]
    takes = [Coefficients.load(tmp_path / name).expression for name in ("a_1.npz", "a_2.npz", "b.npz")]
    assert np.array_equal(takes[1], takes[2])
    assert not np.array_equal(takes[0], takes[1])
    assert capsys.readouterr().err == ""


def test_takes_of_a_video(animate, tmp_path, capsys):
    assert animate(options=["--takes", "2"]) == 0
    assert capsys.readouterr().out.count("10 frames, 512x512") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_1.mp4", "out_2.mp4", "speech.wav"]


def test_head_and_emotion_from_files(tmp_path, tiny_weights, speech, portrait_file):
    (tmp_path / "e.csv").write_text("time,emotion,intensity\n0,neutral,\n0.5,happy,1.2\n", "utf-8")
    line = ["motion", str(speech), "--weights", str(tiny_weights), "--emotion-track", str(tmp_path / "e.csv")]
    assert main([*line, "-o", str(tmp_path / "a.npz"), "--pose-from", str(portrait_file)]) == 0  # one pose: held
    assert main([*line, "-o", str(tmp_path / "b.npz"), "--still"]) == 0
    a, b = (Coefficients.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert np.array_equal(a.pose, b.pose)
    assert not np.diff(b.pose, axis=0).any()
    assert np.array_equal(a.expression, b.expression)


def test_track_writes_what_design_says(tmp_path, tiny_weights, portrait_file):
    line = ["track", str(portrait_file), "-o", str(tmp_path / "a.npz")]
    assert main([*line, "--weights", str(tiny_weights)]) == 0
    with np.load(tmp_path / "a.npz") as content:
        shapes = {name: content[name].shape for name in content.files}
    expected = {"expression": (1, 64), "pose": (1, 6), "identity": (80,), "landmarks": (1, 478, 3), "fps": ()}
    assert shapes == {**expected, "crop": (2, 3), "blendshapes": (1, 52)}
    assert main([*line, "--landmarks-only", "--weights", str(tmp_path)]) == 0
    assert main(["track", str(portrait_file), "-o", str(tmp_path / "a.csv"), "--landmarks-only"]) == 0
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").count("\n") == 2


def wall(path: Path, size: int = 300) -> Path:
    Image.fromarray(np.full((size, size, 3), 90, np.uint8)).save(path)
    return path


def empty(path: Path) -> Path:
    path.write_text("time,emotion\n", "utf-8")
    return path


BAD = {
    "no face": (lambda at: {"portrait": wall(at / "wall.png")}, "no face found in"),
    "no image": (lambda at: {"portrait": write_wav(at / "a.jpg", babble(0.2))}, "is not an image"),
    "no such portrait": (lambda at: {"portrait": at / "none.jpg"}, "does not exist"),
    "portrait is a folder": (lambda at: {"portrait": at}, "is a folder"),
    "no audio": (lambda at: {"speech": wall(at / "wall.png")}, "has no audio track"),
    "no such speech": (lambda at: {"speech": at / "none.wav"}, "does not exist"),
    "empty file": (lambda at: {"speech": (at / "a.wav").touch() or at / "a.wav"}, "cannot be read as audio"),
    "zero seconds": (lambda at: {"speech": write_wav(at / "a.wav", np.zeros(0))}, "0 seconds"),
    "silent": (lambda at: {"speech": write_wav(at / "a.wav", np.zeros(8000))}, "is silent"),
    "unknown emotion": (lambda at: {"options": ["--emotion", "jolly"]}, ", ".join(EMOTIONS)),
    "mixture": (lambda at: {"options": ["--emotion", "happy:2,joy"]}, ", ".join(EMOTIONS)),
    "no such track": (lambda at: {"options": ["--emotion-track", str(at / "e.csv")]}, "does not exist"),
    "empty track": (lambda at: {"options": ["--emotion-track", str(empty(at / "e.csv"))]}, "holds no row"),
    "no such pose": (lambda at: {"options": ["--pose-from", str(at / "p.npz")]}, "does not exist"),
    "takes": (lambda at: {"options": ["--takes", "0"]}, "num_samples must be from 1"),
    "intensity": (lambda at: {"options": ["--intensity", "9"]}, "intensity must be between"),
    "face number": (lambda at: {"options": ["--face", "3"]}, "--face 3: the image has 1 face"),
    "no folder": (lambda at: {"output": "none/out.mp4"}, "there is no folder"),
    "no video name": (lambda at: {"output": "out.txt"}, "must end in one of .mp4"),
    "output is a folder": (lambda at: {"output": "folder.mp4"}, "is a folder"),
    "no weights": (lambda at: {"options": ["--weights", str(at)]}, "are missing"),
    "no weights folder": (lambda at: {"options": ["--weights", str(at / "none")]}, "does not exist"),
    "device": (lambda at: {"options": ["--device", "tpu"]}, "unknown device"),
    "reference without a face": (
        lambda at: {"options": ["--emotion-reference", str(wall(at / "wall.png"))]},
        "no face found in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(case, animate, tmp_path, capsys):
    if case == "output is a folder":
        (tmp_path / "folder.mp4").mkdir()
    make, message = BAD[case]
    given = make(tmp_path)
    write_wav(tmp_path / "speech.wav", babble(0.4))
    before = sorted(tmp_path.iterdir())
    code = animate(**given)
    assert code == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("flowvqtalker: error: ")
    assert message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_weights_are_named(animate, tiny_weights, tmp_path, capsys):
    import shutil

    from flowvqtalker import weights

    shutil.copytree(tiny_weights, tmp_path / "weights")
    file = tmp_path / "weights" / "vqig.safetensors"
    good = weights.sha256(file)
    file.write_bytes(file.read_bytes()[:-1])
    assert animate(options=["--weights", str(tmp_path / "weights")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert good in error
    assert weights.sha256(file) in error
    assert not (tmp_path / "out.mp4").exists()


def test_the_real_program_writes_one_line_and_no_noise(tmp_path, tiny_weights, speech):
    """Native libraries write to the terminal by themselves; the user sees the error alone."""
    done = command("animate", wall(tmp_path / "w.png"), speech, "-o", tmp_path / "o.mp4", "--weights", tiny_weights)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("flowvqtalker: error: no face found in")
    assert not (tmp_path / "o.mp4").exists()


def writes_in(process: int, folder: Path) -> bool:
    """Whether a process has begun a file in a folder, which on Linux has no name yet."""
    if list(folder.glob(".*.part")):
        return True
    links = []
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(descriptor))
    return any(link.startswith(str(folder)) and link.endswith("(deleted)") for link in links)


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "flowvqtalker: interrupted"), (signal.SIGTERM, 143, "")]
)
def test_interrupt_is_clean(tmp_path, tiny_weights, portrait_file, number, code, said):
    speech = write_wav(tmp_path / "speech.wav", babble(60.0))
    line = [sys.executable, "-m", "flowvqtalker", "animate", str(portrait_file), str(speech)]
    line += ["-o", str(tmp_path / "out.mp4"), "--weights", str(tiny_weights), "--device", "cpu"]
    running = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )  # fmt: skip
    while running.poll() is None and not writes_in(running.pid, tmp_path):
        time.sleep(0.05)
    running.send_signal(number)
    _, errors = running.communicate()
    doubt = f"flowvqtalker: warning: the face in {portrait_file} is hard to make out"
    lines = [line for line in errors.splitlines() if not line.startswith(doubt)]
    assert (running.returncode, "\n".join(lines)) == (code, said)
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_a_closed_terminal_ends_the_program_but_not_under_nohup():
    former = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit) as stopped, cli._terminable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stopped.value.code == 129
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        with cli._terminable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_names_that_cannot_be_shown_are_escaped(tmp_path, capsys):
    name = os.fsdecode(b"a\xff\n.wav")
    assert main(["motion", str(tmp_path / name), "-o", str(tmp_path / "a.npz")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a\\udcff\\n.wav does not exist" in error
    assert main(["motion", "x" * 300 + ".wav", "-o", str(tmp_path / "a.npz")]) == 2
    assert "File name too long" in capsys.readouterr().err
    assert main(["motion", "a.wav", "-o", str(tmp_path / ("x" * 300 + ".npz"))]) == 2
    assert "File name too long; choose another name" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error():
    code = "from flowvqtalker import cli; cli._registry = lambda: print('word ' * 10**6); exit(cli.main([]))"
    line = f'{sys.executable} -c "{code}" | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_training_options_reach_the_stage(capsys):
    assert main(["train", "juggling"]) == 2
    assert "choose one of face-model, codebook" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert main(["prepare"]) == 2
    assert main(["train", "codebook", "--help"]) == 0
    assert "--loop.steps" in capsys.readouterr().out


def test_doctor_tells_what_is_missing(tiny_weights, tmp_path, capsys):
    assert main(["doctor", "--weights", str(tiny_weights)]) == 0
    shown = capsys.readouterr().out
    for name in ("python", "torch", "mediapipe", "landmark model", "encoder libx264", "encoder aac", "weights vqig"):
        assert f"ok       {name}" in shown
    assert main(["doctor", "--weights", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "MISSING  weights" in shown
    assert "holds no manifest.json; give a folder made by `weights-add`" in shown


def test_missing_package_is_named(monkeypatch, animate, capsys):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    assert animate() == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "pip install 'mediapipe>=1.2'" in error
