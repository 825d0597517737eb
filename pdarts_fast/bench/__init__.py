"""Measuring the search network against the published graph; behind the bench command."""
