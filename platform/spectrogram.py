"""Log-mel spectrograms of recordings as PNG pictures."""

import io
from collections.abc import Mapping

import numpy as np

from valle.model.codec.interface import Wave
from valle.model.tokens import SAMPLE_RATE


def spectrogram_png(wave: Wave, title: str = "") -> bytes:
    """A PNG of the log-mel spectrogram of a wave, 0 to 12 kHz."""
    return spectrograms_png({title: wave})


def spectrograms_png(waves: Mapping[str, Wave]) -> bytes:
    """A PNG with one log-mel spectrogram per wave, by title, from top to bottom."""
    import librosa
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(waves)), layout="constrained")
    grid = figure.subplots(len(waves), squeeze=False)[:, 0]
    for axes, (title, wave) in zip(grid, waves.items(), strict=True):
        padded = np.pad(wave, (0, max(0, 1024 - len(wave))))  # at least one window
        mel = librosa.feature.melspectrogram(
            y=padded, sr=SAMPLE_RATE, n_fft=1024, hop_length=256, n_mels=96
        )
        axes.imshow(
            librosa.power_to_db(mel, ref=np.max, top_db=70),
            origin="lower",
            aspect="auto",
            extent=(0.0, len(wave) / SAMPLE_RATE, 0.0, 96.0),
            cmap="magma",
        )
        axes.set(xlabel="seconds", ylabel="mel band", title=title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
