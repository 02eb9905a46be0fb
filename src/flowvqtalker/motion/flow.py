"""ExpFlow and PoseFlow: the conditional normalizing flows of section 3.2."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.motion.bijections import (
    AffineCoupling,
    Bijection,
    Context,
    InvertibleLinear,
    MultiActNorm,
    class_weights,
)
from flowvqtalker.motion.blink import BLINK_FRAMES
from flowvqtalker.motion.context import ContextEncoder
from flowvqtalker.motion.latents import build_latent
from flowvqtalker.motion.lip_prior import LipPrior
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder, SpeechEncoder

__all__ = ["ExpFlow", "ExpFlowConfig", "Flow", "FlowConfig", "FlowStep", "PoseFlow", "PoseFlowConfig"]

F = TypeVar("F", bound="Flow")


@dataclass(frozen=True)
class FlowConfig:
    """Architecture of a flow."""

    dim: int = 64
    """D of a frame."""
    classes: int = len(EMOTIONS)
    """Emotions C."""
    steps: int = 16
    """K."""
    width: int = 64
    """Size of the tokens; what a frame costs grows with its square."""
    heads: int = 4
    """Attention heads."""
    layers: int = 1
    """Transformer blocks of a coupling."""
    history: int = 10
    """τ previous frames."""
    dropout: float = 0.5
    """Data dropout: probability that a previous frame is hidden in training (0.4 to 0.7 in gesture flows)."""
    linear: Literal["lu", "full"] = "lu"
    """Form of the invertible 1x1 convolution."""
    latent: Literal["student", "gaussian-mixture", "gaussian"] = "student"
    """Latent distribution."""
    nu: float = 50.0
    """Degrees of freedom of the Student-t mixture (Studentising flows use 50)."""
    learn_means: bool = False
    """Train the means of the mixture; the paper samples them and says no more."""
    source: bool = True
    """Condition on the coefficients of the source image."""
    ar_prior: bool = True
    """Start the steps from an autoregressive prediction (ours: AutoregressivePrior); off is the paper."""
    has_lip_prior: bool = True
    """Subtract a linear audio-only prediction and model the residual (ours: motion.lip_prior); off is the paper."""
    soft_clamp: float = 9.0
    """Bound of sampled frames in standard deviations of the data: see :meth:`Flow.soft_clamp`."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """The audio encoder."""
    speech_encoder: bool = False
    """Use the pretrained, frozen speech encoder (speech.encoder.SpeechEncoder) instead of that encoder."""
    seed: int = 0
    """Seed of the means and of the initial rotations."""

    def __post_init__(self) -> None:
        sizes = (self.classes, self.steps, self.width, self.heads, self.layers, self.history)
        rules = (
            (self.dim >= 2, f"dim must be at least 2, got {self.dim}"),
            (all(size >= 1 for size in sizes), f"sizes must be positive, got {sizes}"),
            (self.width % max(self.heads, 1) == 0, f"width {self.width} must be a multiple of heads {self.heads}"),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (self.nu > 0, f"nu must be positive, got {self.nu}"),
            (self.soft_clamp > 0, f"soft_clamp must be positive, got {self.soft_clamp}"),
        )
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise UserError("flow: " + "; ".join(problems))


@dataclass(frozen=True)
class ExpFlowConfig(FlowConfig):
    """Architecture of ExpFlow: D = 64 expression coefficients, a Student-t component for each of the nine emotions."""


@dataclass(frozen=True)
class PoseFlowConfig(FlowConfig):
    """Architecture of PoseFlow: D = 6, context [a, ρ_pre], latent N(0, I)."""

    dim: int = 6
    classes: int = 1
    steps: int = 8
    width: int = 48
    latent: Literal["student", "gaussian-mixture", "gaussian"] = "gaussian"
    source: bool = False
    has_lip_prior: bool = False
    soft_clamp: float = 4.5
    audio: AudioConfig = field(default_factory=lambda: AudioConfig(width=64))


class FlowStep(Bijection):
    """One step: multi-actnorm, invertible 1x1 convolution, affine coupling."""

    def __init__(self, config: FlowConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = MultiActNorm(config.dim, config.classes)
        self.linear = InvertibleLinear(config.dim, config.linear, generator)
        self.coupling = AffineCoupling(config.dim, config.width, config.heads, config.layers)

    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        x, first = self.norm.forward_and_logdet(x, context)
        x, second = self.linear.forward_and_logdet(x, context)
        x, third = self.coupling.forward_and_logdet(x, context)
        return x, first + second + third

    def inverse(self, z: Tensor, context: Context) -> Tensor:
        z = self.coupling.inverse(z, context)
        z = self.linear.inverse(z, context)
        return self.norm.inverse(z, context)


class Flow(Bijection):
    """K steps between a frame (N, D) and a latent (N, D), with the encoders of the context.

    Frames are divided by the buffer ``data_std`` first, so that the networks see values near one.
    """

    data_std: Tensor
    #: Buffers that weights may lack.
    optional: tuple[str, ...] = ()

    def __init__(self, config: FlowConfig, speech_encoder: SpeechEncoder | None = None) -> None:
        super().__init__()
        if config.speech_encoder != (speech_encoder is not None):
            needs = "needs a speech encoder" if config.speech_encoder else "has its own encoder: give no speech encoder"
            raise ValueError(f"this {type(self).__name__} {needs}")
        self.config = config
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.register_buffer("data_std", torch.ones(config.dim))
        self.audio = AudioEncoder(config.audio) if speech_encoder is None else speech_encoder
        width = self.audio.config.width
        self.lip_prior = LipPrior(width, config.dim) if config.has_lip_prior else None
        self.encoder = ContextEncoder(
            config.dim,
            config.width,
            config.heads,
            config.history,
            width,
            classes=config.classes,
            source=config.source,
            dropout=config.dropout,
            ar_prior=config.ar_prior,
        )
        self.steps = nn.ModuleList(FlowStep(config, generator) for _ in range(config.steps))
        self.latent = build_latent(
            config.latent,
            config.dim,
            config.classes,
            seed=config.seed,
            learn_means=config.learn_means,
            nu=config.nu,
        )

    @classmethod
    def load(
        cls: type[F], state: dict[str, Tensor], config: dict[str, Any], speech_encoder: SpeechEncoder | None = None
    ) -> F:
        """A flow in eval mode from weights (of any float type; ``bank.*`` is skipped) and a plain configuration.

        Raises:
            UserError: if the weights do not fit the configuration.
        """
        flow = cls(config_from(cls.config_type(), config), speech_encoder)
        own = flow.own_state()
        given = {key: value for key, value in state.items() if not key.startswith("bank.")}
        given = {**{key: own[key] for key in cls.optional if key not in given}, **given}
        wrong = sorted(own.keys() ^ given.keys()) or [k for k in own if own[k].shape != given[k].shape]
        if wrong:
            raise UserError(f"weights do not fit the configuration of {cls.__name__}: {wrong[0]} ({len(wrong)} differ)")
        flow.load_state_dict(given, strict=False)
        return flow.eval()

    def own_state(self) -> dict[str, Tensor]:
        """Weights and buffers without those of a shared speech encoder."""
        skipped = "audio." if self.config.speech_encoder else "\0"
        return {key: value for key, value in self.state_dict().items() if not key.startswith(skipped)}

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        """Class of the configuration."""
        return FlowConfig

    def encode(
        self,
        audio: Tensor,
        history: Tensor,
        emotion: Tensor,
        *,
        speech: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Context:
        """The context of N frames.

        Arguments:
            audio: (N, width) audio features.
            history: (N, τ, D) previous frames, oldest first, zeros where there is none.
            emotion: (N,) class numbers or (N, C) weights.
            speech: (N,) bool; false: no sound.
            source: (N, D), for a flow with ``config.source``.
        """
        weights = class_weights(emotion, self.config.classes).to(history)
        scaled = None if source is None else source / self.data_std
        context: Context = self.encoder(audio, history / self.data_std, weights, speech=speech, source=scaled)
        return context

    def encode_speech(self, windows: Tensor) -> Tensor:
        """Audio features (B, T, width) of windows (B, lookback + T + lookahead, mels, columns); features pass."""
        features: Tensor = windows if windows.ndim == 3 else self.audio(windows)
        return features

    def each_step(self) -> list[FlowStep]:
        """The K steps, from data to latent."""
        return cast("list[FlowStep]", list(self.steps))

    def predict_lips(self, audio: Tensor, speech: Tensor | None = None) -> Tensor:
        """The lip prior's prediction (..., D) from audio features (..., width); zeros without a prior."""
        if self.lip_prior is None:
            return audio.new_zeros(*audio.shape[:-1], self.config.dim)
        prediction: Tensor = self.lip_prior(audio, speech)
        return prediction

    def forward_and_logdet(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        z = x / self.data_std
        logdet = -self.data_std.log().sum().expand(len(x))
        if context.centre is not None and context.log_scale is not None:
            z = (z - context.centre) * torch.exp(-context.log_scale)
            logdet = logdet - context.log_scale.sum(-1)
        for step in self.each_step():
            z, one = step.forward_and_logdet(z, context)
            logdet = logdet + one
        return z, logdet

    def inverse(self, z: Tensor, context: Context) -> Tensor:
        for step in reversed(self.each_step()):
            z = step.inverse(z, context)
        if context.centre is not None and context.log_scale is not None:
            z = z * torch.exp(context.log_scale) + context.centre
        return z * self.data_std

    def soft_clamp(self, x: Tensor) -> Tensor:
        """Limit sampled frames (..., D) to the range of the data; identity up to 60 % of ``config.soft_clamp``.

        Each sampled frame is context of the next. Without the clamp one head in ten diverged within a minute, because
        outside the data the next frame lies farther out still.
        """
        start, room = 0.6 * self.config.soft_clamp * self.data_std, 0.4 * self.config.soft_clamp * self.data_std
        size = x.abs()
        bent = torch.copysign(start + room * torch.tanh((size - start) / room), x)
        return torch.where(size > start, bent, x)

    def log_prob(self, x: Tensor, context: Context) -> Tensor:
        """log p(x | c, e) in nats (eq. 9); (N, D) to (N,)."""
        z, logdet = self.forward_and_logdet(x, context)
        return self.latent.log_prob(z, context.emotion) + logdet

    def sample(self, context: Context, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Sample frames (N, D); without a generator, from torch's own."""
        return self.soft_clamp(self.inverse(self.latent.sample(context.emotion, generator, temperature), context))


class ExpFlow(Flow):
    """Expression flow: β (N, 64) given β0, speech, the previous frames and the emotion.

    Buffers, measured on the training clips:
        ``blink`` (12, 64) and ``blink_rate`` (per minute): the typical blink (:mod:`flowvqtalker.motion.blink`).
        ``opening`` (64,): the scalar product with β parts the lips.
        ``emotion_bias`` (C, 64): correction added to the samples of each class
        (:mod:`flowvqtalker.train.emotion_bias`).
        ``neutral_map`` (64, 65): the neutral face of a portrait's person (:meth:`neutral_face`).
    """

    blink: Tensor
    blink_rate: Tensor
    opening: Tensor
    emotion_bias: Tensor
    neutral_map: Tensor
    optional = ("emotion_bias", "neutral_map")

    def __init__(self, config: FlowConfig | None = None, speech_encoder: SpeechEncoder | None = None) -> None:
        super().__init__(config or ExpFlowConfig(), speech_encoder)
        self.register_buffer("blink", torch.zeros(BLINK_FRAMES, self.config.dim))
        self.register_buffer("blink_rate", torch.zeros(()))
        self.register_buffer("opening", torch.zeros(self.config.dim))
        self.register_buffer("emotion_bias", torch.zeros(self.config.classes, self.config.dim))
        self.register_buffer("neutral_map", 0.5 * torch.eye(self.config.dim, self.config.dim + 1))

    def neutral_face(self, beta: Tensor) -> Tensor:
        """Neutral expression (..., 64) of the person who shows ``beta`` (..., 64) in a portrait (ours).

        A portrait shows a person's face and a smile or frown of the moment. The requested emotion replaces the latter,
        so the flow is conditioned on the former alone (:mod:`flowvqtalker.train.neutral_map`).
        """
        return beta @ self.neutral_map[:, :-1].mT + self.neutral_map[:, -1]

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        return ExpFlowConfig


class PoseFlow(Flow):
    """Head pose flow: motion (N, 6) around a clip's mean pose, given speech and the previous frames."""

    def __init__(self, config: FlowConfig | None = None, speech_encoder: SpeechEncoder | None = None) -> None:
        super().__init__(config or PoseFlowConfig(), speech_encoder)

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        return PoseFlowConfig


def config_from(cls: type[FlowConfig], values: dict[str, Any]) -> FlowConfig:
    """A configuration from plain values; unknown keys raise a :class:`UserError`."""
    values = dict(values)
    if isinstance(values.get("audio"), dict):
        values["audio"] = AudioConfig(**values["audio"])
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise UserError(f"unknown settings of a flow: {', '.join(unknown)}")
    return cls(**values)
