"""Speed perturbation: further speakers from one voice by resampling (Ko et al. 2015).

Resampling by a factor scales pitch and formants together, like another length of the vocal tract,
and changes the pace by the same factor. A TTS engine that speaks slower by that factor first
keeps the pace.
"""

from valle.model.codec.interface import Wave
from valle.platform import audio


def parse_factor(voice: str, name: str = "") -> float:
    """Speed factor that `voice` stands for: 1.2 for `x1.2`, 1 for `name`, the engine's own voice.

    Raises ValueError for any other name, and for factors outside 0.6 to 1.6.
    """
    if name and voice == name:
        return 1.0
    try:
        factor = float(voice.removeprefix("x"))
    except ValueError:
        factor = 0.0
    if not voice.startswith("x") or not 0.6 <= factor <= 1.6:
        raise ValueError(f"voices: {voice!r} is not {f'{name} or ' if name else ''}x0.6 to x1.6")
    return factor


def perturb_speed(wave: Wave, rate: int, factor: float) -> Wave:
    """`wave`, sampled at `rate`, as 24 kHz samples with pitch and speed `factor` times as high."""
    return audio.resample(wave, round(rate * factor))
