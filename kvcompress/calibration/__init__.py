"""Calibration: text in, statistics of every attention layer out, one decoder layer in memory at a time."""
