"""Figures and pages, from results alone: the report as one HTML file, and the summary of a terminal."""
