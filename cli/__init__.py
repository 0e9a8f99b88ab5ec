"""The command line: the one place that imports every package and puts them together."""
