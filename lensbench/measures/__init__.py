"""What lenses read at every layer, and what follows: transfer, indices, verdicts."""
