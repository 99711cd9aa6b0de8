"""What a recipe will take, reckoned from configs alone: no weights, no data, no GPU."""
