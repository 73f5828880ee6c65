"""The parts of `bench/gpu_day.py`: everything that the project wants to know of a GPU, in fifteen minutes."""
