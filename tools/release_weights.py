"""Put the weights of finished training runs into the package.

    python tools/release_weights.py RUNS --data "what they were trained on"

RUNS holds one folder per stage, named as ``flowvqtalker train`` names it (``face-model``, ``codebook``, ...); a stage
without a folder keeps its present weights. ``--best`` takes ``best.safetensors`` where a run has one.
``flowvqtalker weights-add`` does the same for one stage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.train.release import add_weights

LIMIT_MIB = 60.0


def main() -> int:
    """Release every run that is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", default="", help="what they were trained on, in a sentence")
    parser.add_argument("--terms", default=weights.TERMS)
    parser.add_argument("--folder", type=Path, help="folder of weights; default: inside the package")
    parser.add_argument("--best", action="store_true", help="take best.safetensors where there is one")
    options = parser.parse_args()
    try:
        for name, stage in weights.STAGES.items():
            run = options.runs / stage
            if not run.is_dir():
                continue
            source = run / "best.safetensors" if options.best and (run / "best.safetensors").is_file() else run
            entry = add_weights(source, name, path=options.folder, data=options.data, terms=options.terms)
            print(f"{name}: {entry.parameters:,} parameters, step {entry.steps}, sha256 {entry.sha256}")
    except UserError as error:
        print(f"release_weights: error: {error}", file=sys.stderr)
        return 2
    place = weights.folder(options.folder)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors")) / 2**20
    print(f"together {size:.1f} MiB of at most {LIMIT_MIB:.0f}")
    return int(size > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
