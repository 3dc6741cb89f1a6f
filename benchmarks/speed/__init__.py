"""How fast lensbench fits and evaluates lenses, against the published recipe and loops, in one run on one machine."""
