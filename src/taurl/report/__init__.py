"""Reads a run directory, writes one self-contained HTML page."""
