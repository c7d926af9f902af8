"""LongBench v1: its 21 data sets, LongBench-E, and their metrics."""
