"""Codecs beside EnCodec: nano 2, which codes the features of a vocoder."""
