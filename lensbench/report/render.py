"""HTML from the templates of this package: every page stands alone, and every text in it is escaped."""

from importlib import resources
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def asset(name: str) -> Markup:
    """The text of a style sheet or script in ``templates``, as it is."""
    return Markup(resources.files("lensbench.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _writable(value: object) -> object:
    """``value``, in which no text has half a character (a lone surrogate): no file can hold one."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.encode("utf-8", "replace").decode()
    return value


ENVIRONMENT = Environment(
    loader=PackageLoader("lensbench.report"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_writable,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["asset"] = asset


def render(template: str, **values: Any) -> Markup:
    """The HTML of a template; values are escaped unless they are HTML (:class:`Markup`) already."""
    return Markup(ENVIRONMENT.get_template(template).render(values))


def shade(share: float, colours: str = "cividis_r") -> tuple[str, str]:
    """The colour of a cell and of the text on it: light to dark, in the same order to the colour-blind and in print.

    The text is black or white, whichever has more contrast (WCAG).
    """
    fill = matplotlib.colors.to_hex(matplotlib.colormaps[colours](float(np.clip(share, 0, 1))))
    linear = [
        (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for c in (b / 255 for b in bytes.fromhex(fill[1:]))
    ]
    luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return fill, "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
