"""A run as jobs of a cluster: what is submitted, how each task goes, and what is left. Imports neither torch nor a stage's work."""
