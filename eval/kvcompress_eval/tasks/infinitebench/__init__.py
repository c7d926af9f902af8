"""InfiniteBench: the tasks that are generated, and their metrics."""
