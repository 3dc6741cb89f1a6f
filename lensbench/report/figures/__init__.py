"""The figures of a run, drawn from its tables and from nothing else."""
