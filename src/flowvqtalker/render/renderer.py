"""Motion to frames: a portrait prepared once, then coefficients in, pictures out, in constant memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.render.compiled import CompiledPortrait
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.region import RegionGenerated, RegionVQIG
from flowvqtalker.render.vqig import VQIG, Generated

__all__ = ["ImageGenerator", "Renderer"]

#: The paper's image generator, or the one on a region of interest.
ImageGenerator = VQIG | RegionVQIG


class Renderer:
    """Renders one portrait.

    Arguments:
        generator: an image generator with its codebook.
        face_model: the morphable model that the coefficients belong to.
        portrait: (512, 512, 3) uint8 RGB crop.
        alpha, beta0, rho0: (80,), (64,), (6,) coefficients of the portrait.
        batch_size: frames rendered at once; None is 4, and 1 with int8, where batches gain nothing.
        device: where to run.
        dtype: type of the convolutions; bfloat16 is 2-4 times as fast as float32 on recent CPUs and GPUs. int8 is for
            CPUs and generators with compiled graphs (:func:`flowvqtalker.loading.load_compiled`).
        workers: batches rendered at the same time, each with its share of torch's threads; None chooses two on a CPU
            of two cores or more, which waste less on two batches than on sharing one, and one on other devices.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        face_model: FaceModel,
        portrait: npt.NDArray[np.uint8],
        alpha: Tensor,
        beta0: Tensor,
        rho0: Tensor,
        *,
        batch_size: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        workers: int | None = None,
    ) -> None:
        if portrait.shape != (512, 512, 3) or portrait.dtype != np.uint8:
            raise ValueError(
                f"a crop of shape (512, 512, 3) and type uint8 is needed, got {portrait.shape} {portrait.dtype}"
            )
        self.device, self.dtype = torch.device(device), dtype
        self.batch_size = batch_size or (1 if dtype == torch.int8 else 4)
        threads = torch.get_num_threads()
        self.workers = workers or (min(2, threads) if self.device.type == "cpu" else 1)
        self._worker_threads = max(1, threads // self.workers)
        self.generator = generator.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.face = face_model.to(self.device)
        config = generator.config
        self.mesh = None
        if config.mesh_size is not None:
            self.mesh = MeshFlow(face_model, config.mesh_size, apertures=config.apertures).to(self.device)
        self.alpha = alpha.to(self.device, torch.float32)
        with torch.inference_mode():
            start = self.face.project(self.alpha, beta0.to(self.device).float(), rho0.to(self.device).float())[None]
            self._start = None if self.mesh is None else self.mesh.prepare(start)
            image = torch.from_numpy(portrait).to(self.device).permute(2, 0, 1)[None].float().div(127.5).sub(1)
            with self._autocast():
                self.source = self.generator.prepare(image.contiguous(memory_format=torch.channels_last))
        self._compiled: CompiledPortrait | None = None
        if dtype == torch.int8:
            compiled = getattr(generator, "compiled", None)
            if compiled is None or self._start is None or self.device.type != "cpu":
                raise ValueError("int8 needs a CPU and a generator with compiled graphs; choose float32 or bfloat16")
            self._compiled = CompiledPortrait(
                compiled, portrait, self.source, self.alpha, self._start, workers=self.workers, threads=threads
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype in (torch.bfloat16, torch.float16))

    def render(self, motion: Iterable[Motion]) -> Iterator[npt.NDArray[np.uint8]]:
        """One (512, 512, 3) uint8 RGB frame for every frame of coefficients.

        Batches are rendered in the background while the caller does something with the frames before them.

        Arguments:
            motion: consecutive blocks of any lengths. A frame is given as soon as it is drawn and asked for; about 8 to
                12 are drawn ahead. The paper's generator holds back 13 more for its window of motion.
        """
        pending: deque[Future[npt.NDArray[np.uint8]]] = deque()
        threads = torch.get_num_threads()
        try:
            # The caller's motion too: threads that wait for the next of its many small steps take the workers' time.
            torch.set_num_threads(self._worker_threads)
            with ThreadPoolExecutor(self.workers, "render", torch.set_num_threads, (self._worker_threads,)) as pool:
                for batch in _batches(motion, self.batch_size, self.generator.config.reach):
                    pending.append(pool.submit(self._batch, batch))
                    # Enough work while the caller makes the next block of motion.
                    while pending and (pending[0].done() or len(pending) > max(self.workers, 8 // self.batch_size)):
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
        finally:
            torch.set_num_threads(threads)  # each thread has its own number, but new ones begin with the last one set

    def draw(self, window: Tensor) -> npt.NDArray[np.uint8]:
        """One (512, 512, 3) frame at once, on this thread, for (2 * reach + 1, 70) coefficients around it."""
        frame: npt.NDArray[np.uint8] = self._batch(window[None])[0]
        return frame

    @torch.inference_mode()
    def _batch(self, motion: Tensor) -> npt.NDArray[np.uint8]:
        """(B, 2 * reach + 1, 70) windows to (B, 512, 512, 3) frames."""
        motion = motion.to(self.device, torch.float32)
        now = motion[:, self.generator.config.reach]
        if self._compiled is not None:
            return np.stack([self._compiled(each) for each in now])
        prior = None
        if self.mesh is not None and self._start is not None:
            target = self.face.project(self.alpha.expand(len(motion), -1), now[:, :64], now[:, 64:])
            prior = self.mesh(self._start, target)
        with self._autocast():
            image = self._image(motion, prior)
        levels = image.permute(0, 2, 3, 1).float().add(1).mul_(127.5).round_().clamp_(0, 255)
        pictures: npt.NDArray[np.uint8] = levels.to(torch.uint8).contiguous().cpu().numpy()
        return pictures

    def _image(self, motion: Tensor, prior: Tensor | None) -> Tensor:
        """The pictures (B, 3, 512, 512) that are shown."""
        return self._generated(motion, prior).image

    def _generated(self, motion: Tensor, prior: Tensor | None) -> Generated | RegionGenerated:
        found: Generated | RegionGenerated = self.generator(self.source.expand(len(motion)), motion, prior)
        return found


def _batches(motion: Iterable[Motion], size: int, reach: int) -> Iterator[Tensor]:
    """(B, 2 * reach + 1, 70) windows of up to ``size`` frames."""
    windows: list[Tensor] = []
    for window in _windows(motion, reach):
        windows.append(window)
        if len(windows) == size:
            yield torch.stack(windows)
            windows.clear()
    if windows:
        yield torch.stack(windows)


def _windows(motion: Iterable[Motion], reach: int) -> Iterator[Tensor]:
    """(2 * reach + 1, 70) windows around each frame, the first and last frame repeated beyond the ends."""
    length = 2 * reach + 1
    held: deque[Tensor] = deque(maxlen=length)
    count = 0
    for block in motion:
        for frame in torch.cat([block.expression.float().cpu(), block.pose.float().cpu()], dim=1):
            if not held:
                held.extend([frame] * reach)
            held.append(frame)
            count += 1
            if len(held) == length:
                yield torch.stack(list(held))
    if not count:
        return
    last = held[-1]
    for _ in range(reach):
        held.append(last)
        if len(held) == length:
            yield torch.stack(list(held))
