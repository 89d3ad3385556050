"""More speakers from one voice: everything higher or lower, at the same pace.

Speech resampled by a factor has pitch and formants moved together, as in a longer or shorter
vocal tract; spoken slower by the same factor first, it keeps its pace. Speed perturbation counts
such copies as other speakers (Ko et al. 2015).
"""

from valle.model.codec.interface import Wave
from valle.platform import audio


def parse_factor(voice: str, name: str = "") -> float:
    """How much higher `voice` is than the engine's own: `x1.2` is 1.2, and `name` itself is 1."""
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
    """24 kHz samples of `wave` (at `rate`), `factor` times as high and as fast."""
    return audio.resample(wave, round(rate * factor))
