"""What the pages share: every text is escaped and can be written, and every colour can be read."""

import numpy as np
from markupsafe import Markup

from lensbench.report.render import ENVIRONMENT, render, shade


def luminance(colour):
    """Relative luminance (WCAG) of a colour like ``#1a2b3c``."""
    channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def test_text_on_every_colour_can_be_read_and_more_is_darker():
    before = 1.0
    for share in np.linspace(0, 1, 101):
        fill, ink = (luminance(colour) for colour in shade(float(share)))
        assert (max(fill, ink) + 0.05) / (min(fill, ink) + 0.05) > 4.5  # WCAG AA
        assert fill <= before + 1e-3, "darker is more: the order is seen without colours too"
        before = fill


def test_every_template_escapes_and_half_a_character_can_be_written():
    assert ENVIRONMENT.autoescape is True
    written = render("csv_link.html", name="<b>\udc80", data=None, megabytes=2.0)
    assert "&lt;b&gt;?" in written
    written.encode()
    kept = render("csv_link.html", name=Markup("<b>x</b>"), data=None, megabytes=2.0)
    assert "<b>x</b>" in kept
