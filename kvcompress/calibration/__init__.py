"""Calibration: text in, statistics of every attention layer out, one decoder layer in memory at a time."""

MAX_STATE_TOKENS = 16384
"""Tokens whose states are kept per layer, spread over all samples: bounds the disk space and the memory of a fit."""
