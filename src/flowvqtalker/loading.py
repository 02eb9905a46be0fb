"""From weights on disk to the parts of a :class:`~flowvqtalker.pipeline.Talker`, on the right device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.motion.flow import ExpFlow, Flow, PoseFlow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.render.compiled import CompiledGenerator
from flowvqtalker.render.region import RegionConfig, RegionVQIG
from flowvqtalker.render.renderer import ImageGenerator
from flowvqtalker.render.vqig import VQIG, VQIGConfig
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.graph import EncoderGraph
from flowvqtalker.speech.quantize import quantize
from flowvqtalker.speech.voice import VoiceEmotion

__all__ = [
    "build_generator",
    "choose_device",
    "choose_dtype",
    "compiled_from",
    "fast_dtype",
    "load_compiled",
    "load_face_model",
    "load_flow",
    "load_flows",
    "load_generator",
    "load_live_encoder",
    "load_speech_encoder",
    "load_voice",
    "render_dtype",
]

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Flow)

_ADDRESS_SPACE = 2.4  # GB; too little for `animate` on two cores, 2.8 were enough


def _check_memory() -> None:
    """Raise a :class:`UserError` under a limit of address space that is surely too small: native libraries abort."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit <= _ADDRESS_SPACE * 1e9:
        raise UserError(
            f"the address space is limited to {limit / 1e9:.1f} GB, and more than {_ADDRESS_SPACE} GB are needed; "
            "raise the limit with `ulimit -v`"
        )


def choose_device(device: str = "auto") -> torch.device:
    """The device for a name.

    Arguments:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` (or ``cuda:1``) or ``mps``.

    Raises:
        UserError: if the name is unknown or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or not (index or "0").isdigit():
        raise UserError(f"unknown device {device!r}; choose one of auto, cpu, cuda, mps")
    if int(index or 0) >= there[kind]:
        raise UserError(
            f"device {device!r} is not available; choose auto or cpu (`flowvqtalker doctor` lists the devices)"
        )
    return torch.device(device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor computes with it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Emulated on other CPUs, where it is many times slower than float32.
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in checks) else torch.float32
    return torch.float32


def render_dtype(generator: ImageGenerator, device: torch.device) -> torch.dtype:
    """The fastest type for an image generator: int8 on a CPU where it has compiled graphs, else :func:`fast_dtype`."""
    compiled = device.type == "cpu" and getattr(generator, "compiled", None) is not None
    return torch.int8 if compiled else fast_dtype(device)


def choose_dtype(dtype: str | torch.dtype = "auto") -> torch.dtype | None:
    """A floating point type by name; None for ``auto``, the fastest on the device (:func:`fast_dtype`).

    Raises:
        UserError: if the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    kinds = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(kinds)}")
    return kinds[dtype]


def load_face_model(path: str | Path | None = None) -> FaceModel:
    """The face model of a folder of weights."""
    tensors, _ = weights.load("face_model", path)
    try:
        return FaceModel.from_tensors(tensors, "the file")
    except UserError as error:
        raise weights.mismatch("face_model", str(error), path) from error


def load_speech_encoder(
    path: str | Path | None = None, *, exact: bool = False, name: str = "speech_encoder"
) -> SpeechEncoder:
    """The speech encoder of a folder of weights.

    Arguments:
        exact: compute in float32; otherwise in bfloat16 and int8 where the processor has them, which is faster and
            differs from one kind of processor to another.
        name: of its weights.
    """
    tensors, config = weights.load(name, path)
    try:
        speech_encoder = SpeechEncoder(SpeechEncoderConfig(**config))
    except (ValueError, TypeError) as error:
        raise weights.mismatch(name, str(error), path) from error
    kept = {key.removeprefix("audio."): value for key, value in tensors.items() if key.startswith("audio.")}
    weights.restore(speech_encoder, kept, name, path)
    if exact:
        return speech_encoder.eval()
    speech_encoder = speech_encoder.to(fast_dtype(torch.device("cpu"))).eval()
    if speech_encoder.offset.dtype == torch.bfloat16:
        quantize(speech_encoder)
        for part in (*speech_encoder.blocks[speech_encoder.config.attention :], speech_encoder.final):
            part.float()  # small products, which are slower in bfloat16
        try:
            speech_encoder.graph = EncoderGraph(speech_encoder)
        except ImportError:
            logger.debug("OpenVINO is not installed; torch encodes the speech")
    return speech_encoder


def load_live_encoder(path: str | Path | None = None, *, exact: bool = False) -> SpeechEncoder | None:
    """The speech encoder with a short look-ahead, whose features the flows take as they take the long one's.

    None if the flows hear with encoders of their own, or if there is none that was made from theirs: then live speech
    is delayed by the look-ahead of the encoder that there is.
    """
    flow = weights.manifest(path).get("expflow.safetensors")
    if flow is None or flow.config.get("speech_encoder") is not True:
        return None
    place = weights.place("speech_encoder", path)
    if "speech_encoder_live.safetensors" not in weights.manifest(place, own=True):
        logger.warning("%s holds no speech_encoder_live; live speech is delayed by 252 ms", place)
        return None
    return load_speech_encoder(place, exact=exact, name="speech_encoder_live")


