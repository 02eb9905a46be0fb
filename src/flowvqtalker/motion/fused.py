"""A flow's encoder and inverse for one frame at a time, in NumPy, with all that is the same for each frame precomputed.

Frame by frame, operations cost more than multiplications, and NumPy's cost a fifth of PyTorch's. So what can be one
matrix is one: multi-actnorm with the inverse linear map; queries with keys, values with the attention's output; the
weights of a layer norm with the product that follows. A layer norm's subtraction of the mean moves into the products
before it, since nothing else reads its input.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker.motion.bijections import SCALE_BIAS, SCALE_FLOOR, Context, CrossBlock
from flowvqtalker.motion.flow import Flow, FlowStep

__all__ = ["FusedFlow"]

Array = npt.NDArray[np.floating[Any]]

_GELU = math.sqrt(2 / math.pi)


class _Perceptron(NamedTuple):
    """Layer norm, linear, GELU, linear: the second half of a block. All without GELU's factor 1/2."""

    expand: Array
    expand_bias: Array
    contract: Array
    contract_bias: Array


class _Coupling(NamedTuple):
    """A coupling's transformer without its attention, which reads the context's tokens."""

    embed: Array
    embed_bias: Array
    merge_biases: list[Array]
    perceptrons: list[_Perceptron]
    out: Array
    out_bias: Array


