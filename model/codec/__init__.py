"""Speech codecs: waveforms to residual codes and back.

`interface.py` holds the protocol, `loading.py` loads a codec by name. `encodec.py` is EnCodec,
`nano2.py` is nano 2, which quantises the features of a vocoder.
"""
