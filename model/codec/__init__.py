"""Codecs: `interface.py` says what each can do, `loading.py` loads one by name.

EnCodec is in `encodec.py`; nano 2, which codes the features of a vocoder, is in `nano2.py`.
"""
