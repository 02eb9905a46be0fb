r"""The three bijections of a flow step (section 3.2): multi-actnorm, invertible linear map, affine coupling.

Conventions, here and in :mod:`flowvqtalker.motion.flow`: every bijection works on a batch of frames ``(N, D)``.
``forward_and_logdet(x, context)`` maps data to latent (the paper's :math:`f^{-1}`) and also returns
:math:`\log|\det \partial z/\partial x|` of shape ``(N,)``; ``inverse(z, context)`` maps latent to data (the paper's
:math:`f`). :math:`\log p(x) = \log p(z) + \text{logdet}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "AffineCoupling",
    "Bijection",
    "Context",
    "CouplingTransformer",
    "CrossBlock",
    "InvertibleLinear",
    "MultiActNorm",
    "class_weights",
]

#: Added to the coupling's scale, which divides in the inverse.
SCALE_FLOOR = 1e-6
#: Added to the raw scale: a new coupling multiplies by sigmoid(2) = 0.88, near the identity.
SCALE_BIAS = 2.0


def class_weights(emotion: Tensor, classes: int) -> Tensor:
    """Emotions as class weights.

    Arguments:
        emotion: (N,) class numbers, or (N, classes) weights of sum one. Weights outside [0, 1] extrapolate: 1.5 of
            ``happy`` and -0.5 of ``neutral`` is happier than ``happy``.
        classes: number of classes C.

    Returns:
        (N, C) float weights.
    """
    if classes == 1:  # a flow without emotions
        return torch.ones(len(emotion), 1, device=emotion.device)
    if emotion.ndim == 1:
        if emotion.is_floating_point():
            raise ValueError(f"emotion must be (N,) integers or (N, {classes}) weights, got (N,) {emotion.dtype}")
        return functional.one_hot(emotion, classes).to(torch.get_default_dtype())
    if emotion.ndim != 2 or emotion.shape[1] != classes:
        raise ValueError(f"emotion must be (N,) integers or (N, {classes}) weights, got {tuple(emotion.shape)}")
    return emotion


@dataclass(frozen=True)
class Context:
    """Encoded context of N frames, shared by all steps of a flow.

    Attributes:
        tokens: (N, M, width) encoded context tokens.
        emotion: (N, C) weights of the classes.
        centre, log_scale: (N, D) of the autoregressive prior, or None.
    """

    tokens: Tensor
    emotion: Tensor
    centre: Tensor | None = None
    log_scale: Tensor | None = None

    @property
    def spread(self) -> Tensor:
        """(N, C) weights for scales: ``emotion`` made convex. Means can be extrapolated; standard deviations
        extrapolated through all steps grow exponentially."""
        inside = self.emotion.clamp(0, 1)
        return inside / inside.sum(-1, keepdim=True)

    def __getitem__(self, index: Tensor | slice) -> Context:
        given = (self.tokens, self.emotion, self.centre, self.log_scale)
        return Context(*(None if part is None else part[index] for part in given))  # type: ignore[arg-type]


class Bijection(nn.Module, ABC):
    """An invertible map of (N, D) given a context."""

    @abstractmethod
    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Data to latent (N, D), and log|det ∂z/∂x| (N,)."""

    @abstractmethod
    def inverse(self, z: Tensor, context: Context) -> Tensor:
        """Latent to data (N, D)."""


class MultiActNorm(Bijection):
    r"""Multi-actnorm: :math:`h' = (\beta - \mu_e) / \delta_e` with a mean and a scale for each emotion.

    All classes start at the mean and scale of the first training batch (which must mix the emotions) and diverge in
    training; that keeps classes with little data from overfitting. Whether they were initialised is a buffer, so
    checkpoints keep it. Between classes, means and log-scales are interpolated.

    Arguments:
        dim: D.
        classes: number of emotions C.
    """

    initialised: Tensor

    def __init__(self, dim: int, classes: int = 1) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, dim))
        self.log_scale = nn.Parameter(torch.zeros(classes, dim))
        self.register_buffer("initialised", torch.tensor(False))
        self._known = False  # a copy of the buffer: reading that every time would stall a GPU

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Give every class the mean and the standard deviation of a batch (N, D)."""
        deviation = x.std(0, unbiased=False) if len(x) > 1 else torch.ones_like(x[0])
        self.mean.copy_(x.mean(0).expand_as(self.mean))
        self.log_scale.copy_(deviation.clamp_min(1e-3).log().expand_as(self.log_scale))
        self.initialised.fill_(True)

    def statistics(self, context: Context) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of each frame, both (N, D)."""
        if len(self.mean) == 1:
            return self.mean, self.log_scale
        return context.emotion @ self.mean, context.spread @ self.log_scale

    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if self.training and not self._known:
            if not self.initialised:
                self.initialise(x)
            self._known = True
        mean, log_scale = self.statistics(context)
        return (x - mean) * torch.exp(-log_scale), -log_scale.sum(-1).expand(len(x))

    def inverse(self, z: Tensor, context: Context) -> Tensor:
        mean, log_scale = self.statistics(context)
        return z * torch.exp(log_scale) + mean


