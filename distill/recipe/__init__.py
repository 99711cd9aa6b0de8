"""The recipe: one strict, typed description of an experiment, its sections by what they describe. Imports no torch."""
