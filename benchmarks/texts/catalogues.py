"""Tables that are made from the catalogues of the package, for templates."""

from collections.abc import Callable

from lensbench.probes import PROBES
from lensbench.probes.catalogue import probes_markdown, quantities_markdown
from lensbench.results.schema import indices_text, tables_text


def table_of_quantities(*names: str) -> str:
    """The quantities of some probes, as Markdown."""
    return quantities_markdown(PROBES[name] for name in names).rstrip()


def table_of_probes() -> str:
    """All probes, what they measure, and their nulls."""
    return probes_markdown(PROBES.values()).rstrip()


CATALOGUES: dict[str, Callable[..., str]] = {
    "text_of_tables": lambda: tables_text().rstrip(),
    "text_of_indices": lambda: indices_text().rstrip(),
    "table_of_quantities": table_of_quantities,
    "table_of_probes": table_of_probes,
}
