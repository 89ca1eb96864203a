"""Experiments on real photographs; docs/experiments.md has what they gave."""
