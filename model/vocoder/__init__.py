"""FARGAN, the vocoder of libopus: features of a recording, and the wave of features."""
