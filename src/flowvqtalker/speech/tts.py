"""Text to speech without a network: eSpeak NG, whose library and voices come with the package espeakng-loader."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["speak"]

# Of espeak-ng/speak_lib.h.
_SYNCHRONOUS, _NO_EXIT, _UTF8, _RATE_PARAMETER = 2, 0x8000, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SPEEDS = (80, 450)


def speak(text: str, voice: str = "en-us", speed: int = 160) -> tuple[npt.NDArray[np.int16], int]:
    """Samples (n,) of a voice that says a text, and their rate.

    Arguments:
        text: what to say.
        voice: language, with a variant on request: ``en-us``, ``de``, ``fr+f3`` (f1 to f5 are female, m1 to m8 male).
        speed: words per minute, 80 to 450.

    Raises:
        MissingDependency: without espeakng-loader.
        UserError: if the text is empty, or there is no such voice or speed.
    """
    if not text.strip():
        raise UserError("there is nothing to say; give a text")
    if not _SPEEDS[0] <= speed <= _SPEEDS[1]:
        raise UserError(f"speed must be from {_SPEEDS[0]} to {_SPEEDS[1]} words per minute, got {speed}")
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingDependency("say needs espeakng-loader; run `pip install 'flowvqtalker[tts]'`") from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), _NO_EXIT)
    if rate <= 0:
        raise UserError("eSpeak NG cannot read its voices; run `pip install --force-reinstall espeakng-loader`")
    parts: list[npt.NDArray[np.int16]] = []

    def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int | None) -> int:
        if samples and count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(take)  # kept alive while the library may call it
    try:
        if library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"there is no voice {voice!r}; give a language such as en-us, de, fr or cmn, or en-us+f3")
        library.espeak_SetSynthCallback(callback)
        library.espeak_SetParameter(_RATE_PARAMETER, speed, 0)
        encoded = text.encode()
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, _UTF8, None, None)
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
    if not parts:
        raise UserError(f"the voice {voice!r} says nothing for this text; give words of its language")
    return np.concatenate(parts), int(rate)
