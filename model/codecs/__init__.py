"""Codecs: what every codec can do, and where one is loaded by name.

EnCodec is in `model/codec.py`; nano 2, which codes the features of a vocoder, is in `nano2.py`.
"""

from valle.model.codecs.interface import SpeechCodec, load_codec

__all__ = ["SpeechCodec", "load_codec"]
