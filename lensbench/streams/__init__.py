"""The residual stream of a model: its parts, its read-out, its captured states, its random-basis null."""
