"""Images beside the clock: threads that draw them, and the rate that the machine can hold."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from flowvqtalker.constants import FPS
from flowvqtalker.io.image import ImageArray
from flowvqtalker.live.engine import Draw, LiveFrame

__all__ = ["RATES", "Drawer", "Pace"]

logger = logging.getLogger(__name__)

#: Frames per second that the engine chooses from: the share of the 25 ticks per second that get an image.
RATES = (25.0, 22.5, 20.0, 15.0, 12.5, 10.0, 5.0)
#: Images among which late ones are counted, and how many late ones are borne; one more, and the rate is lowered. Twelve
#: seconds at 25 a second: a shorter window would bear a few per cent of late images for ever.
_OBSERVED, _BORNE = 300, 5
#: Ticks without a late image after which a higher rate is tried. Doubled, up to the most, where that did not hold for
#: twice the wait: so most of the time goes to the higher rate, or few attempts are made.
_CALM, _MOST_CALM = 10 * FPS, 320 * FPS
#: Share of the time that drawing may take at a rate that is tried.
_BUSY = 0.95


class Pace:
    """Which ticks get an image. Late images are dropped; if there are many of them, the rate falls; it rises again
    after a while without any.

    Arguments:
        fps: the highest rate, one of :data:`RATES`.
    """

    def __init__(self, fps: float) -> None:
        #: Images per second now, and images that were dropped because they would have been late.
        self.fps, self.dropped = fps, 0
        self._highest = fps
        self._late: deque[bool] = deque(maxlen=_OBSERVED)
        self._drawn = 0  # the last tick with an image
        self._calm, self._quiet, self._held = _CALM, 0, _MOST_CALM  # ticks: to wait, without late ones, at this rate
        self._said = False

    def __call__(self, number: int, late: float, waiting: int, seconds: float) -> bool:
        """Whether to draw the image of a tick.

        Arguments:
            number: of the tick.
            late: seconds by which the clock is late.
            waiting: images to be done before this one is begun.
            seconds: between two images of late.
        """
        self._quiet += 1
        self._held += 1
        wanted = int((number + 1) * self.fps / FPS) > int(number * self.fps / FPS)
        if not wanted:
            return False
        behind = late > 1 / FPS or waiting > (2 if self.fps * seconds < 1 else 0)
        too_late = behind and number - self._drawn < FPS  # one a second even if nothing comes in time
        if too_late:
            self.dropped += 1
            self._quiet = 0
        else:
            self._drawn = number
        self._late.append(too_late)
        if sum(self._late) > _BORNE:
            self._fall(seconds)
        else:
            self._rise(seconds)
        return not too_late

    def _fall(self, seconds: float) -> None:
        lower = [rate for rate in RATES if rate < self.fps]
        if not lower:
            return
        self.fps = max((rate for rate in lower if rate * seconds <= _BUSY), default=RATES[-1])
        self._late.clear()
        worth_it = self._held > 2 * self._calm
        self._calm = max(self._calm // 2, _CALM) if worth_it else min(2 * self._calm, _MOST_CALM)
        level = logging.DEBUG if self._said else logging.WARNING
        self._said = True
        logger.log(level, "live: this machine is too slow for the rate; it falls to %g frames per second", self.fps)

    def _rise(self, seconds: float) -> None:
        higher = [rate for rate in RATES if self.fps < rate <= self._highest and rate * seconds <= _BUSY]
        if self._quiet < self._calm or not higher:
            return
        self.fps = max(higher)
        self._late.clear()
        self._quiet = self._held = 0
        logger.info("live: the rate rises to %g frames per second", self.fps)


class Drawer:
    """Draws images beside the clock, and passes frames on in their order.

    Where several images are drawn at once, each has as many ticks. So all frames wait that long, with or without an
    image: sound and picture come out evenly, however the drawing goes. A later image holds up the frames after it.

    Arguments:
        workers: images drawn at the same time.
        threads: of torch, for each of them.
        deliver: takes each frame, with its image if it has one.
        failed: is told what ended the drawing.
    """

    def __init__(
        self,
        workers: int,
        threads: int,
        deliver: Callable[[LiveFrame], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.workers = workers
        #: Seconds between two images of late, if there is always one to draw.
        self.seconds = 0.0
        self._deliver, self._failed = deliver, failed
        #: Ticks from the one that makes a frame to the one at whose beginning the frame is passed on.
        self.hold = workers if workers > 1 else 0
        self._frames: deque[tuple[int, LiveFrame, Future[ImageArray] | None]] = deque()
        self._released = -math.inf
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, "flowvqtalker-draw", torch.set_num_threads, (threads,))

    def __len__(self) -> int:
        """Frames that are under way."""
        return len(self._frames)

    @property
    def waiting(self) -> int:
        """Images that would have to be done before another one is begun, and that one worker draws anyway."""
        with self._lock:
            under_way = sum(image is not None and not image.done() for *_, image in self._frames)
        return max(0, under_way - self.workers + 1)

    def begin(self, number: float) -> None:
        """A tick begins: the frame that was held until then may go."""
        with self._lock:
            self._released = number - self.hold
        self._pass_on()

    def add(self, number: int, frame: LiveFrame, draw: Draw | None) -> None:
        """The frame of a tick, and what draws its image."""
        image = None if draw is None else self._pool.submit(self._timed, draw)
        with self._lock:
            self._frames.append((number, frame, image))
        if image is None:
            self._pass_on()
        else:
            image.add_done_callback(self._pass_on)

    def silence(self) -> None:
        """Take the sound out of the frames that are under way."""
        with self._lock:
            for _, frame, _ in self._frames:
                frame.audio = np.zeros_like(frame.audio)

    def close(self) -> None:
        """Finish the images that are being drawn; the others are dropped."""
        self.begin(math.inf)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pass_on(self, _: Future[ImageArray] | None = None) -> None:
        """Deliver the frames up to the first that is held or whose image is not done."""
        try:
            with self._lock:
                while self._frames:
                    number, frame, image = self._frames[0]
                    if number > self._released or (image is not None and not image.done()):
                        break
                    self._frames.popleft()
                    frame.image = None if image is None or image.cancelled() else image.result()
                    self._deliver(frame)
        except BaseException as error:
            self._failed(error)

    def _timed(self, draw: Draw) -> ImageArray:
        begun = time.perf_counter()
        image = draw()
        seconds = (time.perf_counter() - begun) / self.workers
        self.seconds += 0.1 * (seconds - self.seconds)
        return image
