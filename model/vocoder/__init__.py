"""A neural vocoder for speech: 20 features per frame at 100 Hz to a waveform at 24 kHz.

`features` computes the features of a recording, with `lpc` and `pitch`. `fargan` synthesizes speech
at 16 kHz from features, `bandwidth` extends it to 24 kHz, and `vocoder` runs both. The networks are
FARGAN and BBWENet of libopus 1.6.1, implemented in PyTorch and numpy, with the trained weights in
`release/nano2/vocoder`; see `NOTICE`.

The features of a frame are 18 cepstral coefficients over Bark bands, the pitch
(`log2(256 / p) - 1.5` for a period of p samples at 16 kHz), and the voicing (correlation at that
period, minus 0.5).
"""
