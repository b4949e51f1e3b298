"""Measurements of every stage, run from a checkout."""