class InvertibleLinear(Bijection):
    r"""Invertible 1x1 convolution :math:`h'' = W h'`, which for a vector is a matrix product.

    ``lu``: :math:`W = P L (U + \operatorname{diag}(\sigma \exp s))` with fixed P and signs σ (Glow, arXiv 1807.03039,
    section 3.2): the log-determinant is Σ s and the inverse two triangular solves. ``full``: W itself. Starts at a
    random rotation.

    Arguments:
        dim: D.
        kind: "lu" or "full".
        generator: of the random rotation.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, dim: int, kind: str = "lu", generator: torch.Generator | None = None) -> None:
        super().__init__()
        if kind not in ("lu", "full"):
            raise ValueError(f"kind must be 'lu' or 'full', got {kind!r}")
        self.dim, self.kind = dim, kind
        rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        dtype = torch.get_default_dtype()
        if kind == "full":
            self.weight = nn.Parameter(rotation.to(dtype))
            return
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", p.argmax(1))  # row i of W is row permutation[i] of L U
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U of the LU form, both (D, D)."""
        lower = self.lower.tril(-1) + torch.eye(self.dim, dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())

    def matrix(self) -> Tensor:
        """W, (D, D)."""
        if self.kind == "full":
            return self.weight
        lower, upper = self.factors()
        product: Tensor = lower @ upper
        return product[self.permutation]

    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        logdet = torch.linalg.slogdet(self.weight)[1] if self.kind == "full" else self.log_diagonal.sum()
        return x @ self.matrix().mT, logdet.expand(len(x))

    def inverse(self, z: Tensor, context: Context) -> Tensor:
        if self.kind == "full":
            solution: Tensor = torch.linalg.solve(self.weight, z.mT)
            return solution.mT
        lower, upper = self.factors()
        unpermuted = z[:, torch.argsort(self.permutation)].mT
        half = torch.linalg.solve_triangular(lower, unpermuted, upper=False, unitriangular=True)
        solution = torch.linalg.solve_triangular(upper, half, upper=True)
        return solution.mT

    @torch.no_grad()
    def inverse_matrix(self) -> Tensor:
        """W⁻¹ (D, D), computed in float64, for sampling with fixed weights."""
        matrix = self.matrix()
        inverse: Tensor = torch.linalg.inv(matrix.double())
        return inverse.to(matrix.dtype)


class CrossBlock(nn.Module):
    """A pre-norm transformer block in which query tokens read a memory.

    Arguments:
        width: size of a token.
        heads: attention heads; must divide the width.
        hidden: hidden size of the two-layer perceptron.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.merge = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """
        Arguments:
            x: (N, Q, width) query tokens.
            memory: (N, M, width) tokens to attend to.

        Returns:
            (N, Q, width).
        """
        query = self.query(self.norm_attention(x)).unflatten(-1, (self.heads, -1))  # N Q H d
        key, value = (f(memory).unflatten(-1, (self.heads, -1)) for f in (self.key, self.value))  # N M H d
        if query.shape[1] == 1:  # for one query, sums of products are faster than batched matrix products
            score = (query * key).sum(-1, keepdim=True) * query.shape[-1] ** -0.5  # N M H 1
            read = (torch.softmax(score, dim=1) * value).sum(1, keepdim=True)
        else:
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            read = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        x = x + self.merge(read.flatten(2))
        change: Tensor = self.contract(functional.gelu(self.expand(self.norm_mlp(x)), approximate="tanh"))
        return x + change


class CouplingTransformer(nn.Module):
    """The transformer 𝓕 of eq. 5: from one half of a frame and the context to shift and scale of the other half.

    The half is one token that attends to the context's tokens. The context encoder has mixed those already, once for
    all steps, so only the half's token is computed here; the residual path stands for attention to itself.

    Arguments:
        inputs: size of the half.
        outputs: size of the result.
        width, heads, layers: of the transformer; tokens of the context have the same width.
    """

    def __init__(self, inputs: int, outputs: int, width: int, heads: int, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads, 2 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def each_block(self) -> list[CrossBlock]:
        """The transformer blocks in order."""
        return cast("list[CrossBlock]", list(self.blocks))

    def forward(self, half: Tensor, tokens: Tensor) -> Tensor:
        """(N, inputs) and (N, M, width) to (N, outputs)."""
        x = self.embed(half)[:, None]
        for block in self.each_block():
            x = block(x, tokens)
        result: Tensor = self.out(self.norm(x[:, 0]))
        return result


class AffineCoupling(Bijection):
    r"""Affine coupling, eq. 5: :math:`t, s = \mathcal F(h_1, c)`; :math:`h = [h_1, (h_2 + t) \odot s]`.

    The scale is sigmoid(raw + 2) + 1e-6, as in Glow and the motion flows that the paper builds on. The last layer
    starts at zero: a new step shifts nothing and scales evenly.

    Arguments:
        dim: D; the first ``dim // 2`` values are ``h_1``.
        width, heads, layers: of the transformer.
    """

    def __init__(self, dim: int, width: int, heads: int = 4, layers: int = 1) -> None:
        super().__init__()
        self.first = dim // 2
        self.net = CouplingTransformer(self.first, 2 * (dim - self.first), width, heads, layers)

    def shift_and_scale(self, half: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Shift t and scale s of the second half, both (N, D - D // 2)."""
        shift, raw = self.net(half, context.tokens).chunk(2, dim=-1)
        return shift, torch.sigmoid(raw + SCALE_BIAS) + SCALE_FLOOR

    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        first, second = x[:, : self.first], x[:, self.first :]
        shift, scale = self.shift_and_scale(first, context)
        return torch.cat([first, (second + shift) * scale], dim=-1), scale.log().sum(-1)

    def inverse(self, z: Tensor, context: Context) -> Tensor:
        first, second = z[:, : self.first], z[:, self.first :]
        shift, scale = self.shift_and_scale(first, context)
        return torch.cat([first, second / scale - shift], dim=-1)
