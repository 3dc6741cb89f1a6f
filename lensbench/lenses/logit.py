"""The logit lens: every state read by the model's own norm and head."""

from lensbench.lenses.lens import LensId
from lensbench.lenses.planning import LensKind

LOGIT_LENS = LensId("logit", "none", "none")


LOGIT = LensKind(name="logit", label="logit lens", colour="#222222", reads="layer", dash="2 3")
