"""Tables that are made from the catalogues of the package, for templates."""

from collections.abc import Callable

from lensbench.measures.indices import indices_table

CATALOGUES: dict[str, Callable[..., str]] = {"table_of_indices": indices_table}
