"""Weights: finding, reading and writing them, whole models included."""
