"""A neural vocoder for speech: 20 features a frame at 100 Hz to a waveform at 24 kHz.

`features` computes the features of a recording (`lpc` and `pitch` are parts of it),
`fargan` makes speech at 16 kHz from features, `bandwidth` widens it to 24 kHz, and `vocoder` is
the two in turn. Both networks are libopus' (FARGAN and BBWENet of version 1.6.1), computed here in
PyTorch and numpy with the trained weights that `release/nano2/vocoder` holds; see `NOTICE`.

A frame's features: 18 cepstral coefficients over Bark bands, the pitch (a period of p samples at
16 kHz is `log2(256 / p) - 1.5`), and the voicing (correlation at that period, less 0.5).
"""
