"""The parts of benchmarks/gpu_visit.py: a quarter of an hour on a borrowed GPU machine."""
