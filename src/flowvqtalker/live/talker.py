"""The engine in time: a thread that keeps the clock, and the asynchronous interface around it."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.image import ImageArray
from flowvqtalker.live.drawing import RATES, Drawer, Pace
from flowvqtalker.live.engine import LiveEngine, LiveFrame, State
from flowvqtalker.motion.emotion import parse_emotion
from flowvqtalker.motion.options import MotionOptions, check_limits
from flowvqtalker.pipeline import Talker
from flowvqtalker.provenance import DEFAULT_MARKS, Marks

__all__ = ["RATES", "LiveTalker"]

logger = logging.getLogger(__name__)

#: Frames that may wait for a slow consumer before their images are dropped, and before the clock stops.
_IMAGES, _BACKLOG = 25, 250
#: Seconds of delay after which the clock starts anew (the machine slept), rather than catching up.
_LOST = 1.0


class LiveTalker:
    """A portrait that talks in real time.

    ::

        async with LiveTalker(talker, "portrait.jpg", MotionOptions(emotion="happy")) as live:
            live.push(pcm, 24_000)          # from any task or thread, as it arrives or all at once
            live.end_of_utterance()
            async for frame in live:        # 25 a second, without end
                show(frame.image)           # (512, 512, 3) uint8 RGB, or None: the last one stays
                play(frame.audio)           # (960,) float32, always there

    The clock is that of the sound: each tick of 40 ms gives one block of it, with the frame that belongs to it. Images
    are drawn beside the clock. One that would come late is dropped, sound never; when too many are, the rate is lowered
    and a warning says so. All methods but :meth:`set_portrait` return at once and may be called from any thread.

    Arguments:
        talker: from ``Talker.from_pretrained(components=LiveTalker.COMPONENTS)``.
        portrait: image file, (H, W, 3) uint8 RGB, or what :meth:`~flowvqtalker.pipeline.Talker.portrait` returned.
        options: of the motion; :meth:`set_emotion` changes the emotion later.
        audio_rate: samples per second of the sound that comes out; a multiple of 25.
        fps: images per second, one of :data:`RATES`.
        marks: watermark and label of the frames; see :class:`~flowvqtalker.provenance.Marks`.
        behave: breathe, look around and nod.
        clock: seconds that pass, for tests.

    Raises:
        UserError: if the portrait or an option cannot be used.
    """

    #: What the talker must be loaded with.
    COMPONENTS = ("face", "motion", "render", "live")

    def __init__(
        self,
        talker: Talker,
        portrait: str | Path | ImageArray | Portrait,
        options: MotionOptions | None = None,
        *,
        audio_rate: int = 24_000,
        fps: float = 25.0,
        marks: Marks = DEFAULT_MARKS,
        behave: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if fps not in RATES:
            raise UserError(f"fps must be one of {', '.join(f'{rate:g}' for rate in RATES)}, got {fps:g}")
        chosen = talker.resolve(options or MotionOptions())
        self._talker, self._clock = talker, clock
        self._engine = LiveEngine(
            talker, self._ready(portrait), chosen, audio_rate=audio_rate, marks=marks, behave=behave
        )
        self._pace = Pace(fps)
        self._threads = torch.get_num_threads()
        self._emotion, self._intensity = chosen.emotion, chosen.intensity
        self._commands: deque[Callable[[], None]] = deque()
        self._out: deque[LiveFrame] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._drawer: Drawer | None = None
        self._adding, self._interruptions = threading.Lock(), 0
        self._closed, self._said = False, set[str]()
        self._failure: BaseException | None = None
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    # ------------------------------------------------------------------------------------------------ what goes in

    def push(self, pcm: npt.NDArray[Any], sample_rate: int) -> None:
        """Speech to be spoken after what waits already.

        Arguments:
            pcm: (n,) or (n, channels) int16, or floating point in [-1, 1]; any n.
            sample_rate: samples per second, 8000 to 192000; may change.

        Raises:
            UserError: for samples that are NaN, of another type or scale, a wrong rate, or if ten minutes wait already.
        """
        self._check_open()
        self._engine.sound.push(pcm, sample_rate)

    def end_of_utterance(self) -> None:
        """What was pushed is complete; the last samples need not wait for more."""
        self._check_open()
        self._engine.sound.end()

    def interrupt(self) -> None:
        """Stop speaking: silent within 40 ms, the mouth shut within 200 ms. What waits is dropped."""
        self._check_open()
        self._engine.sound.clear()
        with self._adding:
            self._interruptions += 1
            self._commands.append(self._engine.interrupt)
            if self._drawer is not None:
                self._drawer.silence()
        with self._changed:
            for frame in self._out:
                frame.audio = np.zeros_like(frame.audio)

    def listen(self, listening: bool = True) -> None:
        """Whether somebody else speaks: then the portrait looks at them and nods now and then."""
        self._engine.listening = listening

    def set_emotion(self, emotion: str, intensity: float = 1.0, fade: float = 0.5) -> None:
        """Another emotion, reached in ``fade`` seconds.

        Raises:
            UserError: for an unknown emotion, a number out of range, or if the options hold an emotion track.
        """
        self.check_emotion(emotion, intensity, fade)
        self._emotion, self._intensity = emotion, intensity
        self._commands.append(lambda: self._engine.set_emotion(emotion, intensity, fade))

    def check_emotion(self, emotion: str, intensity: float = 1.0, fade: float = 0.5) -> None:
        """Raise what :meth:`set_emotion` would."""
        self._check_open()
        parse_emotion(emotion)
        check_limits(intensity=intensity)
        if not 0 <= fade <= 60:
            raise UserError(f"fade must be between 0 and 60 seconds, got {fade:g}")
        if self._engine.follows_track:
            raise UserError("the emotion follows a track; leave the track out to change it")

    def set_portrait(self, portrait: str | Path | ImageArray | Portrait) -> None:
        """Another face, from the next frame on. Finding it takes about a second: call it in a thread
        (``await asyncio.to_thread(live.set_portrait, image)``).

        Raises:
            UserError: if the portrait cannot be used; then the present one stays.
        """
        self._check_open()
        ready = self._ready(portrait)
        self._commands.append(lambda: self._engine.set_portrait(ready, self._emotion, self._intensity))

    def _ready(self, portrait: str | Path | ImageArray | Portrait) -> Portrait:
        return portrait if isinstance(portrait, Portrait) else self._talker.portrait(portrait)

    def _check_open(self) -> None:
        if self._closed:
            raise UserError("this LiveTalker is closed; make a new one")

    # ----------------------------------------------------------------------------------------------- what comes out

    @property
    def state(self) -> State:
        """Idle, listening or talking."""
        return self._engine.state

    @property
    def fps(self) -> float:
        """Images per second now; falls when the machine is too slow, and rises again when it is not."""
        return self._pace.fps

    @property
    def dropped(self) -> int:
        """Images that were dropped because they would have been late."""
        return self._pace.dropped

    @property
    def audio_rate(self) -> int:
        """Samples per second of the sound that comes out."""
        return self._engine.sound.rate

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a sample to its frame without computing: its block of 40 ms and the look-ahead."""
        return self._engine.latency_ms

    @property
    def waiting(self) -> float:
        """Seconds of speech that wait to be spoken."""
        return self._engine.sound.seconds

    @property
    def pushed(self) -> int:
        """Samples of speech pushed so far, at ``audio_rate``, without what :meth:`interrupt` dropped: the
        :attr:`LiveFrame.spoken` of the frame in which they have all sounded (after :meth:`end_of_utterance`)."""
        return self._engine.sound.pushed

    def frames(self) -> Iterator[LiveFrame]:
        """The stream for a thread without an event loop; ends when the engine is closed."""
        self.start()
        while (frame := self._next(wait=True)) is not None:
            yield frame

    async def __aiter__(self) -> AsyncIterator[LiveFrame]:
        """The stream; ends when the engine is closed."""
        self.start()
        arrived = asyncio.Event()
        self._waiting[arrived] = asyncio.get_running_loop()
        try:
            while True:
                arrived.clear()
                frame = self._next(wait=False)
                if frame is not None:
                    yield frame
                elif self._closed:
                    return
                else:
                    await arrived.wait()
        finally:
            del self._waiting[arrived]

    def _next(self, wait: bool) -> LiveFrame | None:
        with self._changed:
            while wait and not self._out and not self._closed:
                self._changed.wait()
            if self._out:
                self._changed.notify_all()
                return self._out.popleft()
            if self._failure is not None:
                raise self._failure
            return None

    # ------------------------------------------------------------------------------------------------- the clock

    def start(self) -> None:
        """Start the clock; iterating does it too."""
        self._check_open()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flowvqtalker-live", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop; an image that is being drawn is finished first."""
        with self._changed:
            self._closed = True
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        workers = self._engine.workers
        self._drawer = drawer = Drawer(workers, self._threads // workers, self._deliver, self._fail)
        torch.set_num_threads(1)  # of this thread: motion is made of many small steps
        try:
            start, number = self._clock(), 0
            while not self._closed:
                stopped = self._pause(start + number / FPS, drawer)
                drawer.begin(number)
                late = self._clock() - start - stopped - number / FPS
                if late > _LOST:
                    logger.log(self._level("lost"), "live: %.1f s behind; the clock starts anew", late)
                    stopped += late
                if stopped:
                    start += stopped
                    self._engine.sound.skip_pauses(stopped)
                while self._commands:
                    self._commands.popleft()()
                interruptions = self._interruptions
                frame, draw = self._engine.advance()
                wanted = self._pace(number, late, drawer.waiting, drawer.seconds)
                with self._adding:
                    if self._interruptions != interruptions:  # the sound was taken before
                        frame.audio = np.zeros_like(frame.audio)
                    drawer.add(number, frame, draw if wanted else None)
                number += 1
        except BaseException as error:
            self._fail(error)
        finally:
            drawer.close()
            self._closed = True
            self._wake()

    def _fail(self, error: BaseException) -> None:
        logger.error("live: the engine stopped", exc_info=error)
        self._failure, self._closed = error, True
        self._wake()

    def _pause(self, due: float, drawer: Drawer) -> float:
        """Wait until a time, and until somebody takes the frames; returns how long nobody did."""
        with self._changed:
            while not self._closed and (left := due - self._clock()) > 0:
                self._changed.wait(left)
        stopped = self._clock()
        if len(self._out) + len(drawer) < _BACKLOG:
            return 0.0
        logger.log(self._level("stopped"), "live: nobody takes the frames; the clock waits")
        drawer.begin(math.inf)
        with self._changed:
            while not self._closed and len(self._out) + len(drawer) >= _BACKLOG:
                self._changed.wait()
        return self._clock() - stopped

    def _level(self, kind: str) -> int:
        """Say things once: the level of the next message of a kind."""
        level = logging.DEBUG if kind in self._said else logging.WARNING
        self._said.add(kind)
        return level

    def _deliver(self, frame: LiveFrame) -> None:
        with self._changed:
            self._out.append(frame)
            if len(self._out) > _IMAGES:
                self._out[-_IMAGES - 1].image = None  # what waits keeps its sound
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        for arrived, loop in list(self._waiting.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.set)

    async def __aenter__(self) -> LiveTalker:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def __enter__(self) -> LiveTalker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
