"""Recordings for tests: something that a speech detector calls speech, made in milliseconds."""

import numpy as np

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE

_FORMANTS = ((700, 1200, 2600), (300, 2300, 3000), (500, 900, 2400), (400, 2000, 2600))
"""Resonances of four vowels, in Hz."""


def speech(seconds: float, seed: int = 0) -> Wave:
    """Vowels of a falling voice, four syllables a second: peaks at half of full scale."""
    generator = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    pitch = generator.uniform(100, 140) * (1 - 0.1 * np.sin(2 * np.pi * 0.7 * time))
    phase = np.cumsum(pitch) / SAMPLE_RATE
    syllable = (time * 4).astype(int)
    formants = np.array(_FORMANTS)[(syllable + seed) % len(_FORMANTS)]
    wave = np.zeros(count)
    for harmonic in range(1, 40):
        distance = np.abs(formants - (harmonic * pitch)[:, None])
        gain = (1 / (1 + (distance / 80) ** 2)).sum(axis=1) / harmonic**0.5
        wave += gain * np.sin(2 * np.pi * harmonic * phase)
    wave *= 0.3 + 0.7 * np.sin(np.pi * (time * 4 % 1)) ** 0.5
    wave += generator.normal(0, 0.002, count)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)
