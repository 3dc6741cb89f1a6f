"""Tools that several probes use: heads, predictions, cross-fitted regressions, interventions."""
