"""Strategies out of strong-model responses: asking, judging, checking for leaks."""
