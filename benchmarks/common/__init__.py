"""What the benchmarks share: the networks they run on and the form of their results."""
