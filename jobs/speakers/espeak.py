"""The formant synthesis of espeak-ng, through the library in the package `espeakng-loader`."""

import ctypes

import numpy as np

from valle.model.codec.interface import Wave
from valle.platform import audio


class Espeak:
    """espeak-ng's voice variants (`f2`, `m3`, ...): fast, but robotic and poorly recognized."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._rate = self._library.espeak_Initialize(
            2, 0, espeakng_loader.get_data_path().encode(), 0
        )

    def synthesize(self, text: str, voice: str, language: str) -> Wave:
        """Wave of `text` in the variant `voice`. Raises ValueError for an unknown voice."""
        parts: list[np.ndarray] = []

        def receive(samples: object, count: int, events: object) -> int:
            if samples and count > 0:
                parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        signature = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        callback = signature(receive)  # a reference keeps it alive while C code calls it
        self._library.espeak_SetSynthCallback(callback)
        if self._library.espeak_SetVoiceByName(f"{language}+{voice}".encode()):
            raise ValueError(f"espeak has no voice {language}+{voice}")
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
        wave = np.concatenate(parts).astype(np.float32) / np.float32(32768)
        return audio.trim(audio.resample(wave, self._rate))
