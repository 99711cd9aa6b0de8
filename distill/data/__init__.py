"""Where problems and traces come from, and under which terms. Imports no torch."""
