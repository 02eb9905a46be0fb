"""Error correction of the watermark: the rate 1/2 convolutional code of constraint length 7, soft Viterbi decoding.

Generators 171 and 133 (octal), the code of CCSDS 131.0-B and IEEE 802.11; six zero bits end the message.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CODE_BITS", "MESSAGE_BITS", "decode", "encode"]

MESSAGE_BITS = 64
_MEMORY = 6
_GENERATORS = (0o171, 0o133)
#: Length of a code word.
CODE_BITS = 2 * (MESSAGE_BITS + _MEMORY)


def _outputs() -> NDArray[np.float32]:
    """Code bits as ±1 for each register content, (128, 2). A register is the newest bit followed by the state."""
    registers = np.arange(2 ** (_MEMORY + 1))
    parity = [[bin(register & generator).count("1") % 2 for generator in _GENERATORS] for register in registers]
    return (1 - 2 * np.array(parity)).astype(np.float32)


_OUTPUTS = _outputs()


def encode(message: int) -> NDArray[np.float32]:
    """Code word of a message of 64 bits: (140,) of ±1, where +1 stands for the bit 0."""
    if not 0 <= message < 2**MESSAGE_BITS:
        raise ValueError(f"a message has {MESSAGE_BITS} bits, got {message}")
    state, word = 0, []
    for place in range(MESSAGE_BITS + _MEMORY):
        bit = (message >> (MESSAGE_BITS - 1 - place)) & 1 if place < MESSAGE_BITS else 0
        register = bit << _MEMORY | state
        word.append(_OUTPUTS[register])
        state = register >> 1
    return np.concatenate(word)


def decode(soft: NDArray[np.float32]) -> int:
    """The most likely message.

    Arguments:
        soft: (140,) received values; the sign says which bit, the size how sure.
    """
    states = 2**_MEMORY
    score = np.full(states, -np.inf)
    score[0] = 0.0
    # The next state is register >> 1, so registers 2s and 2s + 1 lead to state s.
    registers = np.arange(2 * states).reshape(states, 2)
    chosen = []
    for pair in np.asarray(soft, float).reshape(-1, 2):
        arriving = score[registers % states] + (_OUTPUTS @ pair)[registers]
        best = arriving.argmax(1)
        score = arriving[np.arange(states), best]
        chosen.append(registers[np.arange(states), best])
    state, bits = 0, []
    for step in reversed(chosen):
        register = int(step[state])
        bits.append(register >> _MEMORY)
        state = register % states
    message = 0
    for bit in bits[::-1][:MESSAGE_BITS]:
        message = message << 1 | bit
    return message
