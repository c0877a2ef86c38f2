"""Measurements: `python -m benchmarks --help`. Every ratio compares two programs that were timed in turns in the same run."""