class FusedFlow:
    """Samples of a flow for a batch of one, up to rounding, from a snapshot of the weights.

    Arguments:
        flow: the flow, on the CPU.
        emotion: (1, C) weights of the classes.
        source: (1, D), for a flow with ``config.source``.
    """

    @torch.no_grad()
    def __init__(self, flow: Flow, emotion: Tensor, source: Tensor | None = None) -> None:
        config, steps = flow.config, flow.each_step()
        self._width, self._heads, self._layers = config.width, config.heads, config.layers
        self._first = config.dim // 2
        self._std = _array(flow.data_std)
        self._soft_clamp = flow.soft_clamp
        self._encoder = _FusedEncoder(flow, source)
        blocks = [block for step in steps for block in step.coupling.net.each_block()]
        reads = [_attention(block, *_affine(block.norm_attention)) for block in blocks]
        # In one product for each layer: so small that NumPy's BLAS does not share it between threads.
        self._ask = _array(torch.stack([ask for ask, _ in reads]).flatten(1, 2))
        self._tell = _array(torch.stack([tell for _, tell in reads]))
        self._couplings = [self._prepare(step) for step in steps]
        self._linear = torch.stack([step.linear.inverse_matrix().mT for step in steps])  # K D D, transposed
        self._means = torch.stack([step.norm.mean for step in steps])  # K C D
        self._log_scales = torch.stack([step.norm.log_scale for step in steps])
        self.set_emotion(emotion)

    @torch.no_grad()
    def set_emotion(self, emotion: Tensor) -> None:
        """Change the emotion, (1, C) weights."""
        self._encoder.set_emotion(emotion)
        spread = Context(emotion[:, None], emotion).spread
        offsets = emotion @ self._means  # K 1 D
        matrices = self._linear * torch.exp(spread @ self._log_scales)
        self._affine = list(zip(_array(offsets[:, 0]), _array(matrices), strict=True))

    def _prepare(self, step: FlowStep) -> _Coupling:
        net = step.coupling.net
        blocks = net.each_block()
        weight, bias = _affine(net.norm)
        out, out_bias = weight[:, None] * net.out.weight.mT, net.out.weight @ bias + net.out.bias
        half = out.shape[1] // 2  # of the scale, for the sigmoid as a hyperbolic tangent
        out[:, half:] /= 2
        out_bias[half:] = (out_bias[half:] + SCALE_BIAS) / 2
        return _Coupling(
            _array(_centred(net.embed.weight.mT)),
            _array(_centred(net.embed.bias)),
            [_array(_merge_bias(block, block.value.bias)) for block in blocks],
            [_perceptron(block) for block in blocks],
            _array(out),
            _array(out_bias),
        )

    @torch.inference_mode()
    def __call__(self, z: Tensor, audio: Tensor, history: Tensor) -> Tensor:
        """``flow.soft_clamp(flow.inverse(z, flow.encode(audio, history, emotion, source=source)))``

        Arguments:
            z: (1, D) latent.
            audio: (1, width) audio features.
            history: (1, τ, D) previous frames, oldest first, zeros where there is none.

        Returns:
            (1, D) frame.
        """
        tokens, centre, scale = self._encoder(audio[0].numpy(), history[0].numpy() / self._std)
        layers, width = len(self._ask), self._width
        asks = (self._ask @ tokens.T).reshape(layers, width + 1, -1)  # each layer: width + 1, heads x tokens
        tells = (tokens @ self._tell).reshape(layers, -1, width)  # each layer: heads x tokens, width
        x, first = z[0].numpy(), self._first
        for number in range(len(self._couplings) - 1, -1, -1):
            part = self._couplings[number]
            y = x[:first] @ part.embed
            y += part.embed_bias
            for layer in range(self._layers):
                at = number * self._layers + layer
                y += self._read(y, asks[at], tells[at])
                y += part.merge_biases[layer]
                y += _apply(part.perceptrons[layer], y, _deviation(y))
            moved = y @ part.out
            moved /= _deviation(y)
            moved += part.out_bias
            shift, raw = moved[: len(moved) // 2], moved[len(moved) // 2 :]
            np.tanh(raw, out=raw)
            raw *= 0.5
            raw += 0.5 + SCALE_FLOOR
            other = x[first:] / raw
            other -= shift
            offset, matrix = self._affine[number]
            x = np.concatenate((x[:first], other)) @ matrix
            x += offset
        x = (x * scale + centre) * self._std
        return self._soft_clamp(torch.from_numpy(x)[None])

    def _read(self, y: Array, ask: Array, tell: Array) -> Array:
        """What a coupling's token reads from the context's tokens."""
        score = y @ ask[:-1]
        score /= _deviation(y)
        score += ask[-1]
        weights = score.reshape(self._heads, -1)
        weights -= weights.max(1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(1, keepdims=True)
        read: Array = weights.ravel() @ tell
        return read


class _FusedEncoder:
    """:class:`~flowvqtalker.motion.context.ContextEncoder` for one frame."""

    def __init__(self, flow: Flow, source: Tensor | None) -> None:
        encoder = flow.encoder
        self._heads, self._width = flow.config.heads, flow.config.width
        self._audio = _array(_centred(encoder.audio.weight.mT))
        self._frame = _array(_centred(encoder.frame.weight.mT))
        self._age = _array(_centred(encoder.age + encoder.frame.bias))
        given: list[Tensor] = [encoder.audio.bias]
        given += [] if encoder.emotion is None else [torch.zeros_like(encoder.summary)]
        if encoder.source is not None:
            if source is None:
                raise ValueError("this flow is conditioned on a source expression: give source")
            given.append(encoder.source(source / flow.data_std)[0])
        given += [torch.zeros_like(encoder.summary), encoder.summary]
        self._start = _centred(torch.stack(given) + encoder.kind)
        self._emotion = None if encoder.emotion is None else _centred(encoder.emotion)
        block = encoder.block
        weight, bias = _affine(encoder.norm_memory)
        # A key's bias adds the same to all scores of a query.
        self._memory = _array(weight[:, None] * torch.cat([block.key.weight, block.value.weight]).mT)
        weight_query, bias_query = _affine(block.norm_attention)
        shrink = (self._width // self._heads) ** -0.5
        self._query = _array(shrink * weight_query[:, None] * block.query.weight.mT)
        self._query_bias = _array(shrink * (block.query.weight @ bias_query + block.query.bias))
        self._merge = _array(_centred(block.merge.weight.mT))
        self._merge_bias = _array(_merge_bias(block, block.value.weight @ bias + block.value.bias))
        self._perceptron = _perceptron(block)
        self._norm = tuple(_array(part) for part in _affine(encoder.norm))
        prior = encoder.ar_prior
        self._prior = None
        if prior is not None:
            known = (prior.gain, prior.log_scale, prior.expand.weight.mT, prior.expand.bias)
            self._prior = [_array(part) for part in (*known, prior.contract.weight.mT / 2, prior.contract.bias)]

    def set_emotion(self, emotion: Tensor) -> None:
        """Change the emotion, (1, C) weights."""
        start = self._start.clone()
        if self._emotion is not None:
            start[1] += (emotion @ self._emotion)[0]
        self._tokens = _array(start)

    def __call__(self, audio: Array, history: Array) -> tuple[Array, Array | float, Array | float]:
        """Tokens (M, width), and centre and scale of the prior, each (D,), from audio (width,) and history (τ, D) in
        standard deviations."""
        past = history @ self._frame
        past += self._age
        x = self._tokens.copy()
        x[0] += audio @ self._audio
        x[-2] += past[-1]
        memory = np.concatenate((x[:-2], past))
        memory /= _deviation(memory)
        keys, values = (memory @ self._memory).reshape(len(memory), 2, self._heads, -1).transpose(1, 2, 0, 3)
        query = x @ self._query
        query /= _deviation(x)
        query += self._query_bias
        weights = query.reshape(len(x), self._heads, -1).transpose(1, 0, 2) @ keys.transpose(0, 2, 1)
        weights -= weights.max(2, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(2, keepdims=True)
        x += (weights @ values).transpose(1, 0, 2).reshape(len(x), -1) @ self._merge
        x += self._merge_bias
        x += _apply(self._perceptron, x, _deviation(x))
        x /= _deviation(x)
        x *= self._norm[0]
        x += self._norm[1]
        return x, *self._predict(history, x)

    def _predict(self, history: Array, tokens: Array) -> tuple[Array | float, Array | float]:
        """:class:`~flowvqtalker.motion.context.AutoregressivePrior`; the scale itself, not its logarithm."""
        if self._prior is None:
            return 0.0, 1.0
        gain, log_scale, expand, expand_bias, contract, bias = self._prior
        there = np.flatnonzero(np.abs(history).max(1))
        latest = int(there[-1]) if len(there) else -1  # no frame at all: the last gain
        shift, change = np.split(_gelu(tokens.ravel() @ expand + expand_bias) @ contract + bias, 2)
        return history[latest] * gain[latest] + shift, np.exp(log_scale[latest] + 3 * np.tanh(change / 3))


def _array(value: Tensor) -> Array:
    """A contiguous copy."""
    array: Array = value.detach().cpu().contiguous().numpy().copy()
    return array


def _centred(rows: Tensor) -> Tensor:
    """Rows without their mean, which a layer norm would subtract."""
    return rows - rows.mean(-1, keepdim=True)


def _affine(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight, norm.bias


def _deviation(y: Array) -> Any:
    """What a layer norm divides centred rows (..., width) by: a number, or (n, 1)."""
    if y.ndim == 1:
        return math.sqrt(float(y @ y) / len(y) + 1e-5)
    return np.sqrt(np.einsum("ij,ij->i", y, y) / y.dtype.type(y.shape[1]) + y.dtype.type(1e-5))[:, None]


def _gelu(x: Array) -> Array:
    """Twice the GELU (its approximation by a hyperbolic tangent)."""
    inner = x * x
    inner *= 0.044715 * _GELU
    inner += _GELU
    inner *= x
    np.tanh(inner, out=inner)
    inner += 1
    inner *= x
    return inner


def _apply(net: _Perceptron, y: Array, deviation: Any) -> Array:
    hidden = y @ net.expand
    hidden /= deviation
    hidden += net.expand_bias
    change: Array = _gelu(hidden) @ net.contract
    change += net.contract_bias
    return change


def _perceptron(block: CrossBlock) -> _Perceptron:
    weight, bias = _affine(block.norm_mlp)
    return _Perceptron(
        _array(weight[:, None] * block.expand.weight.mT),
        _array(block.expand.weight @ bias + block.expand.bias),
        _array(_centred(block.contract.weight.mT) / 2),
        _array(_centred(block.contract.bias)),
    )


def _merge_bias(block: CrossBlock, value_bias: Tensor) -> Tensor:
    """The attention's output for values of zero: the weights sum to one."""
    return _centred(block.merge.weight @ value_bias + block.merge.bias)


def _attention(block: CrossBlock, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens (M, width) of a context: ``ask @ tokens.T`` (width + 1, heads, M), the scores of a normalised query
    and, last, what its biases add; ``tokens @ tell`` (heads, M, width), what each token adds to the query."""
    heads, width = block.heads, len(weight)
    query, key, value = (part.weight.view(heads, -1, width) for part in (block.query, block.key, block.value))
    bias_query = (block.query.weight @ bias + block.query.bias).view(heads, 1, -1)
    shrink = query.shape[1] ** -0.5
    ask = torch.cat([weight[:, None] * query.mT, bias_query], dim=1) @ key * shrink  # heads, width + 1, width
    merge = block.merge.weight.mT.reshape(heads, -1, width)
    return ask.transpose(0, 1), _centred(value.mT @ merge)
