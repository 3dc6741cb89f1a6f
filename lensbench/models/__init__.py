"""Models: the families that lensbench trains, and pretrained models of others."""

from lensbench.models.families import FAMILIES, Family, build, count_parameters, fitting_width

__all__ = ["FAMILIES", "Family", "build", "count_parameters", "fitting_width"]
