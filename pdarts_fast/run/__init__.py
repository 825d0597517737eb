"""The run directory: what a search writes, and how it is drawn and reported."""
