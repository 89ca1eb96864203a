"""What can be asked for: typed settings, YAML, and the command line. Free of torch."""
