"""The tasks of the benchmark, a file a noun."""
