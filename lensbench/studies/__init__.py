"""Studies on synthetic streams, synthetic tasks and training budgets."""
