"""How much of a frame the codes draw: the region of the default generator with other codes, against its normal output.

    python benchmarks/code_influence.py PORTRAIT SPEECH [--emotion happy] [--frames 12] [--json OUT]

Frames are taken evenly from the speech's motion. For each, D_h also draws random codes, the source portrait's codes,
and no codes (zeros), with the same modulation; `warp_only` is the warped portrait I_w. Printed is the mean absolute
change of the region in levels of 255, and the share of its pixels that change by more than 10 levels.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import choose_device, fast_dtype
from flowvqtalker.pipeline import Talker
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import Source

#: What replaces the normal output.
VARIANTS = ("random_codes", "source_codes", "no_codes", "warp_only")


@torch.inference_mode()
def regions(generator: RegionVQIG, source: Source, motion: Tensor, prior: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """The region (B, 3, H, W), normal and with each of :data:`VARIANTS`; arguments as :meth:`RegionVQIG.predict`."""
    found = generator.predict(source, motion, prior)
    codes, book = generator.codes(found), generator.autoencoder.codes
    chance = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(book.weight), (len(codes), *codes.shape[2:]), generator=chance).to(codes.device)
    every = {
        "normal": codes,
        "random_codes": book.lookup(indices),
        "source_codes": source.codes,
        "no_codes": torch.zeros_like(codes),
    }
    warped = generator.cut(found.warped).float()
    drawn = {name: generator.draw(given.to(codes.dtype), found).float() for name, given in every.items()}
    refined = {name: generator.refine(image, warped) for name, image in drawn.items()}
    return {**refined, "warp_only": warped}


def change(image: Tensor, normal: Tensor) -> tuple[float, float]:
    """Mean absolute difference in levels of 255, and the share of pixels beyond 10 levels."""
    levels = (image.clamp(-1, 1) - normal.clamp(-1, 1)).abs().mean(-3) * 127.5
    return float(levels.mean()), float((levels > 10).float().mean())


class Probe(Renderer):
    """Renders frames and keeps what other codes would change of them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def _image(self, motion: Tensor, prior: Tensor | None) -> Tensor:
        generator = self.generator
        if not isinstance(generator, RegionVQIG) or prior is None:
            raise UserError("the weights hold the paper's generator, which has no region; give those of the package")
        found = regions(generator, self.source.expand(len(motion)), motion, prior, seed=len(self.seen["warp_only"]))
        for name in VARIANTS:
            self.seen[name] += [change(*pair) for pair in zip(found[name], found["normal"], strict=True)]
        return super()._image(motion, prior)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Mean and share over 10 levels of every variant, over the frames."""
    talker = Talker.from_pretrained(options.weights, device=options.device)
    portrait = talker.portrait(options.portrait)
    motion = Motion.join(talker.motion(options.speech, portrait, emotion=options.emotion))
    chosen = torch.linspace(0, len(motion) - 1, min(options.frames, len(motion))).long()
    probe = Probe(
        talker._generator,
        talker.face_model,
        portrait.image,
        portrait.identity,
        portrait.expression,
        portrait.pose,
        batch_size=1,
        device=talker.device,
        dtype=talker.dtype or fast_dtype(choose_device(options.device)),
        workers=1,
    )
    for _ in probe.render([Motion(motion.expression[chosen], motion.pose[chosen])]):
        pass
    means = {name: torch.tensor(values).mean(0).tolist() for name, values in probe.seen.items()}
    return {name: {"mean": means[name][0], "share_over_10": means[name][1]} for name in VARIANTS}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("portrait", type=Path)
    parser.add_argument("speech", type=Path)
    parser.add_argument("--emotion", default="happy")
    parser.add_argument("--frames", type=int, default=12, help="frames of the speech that are measured")
    parser.add_argument("--weights", type=Path, help="folder of weights; default: the package's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the figures")
    options = parser.parse_args()
    if options.frames < 1:
        parser.error("--frames must be at least 1")
    torch.set_num_threads(1)
    try:
        found = measure(options)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print("| instead of the predicted codes | mean change | share over 10 levels |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {values['mean']:.2f} | {values['share_over_10']:.3f} |")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
