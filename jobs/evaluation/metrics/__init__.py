"""Judges of speech: who reads it, how it sounds, whose voice it is.

All work from weights inside packages, so they run on a closed network.
"""

JUDGE_RATE = 16_000
"""Sample rate every judge listens at."""
