"""What people look at afterwards: tables, plots and pages, from a run's files alone. Imports no torch."""
