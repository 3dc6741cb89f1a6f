"""Whether the Hugging Face hub can be reached: asked once and at once, where its clients would try for minutes."""

import os
import socket
from functools import cache
from urllib.parse import urlsplit

from huggingface_hub import constants, try_to_load_from_cache

from lensbench.errors import LensbenchError

SECONDS = 5.0
"""How long the hub may take to answer"""

HERE = "path:FOLDER, gguf:FILE or package:NAME of a model on this machine"
"""What a model can be without the hub"""

TEXTS_HERE = "stdlib, or file:PATH of a text on this machine"
"""What a text can be without the hub"""

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


LENSES_HERE = "a lens on this machine"
"""What a lens can be without the hub"""


def refuse_unreachable(source: str, instead: str, *, held: bool | None = None) -> None:
    """Raise :class:`LensbenchError` where ``source`` (``hub:`` or ``hf:``) lies on a hub that cannot be reached.

    Nothing is asked about other sources, about models whose config is in the cache, with ``HF_HUB_OFFLINE`` (the clients
    then answer at once), and behind a proxy. ``instead``: what to give in its place. ``held``: of what is no model,
    whether the cache has it.
    """
    kind, _, rest = source.partition(":")
    name, _, revision = rest.partition("#")[0].partition("@")
    if kind not in ("hub", "hf") or os.path.isdir(name):
        return
    if constants.HF_HUB_OFFLINE or any(os.environ.get(proxy) for proxy in PROXIES):
        return
    if held or (held is None and kind == "hub" and cached(name, revision)):
        return
    reason = unreachable(constants.ENDPOINT)
    if reason:
        host = urlsplit(constants.ENDPOINT).hostname
        raise LensbenchError(f"{source}: cannot connect to the hub ({host}: {reason}); give {instead}")


def cached(name: str, revision: str) -> bool:
    """Whether the cache has the config of a model of the hub; a name that the hub could not have is not in it."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision or None), str)
    except ValueError:  # the client then says what is wrong with the name
        return True


def lens_is_cached(source: str) -> bool:
    """Whether the cache has a tuned lens of the hub (``hub:RESOURCE``), or the file of a Jacobian lens."""
    name, _, revision = source.removeprefix("hub:").partition("@")
    parts = name.split("/", 2)
    place = ("AlignmentResearch/tuned-lens", f"lens/{name}/config.json", "space")
    if name.endswith(".pt") and len(parts) == 3:
        place = (f"{parts[0]}/{parts[1]}", parts[2], "model")
    repository, file, kind = place
    try:
        found = try_to_load_from_cache(repository, file, revision=revision or None, repo_type=kind)
        return isinstance(found, str)
    except ValueError:  # the client then says what is wrong with the name
        return True


@cache
def unreachable(endpoint: str) -> str:
    """Why nothing answers at the address of a hub; empty where something does."""
    parts = urlsplit(endpoint)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=SECONDS).close()
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    return ""
