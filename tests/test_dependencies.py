"""The runtime dependencies are enough to animate: packages of the extras are made unimportable."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

from .conftest import babble, write_wav

_PROGRAM = """
import importlib.abc, sys

allowed = set(sys.argv[1].split(","))


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (not a runtime dependency)", name=name)


import importlib.metadata
blocked = {
    top for top, names in importlib.metadata.packages_distributions().items()
    if not top.startswith("flowvqtalker") and not any(n.lower().replace("_", "-") in allowed for n in names)
}
sys.meta_path.insert(0, Refuse())
from flowvqtalker.cli import main
for line in sys.argv[2:]:
    if code := main(line.split("\\n")):
        sys.exit(code)
"""


def closure(name: str) -> set[str]:
    """Distributions that a plain ``pip install NAME`` brings."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [Requirement(name)]
    while todo:
        wanted = todo.pop()
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if key in found:
            continue
        try:
            requirements = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(key)
        parsed = map(Requirement, requirements)
        todo += [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_runtime_dependencies_are_enough(tmp_path, tiny_weights, portrait_file):
    speech = write_wav(tmp_path / "speech.wav", babble(0.2))
    lines = (
        ["track", portrait_file, "-o", tmp_path / "track.npz"],
        ["motion", speech, "-o", tmp_path / "motion.npz"],
        ["animate", portrait_file, speech, "-o", tmp_path / "out.mp4", "--device", "cpu"],
    )
    allowed = closure("flowvqtalker")
    assert "scikit-learn" not in allowed
    commands = ["\n".join(map(str, [*line, "--weights", tiny_weights])) for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, ",".join(allowed), *commands], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"speech.wav", "track.npz", "motion.npz", "out.mp4"}
