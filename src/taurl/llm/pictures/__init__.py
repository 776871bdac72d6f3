"""Figures and pictures for the report."""
