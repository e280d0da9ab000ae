"""The benchmark runner, its metrics and the tables made from its results."""
