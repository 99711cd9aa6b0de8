"""What runs in the sandbox, with the standard library alone: it is put there without the rest of the kit."""
