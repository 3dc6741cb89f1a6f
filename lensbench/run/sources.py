"""Where models and lenses come from, as results name them."""

from lensbench.lenses.tuned import lens_files
from lensbench.models.pretrained import named
from lensbench.runtime.files import sha256


def lens_identity(source: str) -> dict[str, str]:
    """What tells whether a lens is still the same: its name and the checksums of its files."""
    return {"lens": named(source), **{path.name: sha256(path) for path in lens_files(source)}}
