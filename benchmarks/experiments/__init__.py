"""Experiments on real photographs; docs/experiments.md gives the results."""
