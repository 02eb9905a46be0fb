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
from flowvqtalker.motion.context import ContextEncoder, history_of
from flowvqtalker.motion.latents import build_latent
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder, SpeechEncoder

__all__ = ["ExpFlow", "ExpFlowConfig", "Flow", "FlowConfig", "FlowStep", "PoseFlow", "PoseFlowConfig", "Sequences"]

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
    """Train the means of the mixture; the paper draws them and says no more."""
    source: bool = True
    """Condition on the source's own coefficients."""
    ar_prior: bool = True
    """Start the steps from an autoregressive prediction of the frame (ours: motion.context.AutoregressivePrior); off is
    the paper."""
    has_lip_prior: bool = True
    """Subtract a linear audio-only prediction; the flow models the residual (ours); off is the paper."""
    soft_clamp: float = 9.0
    """Bound of sampled frames in standard deviations of the data: see :meth:`Flow.soft_clamp`."""
    audio: AudioConfig = field(default_factory=AudioConfig)
    """The audio encoder."""
    speech_encoder: bool = False
    """Use the pretrained, frozen speech encoder (speech.encoder.SpeechEncoder) instead of that encoder."""
    seed: int = 0
    """Of the means and of the rotations at the start."""

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


@dataclass(frozen=True)
class Sequences:
    """A batch of B sequences of T consecutive frames, all frames with their true past (teacher forcing).

    Attributes:
        frames: (B, τ + T, D); zeros before the start of a clip.
        windows: (B, lookback + T + lookahead, mels, columns); the outermost windows of a clip are repeated. Or ready
            audio features (B, T, width), where the encoder is not trained.
        emotion: (B,) class numbers or (B, C) weights.
        speech: (B,) bool; false: no sound, or hidden.
        source: (B, D), or None.
        mask: (B, T) bool; false: after the end of a clip.
    """

    frames: Tensor
    windows: Tensor
    emotion: Tensor
    speech: Tensor
    mask: Tensor
    source: Tensor | None = None


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
            needs = (
                "needs a speech encoder: give one"
                if config.speech_encoder
                else "has its own audio encoder: give no speech encoder"
            )
            raise ValueError(f"this {type(self).__name__} {needs}")
        self.config = config
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.register_buffer("data_std", torch.ones(config.dim))
        self.audio = AudioEncoder(config.audio) if speech_encoder is None else speech_encoder
        width = self.audio.config.width
        self.lip_prior = nn.Linear(width, config.dim) if config.has_lip_prior else None
        if self.lip_prior is not None:
            nn.init.zeros_(self.lip_prior.weight)
            nn.init.zeros_(self.lip_prior.bias)
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
        """A flow in eval mode from weights (any float type; ``bank.*`` is left out) and a configuration as plain
        values; with its speech_encoder, if it hears with one.

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
        """Its weights and buffers without those of a speech encoder."""
        kept = "audio." if self.config.speech_encoder else "\0"
        return {key: value for key, value in self.state_dict().items() if not key.startswith(kept)}

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        """The class of the configuration."""
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
            audio: (N, audio width) from :class:`~flowvqtalker.speech.encoder.AudioEncoder`.
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
        """Audio features (B, T, width) of ``windows`` as :class:`Sequences` has them."""
        features: Tensor = windows if windows.ndim == 3 else self.audio(windows)
        return features

    def each_step(self) -> list[FlowStep]:
        """The K steps, from data to latent."""
        return cast("list[FlowStep]", list(self.steps))

    def predict_lips(self, audio: Tensor, speech: Tensor | None = None) -> Tensor:
        """What the speech alone foretells of a frame (ours); (..., audio width) to (..., D), zeros without speech.

        The previous frames tell nearly all of the next one, so a flow on β itself learns to continue them and hardly
        listens: what it then draws wanders, and its lips do not follow the speech. A linear map of the audio features,
        taught by regression, foretells the lips; the flow models what is left, β - voice(a), and its history is what
        was left of the frames before. That is a shift of β given the context, so log p(β) is unchanged by it.
        """
        if self.lip_prior is None:
            return audio.new_zeros(*audio.shape[:-1], self.config.dim)
        foretold: Tensor = self.lip_prior(audio)
        return foretold if speech is None else foretold * speech[..., None].to(foretold.dtype)

    def residual(self, batch: Sequences, audio: Tensor | None = None) -> Sequences:
        """The batch with :meth:`predict_lips` taken off its frames; the flow's densities are those of such frames.

        The τ frames before the first have no audio features, so they are left out (zeros, as before a clip). The
        regression is not moved by the likelihood: it would learn to leave little rather than what is typical.
        """
        if self.lip_prior is None:
            return batch
        audio = self.encode_speech(batch.windows) if audio is None else audio
        size = self.config.history
        foretold = self.predict_lips(audio, batch.speech[:, None].expand(-1, audio.shape[1])).detach()
        frames = torch.cat([torch.zeros_like(batch.frames[:, :size]), batch.frames[:, size:] - foretold], dim=1)
        return dataclasses.replace(batch, frames=frames)

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
        """Draw frames (N, D); without a generator, from torch's own."""
        return self.soft_clamp(self.inverse(self.latent.sample(context.emotion, generator, temperature), context))

    def contexts(self, batch: Sequences, audio: Tensor | None = None) -> Context:
        """Contexts of the frames of ``batch`` that its mask keeps, in order: N = mask.sum()."""
        audio = self.encode_speech(batch.windows) if audio is None else audio
        keep = batch.mask
        length = keep.shape[1]
        emotion = class_weights(batch.emotion, self.config.classes).to(batch.frames)
        return self.encode(
            audio[keep],
            history_of(batch.frames, self.config.history)[keep],
            emotion[:, None].expand(-1, length, -1)[keep],
            speech=batch.speech[:, None].expand(-1, length)[keep],
            source=None if batch.source is None else batch.source[:, None].expand(-1, length, -1)[keep],
        )

    def negative_log_likelihood(self, batch: Sequences, audio: Tensor | None = None) -> Tensor:
        """-log p of each frame that the mask keeps, (N,) nats: the terms of L_exp (eq. 10) and L_pose (eq. 12)."""
        audio = self.encode_speech(batch.windows) if audio is None else audio
        batch = self.residual(batch, audio)
        targets = batch.frames[:, self.config.history :][batch.mask]
        return -self.log_prob(targets, self.contexts(batch, audio))

    def consistency(self, batch: Sequences, pairs: int, audio: Tensor | None = None) -> Tensor:
        """L_con (eq. 11): ‖(x_t - x_{t-1}) - (x̂_t - x̂_{t-1})‖₁, mean over ``pairs`` random pairs of frames of the
        batch.

        The first frame of a pair is drawn given its true past, the second given that past with the drawn frame as its
        last, as in generation. Uses torch's global generator.
        """
        size, device = self.config.history, batch.frames.device
        audio = self.encode_speech(batch.windows) if audio is None else audio
        batch = self.residual(batch, audio)  # what is taken off is the same for true and drawn frames
        rows, columns = torch.nonzero(batch.mask[:, 1:], as_tuple=True)  # column c: frames c and c + 1 of a pair
        chosen = torch.randperm(len(rows), device=device)[:pairs]
        rows, columns = rows[chosen], columns[chosen]
        span = columns[:, None] + torch.arange(size + 2, device=device)
        frames = batch.frames[rows[:, None], span]  # N, τ + 2: τ of history, the pair
        emotion = class_weights(batch.emotion[rows], self.config.classes).to(frames)
        source = None if batch.source is None else batch.source[rows]
        drawn: list[Tensor] = []
        for second in (0, 1):
            history = torch.cat([frames[:, second : size + second - len(drawn)], *(x[:, None] for x in drawn)], dim=1)
            speech = batch.speech[rows]
            context = self.encode(audio[rows, columns + second], history, emotion, speech=speech, source=source)
            drawn.append(self.inverse(self.latent.sample(emotion), context))
        true = (frames[:, size + 1] - frames[:, size]) / self.data_std
        return (true - (drawn[1] - drawn[0]) / self.data_std).abs().sum(-1).mean()

    @torch.no_grad()
    def rollout(
        self,
        windows: Tensor,
        emotion: Tensor,
        generator: torch.Generator,
        *,
        speech: Tensor | None = None,
        source: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Generate B sequences side by side, each frame given the generated ones before it (for evaluation; see
        :class:`~flowvqtalker.motion.sampler.MotionGenerator` for streams).

        Arguments:
            windows: see :class:`Sequences`.
            emotion: (B,) class numbers or (B, C) weights.
            generator: of the noise.
            speech: (B,) bool.
            source: (B, D).
            temperature: of the latent.

        Returns:
            (B, T, D).
        """
        audio = self.encode_speech(windows)
        history = audio.new_zeros(len(audio), self.config.history, self.config.dim)
        frames = []
        for t in range(audio.shape[1]):
            context = self.encode(audio[:, t], history, emotion, speech=speech, source=source)
            drawn = self.sample(context, generator, temperature)
            frames.append(drawn + self.predict_lips(audio[:, t], speech))
            history = torch.cat([history[:, 1:], drawn[:, None]], dim=1)
        return torch.stack(frames, dim=1)


class ExpFlow(Flow):
    """Expression flow: β (N, 64) given β0, speech, the previous frames and the emotion.

    The buffers ``blink`` (12, 64) and ``blink_rate`` (a minute) hold the typical blink of the training clips
    (:mod:`flowvqtalker.motion.blink`), and ``opening`` (64,) what of β parts the lips, by a scalar product.

    The buffer ``emotion_bias`` (C, 64) holds what drawn frames of each class lack of the difference to neutral that the
    training people show (:mod:`flowvqtalker.train.emotion_bias`).
    """

    blink: Tensor
    blink_rate: Tensor
    opening: Tensor
    emotion_bias: Tensor
    optional = ("emotion_bias",)

    def __init__(self, config: FlowConfig | None = None, speech_encoder: SpeechEncoder | None = None) -> None:
        super().__init__(config or ExpFlowConfig(), speech_encoder)
        self.register_buffer("blink", torch.zeros(BLINK_FRAMES, self.config.dim))
        self.register_buffer("blink_rate", torch.zeros(()))
        self.register_buffer("opening", torch.zeros(self.config.dim))
        self.register_buffer("emotion_bias", torch.zeros(self.config.classes, self.config.dim))

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        return ExpFlowConfig


class PoseFlow(Flow):
    """Head pose flow: motion (N, 6) around a clip's mean pose given speech and previous frames."""

    def __init__(self, config: FlowConfig | None = None, speech_encoder: SpeechEncoder | None = None) -> None:
        super().__init__(config or PoseFlowConfig(), speech_encoder)

    @classmethod
    def config_type(cls) -> type[FlowConfig]:
        return PoseFlowConfig


def config_from(cls: type[FlowConfig], values: dict[str, Any]) -> FlowConfig:
    """A configuration from plain values (unknown keys are refused)."""
    values = dict(values)
    if isinstance(values.get("audio"), dict):
        values["audio"] = AudioConfig(**values["audio"])
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise UserError(f"unknown settings of a flow: {', '.join(unknown)}")
    return cls(**values)
