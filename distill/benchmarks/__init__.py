"""Public benchmarks through lm-eval (the optional extra `benchmarks`); imports it only where it is used."""
