"""The lite generator on a CPU by OpenVINO (ours): mesh flow, psi and W, then OpenCV's remap, then E_w to D_h in int8.

``tools/compile_generator.py`` makes the three graphs. The last goes from levels to levels, feather included, so that a
frame is never held as a whole in floating point; it sees blocks of 2x2 pixels as channels, since maps of three channels
are slow. The mesh flow is a thousand small operations; as a graph, frames drawn at the same time do not wait for each
other's interpreter. Without OpenVINO, on GPUs and in other types, torch draws.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from flowvqtalker.constants import CROP
from flowvqtalker.render.mesh_flow import APERTURES, MeshSource, aperture_border
from flowvqtalker.render.region import RegionConfig
from flowvqtalker.render.vqig import Source
from flowvqtalker.runtime import load_openvino, openvino_core

__all__ = ["GRAPHS", "CompiledGenerator", "CompiledPortrait", "warp_levels"]

#: Names of the graphs, in the order in which a frame passes them.
GRAPHS = ("mesh", "warp", "region")

Levels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@lru_cache(maxsize=2)
def _identity(size: int = CROP) -> Floats:
    """(size, size, 2) x and y of every pixel."""
    place = np.arange(size, dtype=np.float32)
    return np.stack(np.meshgrid(place, place), -1)


def _pairs(frame: Levels, roi: tuple[slice, slice]) -> list[npt.NDArray[np.uint16]]:
    """The even and the odd lines of a region of a frame (512, 512, 3): views (h / 2, w / 2, 3) of two pixels each as
    three numbers. Merged, they are blocks of 2x2 pixels."""
    rows, columns = (slice(s.start // 2, s.stop // 2) for s in roi)
    pairs = frame.reshape(CROP, -1).view(np.uint16).reshape(CROP // 2, 2, CROP // 2, 3)[rows, :, columns]
    return [pairs[:, 0], pairs[:, 1]]


def warp_levels(image: Levels, flow: Floats, prior: Floats) -> Levels:
    """:func:`flowvqtalker.render.mesh_flow.warp` of one picture in levels of 255: (512, 512, 3).

    Arguments:
        image: (512, 512, 3).
        flow: (2, s, s), in units of half the picture's side.
        prior: (13, s, s) of :class:`~flowvqtalker.render.mesh_flow.MeshFlow` with apertures.
    """
    half, scale = np.float32(CROP / 2), CROP // flow.shape[-1]
    place = _enlarged(flow * half, scale)
    place += _identity()
    lines = prior[2 + 2 * APERTURES :]
    moved = np.abs(lines[:4]).max(0) > 1e-5
    rows, columns = (np.flatnonzero(moved.any(axis)) for axis in (1, 0))
    if len(rows):
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        upper, apart, above, openings = (
            _enlarged(maps[(slice(None), *box)], scale)
            for maps in (lines[:2] * half, lines[2:4] * half, lines[4:5], prior[2:4].max(0, keepdims=True))
        )
        cv2.copyTo(upper, cv2.compare(above, 0, cv2.CMP_GT), apart)
        apart *= aperture_border(openings)[..., None]
        place[tuple(slice(s.start * scale, s.stop * scale) for s in box)] += apart
    return np.asarray(cv2.remap(image, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)


def _enlarged(maps: Floats, scale: int) -> Floats:
    """Maps (C, h, w), enlarged bilinearly, with channels last; one channel has no axis."""
    size = maps.shape[2] * scale, maps.shape[1] * scale
    whole = cv2.resize(np.ascontiguousarray(maps.transpose(1, 2, 0)), size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(whole, np.float32)


class CompiledGenerator:
    """The graphs of :data:`GRAPHS`, compiled for this machine.

    Arguments:
        tensors: ``NAME.xml`` and ``NAME.bin`` of each graph as uint8, OpenVINO's intermediate representation.
        config: of the generator that they were made from.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: RegionConfig) -> None:
        openvino = load_openvino()
        self.config = config
        self._core = openvino_core()
        self._models = {}
        for name in GRAPHS:
            weights = openvino.Tensor(np.ascontiguousarray(tensors[f"{name}.bin"].numpy()))
            self._models[name] = self._core.read_model(tensors[f"{name}.xml"].numpy().tobytes(), weights)
        self._compiled: dict[tuple[int, int], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def compile(self, workers: int, threads: int) -> dict[str, Any]:
        """The compiled graphs for so many frames at the same time, which share the threads."""
        with self._lock:
            if (workers, threads) not in self._compiled:
                settings = {
                    "NUM_STREAMS": workers,
                    "INFERENCE_NUM_THREADS": threads,
                    "ENABLE_CPU_PINNING": False,  # pinned threads wait for a core that something else keeps busy
                }
                self._compiled[workers, threads] = {
                    name: self._core.compile_model(
                        model, "CPU", {**settings, "INFERENCE_PRECISION_HINT": self._precision(name)}
                    )
                    for name, model in self._models.items()
                }
            return self._compiled[workers, threads]

    def _precision(self, name: str) -> str:
        """bfloat16 where the processor has it; places in the picture would be off by whole pixels."""
        return "bf16" if name != "mesh" and self._bfloat16() else "f32"

    def _bfloat16(self) -> bool:
        return "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class CompiledPortrait:
    """Draws frames of one portrait; may be called from several threads.

    Arguments:
        generator: the compiled graphs.
        image: (512, 512, 3) uint8 RGB crop.
        source: of the crop, from :meth:`~flowvqtalker.render.region.RegionVQIG.prepare`.
        identity: (80,) alpha of the person.
        start: the portrait's view, from :meth:`~flowvqtalker.render.mesh_flow.MeshFlow.prepare`.
        workers: frames drawn at the same time.
        threads: in all.
    """

    def __init__(
        self,
        generator: CompiledGenerator,
        image: Levels,
        source: Source,
        identity: Tensor,
        start: MeshSource,
        *,
        workers: int,
        threads: int,
    ) -> None:
        self._graphs = generator.compile(workers, threads)
        self._image = np.ascontiguousarray(image)
        if start.apertures is None or source.fine is None:
            raise ValueError("the compiled generator needs a mesh flow with apertures and a map of the portrait")
        known = (source.codes, source.small, identity[None], start.surface, start.apertures)
        self._codes, self._small, *self._view = (value.float().contiguous().numpy() for value in known)
        self._fine = source.fine[0].movedim(0, -1).float().contiguous().numpy()
        top, left, height, width = generator.config.codebook.roi
        self._roi = slice(top, top + height), slice(left, left + width)
        self._local = threading.local()

    def _infer(self, name: str, *inputs: Any) -> list[npt.NDArray[Any]]:
        """Outputs of a graph; the next call of this thread overwrites them."""
        requests = self._local.__dict__
        if name not in requests:
            requests[name] = self._graphs[name].create_infer_request()
        found = requests[name].infer(inputs, share_inputs=True, share_outputs=True)
        return list(found.values())

    def __call__(self, motion: Tensor) -> Levels:
        """A frame (512, 512, 3) uint8 RGB of (70,) coefficients [beta, rho]."""
        coefficients = motion[None].numpy()
        prior, coarse = self._infer("mesh", coefficients, *self._view)
        change, sigma = self._infer("warp", coefficients, coarse, self._small)
        maps = prior[0]
        size = maps.shape[-1]
        flow = maps[:2] + cv2.resize(change, (size, size), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
        frame = warp_levels(self._image, flow, maps)
        rows, columns = (slice(s.start * size // CROP, s.stop * size // CROP) for s in self._roi)
        apertures = np.ascontiguousarray(maps[2 : 2 + 2 * APERTURES, rows, columns])[None]
        known = self._warped_map(flow, rows, columns)[None]
        lines = _pairs(frame, self._roi)
        levels = cv2.merge(lines).view(np.uint8)[None]
        (region,) = self._infer("region", levels, apertures, sigma, self._codes, known)
        for line, drawn in zip(lines, (region[0, ..., :6], region[0, ..., 6:]), strict=True):
            line[:] = drawn.view(np.uint16)
        return frame

    def _warped_map(self, flow: Floats, rows: slice, columns: slice) -> Floats:
        """The region of E_w's map of the portrait, warped (h, w, C)."""
        place = flow[:, rows, columns].transpose(1, 2, 0) * np.float32(flow.shape[-1] / 2)
        place += _identity(flow.shape[-1])[rows, columns]
        warped = cv2.remap(self._fine, place, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return np.asarray(warped, np.float32)
