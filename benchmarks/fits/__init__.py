"""Fits of the figures in presets to published measurements, a script each; leave-one-out uses the same code."""
