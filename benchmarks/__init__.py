"""Timings of detr_fast against other implementations: ``python -m benchmarks.run --help``."""
