"""Intervals, and the numbers that compare two models. Imports no torch."""
