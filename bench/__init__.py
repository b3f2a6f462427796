"""Measured figures: `make bench`, or `python -m bench NAME …`. Every figure comes from the run that prints it."""
