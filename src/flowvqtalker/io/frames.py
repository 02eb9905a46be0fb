"""Decoded video frames -> upright 8-bit RGB in sRGB colours, without interlacing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from flowvqtalker.io.colour import is_srgb, to_srgb
from flowvqtalker.io.image import ImageArray

__all__ = ["FrameReader", "deinterlaced"]

_UNSTATED, _BT709 = 2, 1  # FFmpeg's numbers of matrices


class FrameReader:
    """Decoded frames as upright sRGB images with square pixels, all of the size of the first.

    Arguments:
        stream: the video track.
    """

    def __init__(self, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        # One converter for all frames: setting it up takes twenty times as long as a conversion.
        self._converter = VideoReformatter()
        self._context = stream.codec_context
        self._stretch = Fraction(stream.sample_aspect_ratio or 1)
        self._size: tuple[int, int] | None = None

    def shape(self, frame: Any) -> tuple[int, int]:
        """Height and width of a frame's image."""
        width, height = self._stored(frame)
        return (width, height) if _turn(frame)[0] % 2 else (height, width)

    def _stored(self, frame: Any) -> tuple[int, int]:
        """Width and height with square pixels, before the frame is turned."""
        wide, tall = max(self._stretch, Fraction(1)), max(1 / self._stretch, Fraction(1))
        return max(1, round(frame.width * wide)), max(1, round(frame.height * tall))

    def image(self, frame: Any) -> ImageArray:
        """Pixels of a frame, (H, W, 3) uint8."""
        self._size = self._size or self._stored(frame)
        described = self._context.color_primaries, self._context.color_trc
        # Players take HD without a stated matrix for BT.709, FFmpeg for BT.601.
        unstated = frame.colorspace == _UNSTATED and (frame.width >= 1280 or frame.height > 576)
        matrix = _BT709 if unstated and frame.format.name.startswith("yuv") else None
        plain = is_srgb(*described)
        pixels: Any = self._converter.reformat(
            frame, *self._size, "rgb24" if plain else "rgb48le", src_colorspace=matrix
        ).to_ndarray()
        turns, mirrored = _turn(frame)
        pixels = np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirrored else pixels, turns))
        return to_srgb(pixels, *described) if not plain else np.asarray(pixels, np.uint8)


def deinterlaced(frames: Iterable[Any]) -> Iterator[Any]:
    """Decoded frames, as many as before; interlaced ones keep their first field (FFmpeg's bwdif)."""
    import av

    graph: Any = None
    kind: Any = None
    for frame in frames:
        former, kind = kind, (frame.width, frame.height, frame.format.name)
        if graph is not None and kind != former:
            yield from _pulled(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            with contextlib.suppress(av.FFmpegError):  # three pixels wide, or a format without fields
                graph = _bwdif(frame)
        if graph is None:
            yield frame
        else:
            yield from _pulled(graph, frame)
    if graph is not None:
        yield from _pulled(graph, None)


def _bwdif(frame: Any) -> Any:
    from av.filter import Graph

    graph = Graph()
    base = frame.time_base or Fraction(1, 1000)
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: Any, frame: Any) -> Iterator[Any]:
    """What a filter has ready after a frame, or at the end."""
    import av

    graph.push(frame)
    with contextlib.suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def _turn(frame: Any) -> tuple[int, bool]:
    """How a frame is shown: mirrored left to right first or not, then this many quarter turns counter-clockwise."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know a kind of data that FFmpeg found
        data = None
    if data is None:
        return (getattr(frame, "rotation", 0) // 90) % 4, False
    # FFmpeg's matrix brings (x, y) to (a x + c y, b x + d y), with y downwards.
    a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).astype(np.float64)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return round(np.degrees(np.arctan2(-b, a)) / 90) % 4, bool(mirrored)