def load_voice(path: str | Path | None = None) -> VoiceEmotion | None:
    """What hears the emotion of a voice; None if the folder holds none."""
    (name,) = weights.VOICE
    if f"{name}.safetensors" not in weights.manifest(weights.folder(path)):
        return None
    tensors, config = weights.load(name, path)
    voice = VoiceEmotion(**config)
    weights.restore(voice, tensors, name, path)
    return voice.eval()


def load_flow(
    kind: type[F], name: str, path: str | Path | None = None, speech_encoder: SpeechEncoder | None = None
) -> tuple[F, LatentBank | None]:
    """A flow and, if the file holds one, its bank of latents.

    Arguments:
        kind, name: its class, and the name of its weights.
        path: folder of weights; None is the package's own.
        speech_encoder: what it hears with, if it does, so that two flows can share one; None loads it.
    """
    tensors, config = weights.load(name, path)
    hears = bool(config.get("speech_encoder", False))
    try:
        flow = kind.load(tensors, config, (speech_encoder or load_speech_encoder(path)) if hears else None)
        bank = LatentBank.load(tensors)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise weights.mismatch(name, str(error).splitlines()[-1].strip(), path) from error
    return flow, bank


def load_flows(path: str | Path | None = None, *, exact: bool = False) -> tuple[ExpFlow, PoseFlow, LatentBank | None]:
    """The two flows of a folder of weights, which share their speech encoder, and the bank of latents.

    Arguments:
        exact: see :func:`load_speech_encoder`.
    """
    hears = bool(weights.load("expflow", path)[1].get("speech_encoder", False))
    expflow, bank = load_flow(
        ExpFlow, "expflow", path, load_speech_encoder(path, exact=True) if exact and hears else None
    )
    speech_encoder = expflow.audio if isinstance(expflow.audio, SpeechEncoder) else None
    poseflow, _ = load_flow(PoseFlow, "poseflow", path, speech_encoder)
    return expflow, poseflow, bank


def build_generator(config: Mapping[str, Any]) -> ImageGenerator:
    """An untrained image generator: the one on a region of interest if the codebook has one, else the paper's.

    Raises:
        ValueError, TypeError, KeyError: if the configuration is not one of these.
    """
    if "roi" in config["codebook"]:
        return RegionVQIG(RegionConfig.from_dict(dict(config)))
    return VQIG(VQIGConfig.from_dict(dict(config)))


def load_generator(path: str | Path | None = None, *, compiled: bool = False) -> ImageGenerator:
    """The image generator; its frozen E_h, C and D_h are in the file of the codebook.

    Arguments:
        compiled: give it its compiled graphs (:func:`load_compiled`), which draw in int8 on CPUs.

    Raises:
        UserError: if the weights cannot be used, or `ulimit -v` leaves too little memory.
    """
    _check_memory()
    codebook, codebook_config = weights.load("codebook", path)
    tensors, config = weights.load("vqig", path)
    try:
        generator = build_generator(config)
        trained = type(generator.config.codebook).from_dict(codebook_config)
    except (ValueError, TypeError, KeyError) as error:
        raise weights.mismatch("vqig", str(error), path) from error
    if trained != generator.config.codebook:
        raise weights.mismatch("vqig", "it was trained on a codebook of another configuration", path)
    weights.restore(generator.autoencoder, codebook, "codebook", path)
    frozen = {f"autoencoder.{key}": value for key, value in generator.autoencoder.state_dict().items()}
    weights.restore(generator, {**frozen, **tensors}, "vqig", path)
    if compiled and isinstance(generator, RegionVQIG):
        generator.compiled = load_compiled(path)
    return generator.eval()


def compiled_from(entries: Mapping[str, weights.Entry]) -> dict[str, str]:
    """What a compiled generator must have been made from: file name -> sha256."""
    names = (f"{name}.safetensors" for name in ("codebook", "vqig", "face_model"))
    return {name: entries[name].sha256 for name in names if name in entries}


def load_compiled(path: str | Path | None = None) -> CompiledGenerator | None:
    """The compiled image generator of a folder of weights; None without OpenVINO, or where there is none for them."""
    entries = weights.manifest(path)
    entry, made_from = entries.get(f"{weights.COMPILED}.safetensors"), compiled_from(entries)
    if entry is None or not made_from.items() <= entry.config.items():
        return None
    config = RegionConfig.from_dict(entries["vqig.safetensors"].config)
    try:
        return CompiledGenerator(weights.load(weights.COMPILED, path)[0], config)
    except ImportError:
        return None
