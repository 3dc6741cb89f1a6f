"""The browser that pages are opened in."""

from helpers.pages import browser

__all__ = ["browser"]
