"""What pydantic finds wrong with a value, in words."""

from collections.abc import Mapping
from typing import Any

BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
"""The type of an error about a bound -> where the bound stands in its context, and what to call it"""

KINDS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false",
    "string": "a text", "tuple": "a list in brackets", "list": "a list in brackets", "path": "a path",
}  # fmt: skip
"""What the type of an error begins with -> what the value must be"""

SHOWN = 60
"""Characters of a wrong value that a message repeats"""


def in_words(error: Mapping[str, Any]) -> str:
    """What is wrong with a value and what would be right, from one of the ``errors()`` of a pydantic ValidationError."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        key, bound = BOUNDS[kind]
        return f"must be {bound} {context[key]:g}{given(error)}"
    if kind == "missing":
        return "is missing"
    if kind == "literal_error" or kind == "enum":
        return f"must be {context['expected']}{given(error)}"
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"must have at {'least' if kind == 'too_short' else 'most'} {bound} entries{given(error)}"
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return f"must be a table of settings{given(error)}"
    for beginning, wanted in KINDS.items():
        if kind.startswith(f"{beginning}_"):
            return f"must be {wanted}{given(error)}"
    return str(error["msg"]).removeprefix("Value error, ")


def given(error: Mapping[str, Any]) -> str:
    """The wrong value, as the end of a message."""
    shown = repr(error["input"])
    return f", not {shown if len(shown) <= SHOWN else f'{shown[:SHOWN]}...'}"
