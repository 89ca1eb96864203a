"""Configs: typed settings, YAML files and the command line. Does not import torch."""
