"""Numbers that several modules must agree on: special ids, codebooks, hop, rates.

Legend of `model/`: B batch, L phonemes, T frames, Q codebooks, D width, V codes.
"""

from typing import Final

SAMPLE_RATE: Final = 24_000
"""Samples per second of every waveform in the system (EnCodec 24 kHz)."""

HOP: Final = 320
"""Samples per code frame: the product of EnCodec's strides 2, 4, 5 and 8."""

FRAME_RATE: Final = SAMPLE_RATE // HOP
"""Code frames per second: 75."""

N_CODEBOOKS: Final = 8
"""Residual codebooks per frame at 6 kbps."""

CODEBOOK_SIZE: Final = 1024
"""Entries of each codebook; codes are 0 .. 1023."""

NULL_CODE: Final = 0
"""Code of every codebook and frame of a null prompt, for classifier-free guidance."""

EOS: Final = CODEBOOK_SIZE
"""End of speech: the one extra class of the AR model's first codebook."""
