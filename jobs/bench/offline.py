"""The engine in this process, without Serve: the reference of an endpoint, and its baselines."""

from valle.model.codec.interface import Codes
from valle.model.text import phoneme_ids
from valle.model.valle import Synthesis
from valle.platform import audio, registry
from valle.serve.engine.offline import OfflineSynthesizer
from valle.serve.engine.request import Request

MAX_PHONEMES = 1000
"""Longest sentence, as an endpoint has it by default."""


def load_offline(model: str, slots: int, tracking_uri: str | None = None) -> OfflineSynthesizer:
    """An engine with the endpoint's default sampling; `model` is a registry URI or a folder."""
    synthesizer = registry.load_synthesizer(registry.resolve(model, tracking_uri))
    return OfflineSynthesizer(synthesizer, Synthesis(), slots=slots, max_phonemes=MAX_PHONEMES)


def encode_voice(offline: OfflineSynthesizer, recording: bytes) -> Codes:
    """The prompt `[8, P]` of a recording, cut as an endpoint cuts it."""
    wave = audio.read(recording, max_seconds=30)
    return offline.synthesizer.encode_prompt(wave, Synthesis())


def english_request(
    request_id: str, text: str, prompt: Codes, seed: int, max_frames: int
) -> Request:
    """A request for an English sentence."""
    return Request(
        id=request_id,
        phonemes=phoneme_ids(text, "en-us"),
        prompt=prompt,
        sampling=Synthesis().ar,
        max_frames=max_frames,
        seed=seed,
    )
