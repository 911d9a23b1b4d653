"""Figures with their conditions: `make bench` writes docs/results/bench.json and prints the table."""
