"""What to run: a suite, its recipes and the files they are read from."""
