"""What training needs around TRL's trainer: its arguments, its rows, and the callbacks of a run."""
