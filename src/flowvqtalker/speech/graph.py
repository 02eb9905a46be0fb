"""The speech encoder's transformer for one frame at a time, as a graph of OpenVINO.

A frame is two rows, so torch's small operations take longer than its products. The graph reads the same int8 weights.
"""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker.runtime import load_openvino, openvino_core
from flowvqtalker.speech.blocks import STEPS, AttentiveBlock
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.speech.quantize import QuantizedConvolution, QuantizedLinear

__all__ = ["EncoderGraph"]

Floats = npt.NDArray[np.float32]


def _floats(value: Tensor) -> Floats:
    array: Floats = value.detach().float().contiguous().numpy()
    return array


class EncoderGraph:
    """A compiled :class:`~flowvqtalker.speech.encoder.SpeechEncoder` up to its join.

    Inputs: a window (80, 7); of each layer keys and values of the frames before, (2 n, dim), and, if the layer looks
    ahead, the frame that it completes and that one's queries, (2, dim). Outputs: the join's (1, width); of each layer
    the new keys and values, frame and queries, (2, dim).

    Arguments:
        encoder: quantized, see :func:`flowvqtalker.speech.quantize.quantize`.

    Raises:
        ImportError: if OpenVINO is not installed.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        openvino = load_openvino()
        self._op = openvino.opset13
        self.config = config = encoder.config
        self.held = config.back + config.ahead
        window = self._input(config.mels, config.columns)
        inputs, outputs = [window], []
        x = self._embed(encoder, window)
        for block in list(encoder.blocks)[: config.attention]:
            keys, values = (self._input(STEPS * self.held, config.dim) for _ in range(2))
            late = [self._input(STEPS, config.dim) for _ in range(2)] if config.ahead else []
            inputs += [keys, values, *late]
            x, new = self._layer(cast("AttentiveBlock", block), x, keys, values, late)
            outputs += new
        _, norm, linear, last = encoder.join
        flat = self._op.reshape(x, np.array([1, STEPS * config.dim]), False)
        joined = self._norm(last, self._linear(linear, self._norm(norm, flat)))
        model = openvino.Model([self._op.result(each) for each in (joined, *outputs)], inputs)
        settings = {
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self.compiled = openvino_core().compile_model(model, "CPU", settings)

    def start(self) -> _Stream:
        """A new stream."""
        return _Stream(self)

    def _input(self, *shape: int) -> Any:
        return self._op.parameter(list(shape), np.float32)

    def _linear(self, linear: nn.Module, x: Any) -> Any:
        op = self._op
        if isinstance(linear, QuantizedLinear):
            steps = op.convert(op.constant(linear.steps.numpy()), "f32")
            weight = op.multiply(steps, op.constant(_floats(linear.scale)[:, None]))
        else:  # few weights
            assert isinstance(linear, nn.Linear | nn.Conv1d)
            weight = op.constant(_floats(linear.weight.flatten(1)))
        return op.add(op.matmul(x, weight, False, True), op.constant(_floats(cast("Tensor", linear.bias))[None]))

    def _norm(self, norm: nn.Module, x: Any) -> Any:
        assert isinstance(norm, nn.LayerNorm)
        op = self._op
        y = op.mvn(x, np.array([1]), True, norm.eps, "inside_sqrt")
        return op.add(op.multiply(y, op.constant(_floats(norm.weight)[None])), op.constant(_floats(norm.bias)[None]))

    def _convolve(self, x: Any, convolution: nn.Module) -> Any:
        """A convolution over (columns, channels) and its GELU."""
        op = self._op
        if isinstance(convolution, QuantizedConvolution):
            size, stride, product = convolution.size, convolution.stride, cast("nn.Module", convolution.product)
        else:
            assert isinstance(convolution, nn.Conv1d)
            size, stride, product = convolution.kernel_size[0], convolution.stride[0], convolution
        columns, channels = x.get_output_shape(0)
        starts = np.arange(0, columns - size + 1, stride)
        taps = op.gather(x, op.constant(starts[:, None] + np.arange(size)), op.constant(0))  # n, size, channels
        seen = op.reshape(op.transpose(taps, np.array([0, 2, 1])), np.array([len(starts), channels * size]), False)
        return op.gelu(self._linear(product, seen), "erf")

    def _embed(self, encoder: SpeechEncoder, window: Any) -> Any:
        x = self._op.transpose(window, np.array([1, 0]))
        for convolution in (encoder.first, encoder.second):
            x = self._convolve(x, convolution)
        return self._op.add(x, self._op.constant(_floats(encoder.offset)[None]))

    def _layer(self, block: AttentiveBlock, x: Any, keys: Any, values: Any, late: list[Any]) -> tuple[Any, list[Any]]:
        op, dim = self._op, self.config.dim
        y = self._norm(block.norm_attention, x)
        query = self._linear(block.query, y)
        key, value = op.split(self._linear(block.key_value, y), op.constant(1), 2).outputs()
        new = [key, value, x, query] if late else [key, value]
        x, query = late or (x, query)
        heads = [
            op.transpose(op.reshape(rows, np.array([-1, block.heads, dim // block.heads]), False), np.array([1, 0, 2]))
            for rows in (query, op.concat([keys, key], 0), op.concat([values, value], 0))
        ]
        scores = op.matmul(heads[0], heads[1], False, True)
        weights = op.softmax(op.multiply(scores, np.float32((dim // block.heads) ** -0.5)), -1)
        read = op.transpose(op.matmul(weights, heads[2], False, False), np.array([1, 0, 2]))
        x = op.add(x, self._linear(block.attended, op.reshape(read, np.array([STEPS, dim]), False)))
        hidden = op.gelu(self._linear(block.expand, self._norm(block.norm, x)), "erf")
        return op.add(x, self._linear(block.contract, hidden)), new


class _Stream:
    """A :class:`~flowvqtalker.speech.encoder.TransformerStream`."""

    def __init__(self, graph: EncoderGraph) -> None:
        config = graph.config
        self._request = graph.compiled.create_infer_request()
        self._held, self._layers = graph.held, config.attention
        shape = (STEPS * graph.held, config.dim)
        self._caches = [[np.zeros(shape, np.float32) for _ in range(2)] for _ in range(self._layers)]
        self._late: list[deque[list[Floats]]] = [deque(maxlen=config.ahead) for _ in range(self._layers)]
        self._ahead = config.ahead
        self._frame = -1

    def push(self, window: Tensor) -> Tensor:
        """See :class:`~flowvqtalker.speech.encoder.TransformerStream`."""
        if self._frame < 0:
            self._start(window)
        joined, new = self._infer(window)
        slot = slice(STEPS * (self._frame % self._held), STEPS * (self._frame % self._held + 1))
        for number, (key, value, *late) in enumerate(new):
            self._caches[number][0][slot], self._caches[number][1][slot] = key, value
            if late:
                self._late[number].append(late)
        self._frame += 1
        return torch.from_numpy(joined)

    def _start(self, window: Tensor) -> None:
        """Fill the state with copies of a window; a layer's input is known once the layer before it is filled."""
        nothing = np.zeros((STEPS, self._caches[0][0].shape[1]), np.float32)
        for late in self._late:
            late.extend([[nothing, nothing]] * self._ahead)
        for number in range(self._layers):
            key, value, *others = self._infer(window)[1][number]
            for cache, rows in zip(self._caches[number], (key, value), strict=True):
                cache[:] = np.tile(rows, (self._held, 1))
            if others:
                self._late[number].extend([others] * self._ahead)
        self._frame = 0

    def _infer(self, window: Tensor) -> tuple[Floats, list[list[Floats]]]:
        given: list[Any] = [window.numpy()]
        for caches, late in zip(self._caches, self._late, strict=True):
            given += [*caches, *(late[0] if late else [])]
        joined, *new = [rows.copy() for rows in self._request.infer(given, share_inputs=True).values()]
        each = len(new) // self._layers
        return joined, [new[i : i + each] for i in range(0, len(new), each)]
