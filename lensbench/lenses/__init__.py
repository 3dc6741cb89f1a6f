"""Lenses: affine maps, their closed forms, the search on dev, the refinement, and the exchange format."""
