"""Files of Jacobian lenses: read as others publish them, written so that TransformerLens reads them.

A file is what ``torch.save`` writes of a dictionary: ``J`` (their layer -> ``[d, d]``, float16), ``n_prompts``,
``source_layers``, ``d_model`` and, optionally, ``metadata``. Their layer l is the output of block l, our h_{l+1}; the last
block's output is the target and has no matrix. A fit's checkpoint has ``jacobian_sum``, sums over prompts, and ``n_done`` in
their place. Neither has a matrix of h_0, the input of the first block: ours holds it under a key of its own, ``J_input``,
that others leave alone.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianFacts
from lensbench.lenses.tuned import refuse_not_finite, unreadable_lens
from lensbench.runtime.files import write_atomically

OURS = "J_input"
"""The key of the matrix of h_0"""

ESTIMATOR = "jacobian_lens"
"""What a file's metadata says of the estimator, where it says anything"""


COMMIT = re.compile("[0-9a-f]{7,40}")
"""A revision that is a commit, whole or shortened, and no name"""


@dataclass(frozen=True)
class JacobianFile:
    """What a file of a Jacobian lens holds."""

    source: str
    matrices: dict[int, Tensor]
    """Our layer l, of h_l -> J_l ``[d, d]``, float32"""
    prompts: int
    dtype: str
    """What the matrices are stored in: ``float16``, say"""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers that it reads."""
        return sorted(self.matrices)

    @property
    def width(self) -> int:
        """The width d of the stream that it was fitted to."""
        return len(next(iter(self.matrices.values())))

    def check(self, layers: int, d: int, model: str, commit: str = "") -> str:
        """What nobody can tell of the model's revision, in a clause; empty where the file and the model agree on it.

        Raises :class:`LensbenchError` where the lens was not fitted to a model of L ``layers`` and width ``d`` named
        ``model``, a source, of which the hub has ``commit`` (empty: unknown). Names and revisions are compared where both
        are of the hub: those of folders, packages and GGUF files say nothing.
        """
        other = f"{self.source}: the lens was fitted to another model"
        if self.width != d:
            raise LensbenchError(f"{other}: its width is {self.width}, the model's {d}")
        if self.layers[-1] >= layers:
            raise LensbenchError(
                f"{other}: it has a matrix of the output of block {self.layers[-1] - 1}, the last of the model's "
                f"{layers} blocks is {layers - 1}, whose output is the target"
            )
        target = self.metadata.get("target_layer", layers - 1)
        if target != layers - 1:
            raise LensbenchError(
                f"{self.source}: the lens predicts the output of block {target}, not of the last one, {layers - 1}"
            )
        name, kind = self.metadata.get("model_name"), model.partition(":")[0]
        if name is not None and kind == "hub":
            here = model.partition(":")[2].partition("@")[0]
            # Short names of others leave the owner out.
            if str(name).lower().rpartition("/")[2] != here.lower().rpartition("/")[2]:
                raise LensbenchError(f"{other}: it names {name}, this one is {here}")
        return self._check_revision(model, commit)

    def _check_revision(self, model: str, commit: str) -> str:
        """See :meth:`check`. Commits are compared with commits, names with names: a name may stand for any commit."""
        recorded = str(self.metadata.get("model_revision") or "")
        if not recorded:
            return "it does not say which revision of the model it was fitted to"
        kind, _, rest = model.partition(":")
        here = [rest.partition("@")[2] or "main", commit] if kind == "hub" else []
        alike = [r for r in here if r and bool(COMMIT.fullmatch(r)) == bool(COMMIT.fullmatch(recorded))]
        if any(r == recorded or _shortened(recorded, r) for r in alike):
            return ""
        if alike:
            raise LensbenchError(
                f"{self.source}: the lens was fitted to another revision of the model: {recorded}, this one is {alike[-1]}"
            )
        return f"it was fitted to revision {recorded} of the model; which one is read here is unknown"


def _shortened(one: str, other: str) -> bool:
    """Whether one of two commits is the beginning of the other."""
    short, whole = sorted((one, other), key=len)
    return bool(COMMIT.fullmatch(short)) and whole.startswith(short)


def jacobian_path(source: str) -> Path | None:
    """The file of a Jacobian lens: ``FILE.pt``, ``path:FILE.pt`` or ``hub:OWNER/NAME/FILE.pt[@REVISION]``.

    None for a source that names none. Raises :class:`LensbenchError` where there is no such file.
    """
    kind, _, rest = source.partition(":")
    if kind not in ("path", "hub"):
        kind, rest = "path", source
    name, _, revision = rest.partition("@") if kind == "hub" else (rest, "", "")
    if not name.endswith(".pt"):
        return None
    if kind == "path":
        if not Path(name).is_file():
            raise LensbenchError(f"{source}: there is no file {name}")
        return Path(name)
    owner, _, inner = name.partition("/")
    repository, _, file = inner.partition("/")
    if not file:
        raise LensbenchError(f"{source}: a file of the hub is hub:OWNER/NAME/FILE.pt[@REVISION]")
    try:
        found = huggingface_hub.hf_hub_download(f"{owner}/{repository}", file, revision=revision or None)
    except Exception as error:  # the hub's client raises what its transport does
        raise unreadable_lens(source, error) from error
    return Path(found)


def read_jacobian(source: str) -> JacobianFile:
    """A Jacobian lens, named as in :func:`jacobian_path`; nothing but tensors and plain values is read from it.

    Raises :class:`LensbenchError` for a file that is not one, is damaged, or was made by another estimator.
    """
    path = jacobian_path(source)
    if path is None:
        raise LensbenchError(f"{source}: a Jacobian lens is a file .pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = _parsed(source, content)
    except LensbenchError:
        raise
    except Exception as error:  # pickle and torch each raise their own
        if "weights only" in str(error).lower():
            raise LensbenchError(
                f"{source}: the lens cannot be loaded: it is no file of tensors that torch.save wrote, or a damaged one"
            ) from error
        raise unreadable_lens(source, error) from error
    shapes = {tuple(m.shape) for m in found.matrices.values()}
    if len(shapes) != 1 or len(first := next(iter(shapes))) != 2 or first[0] != first[1]:
        raise LensbenchError(f"{source}: its matrices are not square and of one size: {sorted(shapes)}")
    refuse_not_finite(f"{source}: the lens", {f"layer {k}": m for k, m in found.matrices.items()})
    estimator = found.metadata.get("estimator", ESTIMATOR)
    if estimator != ESTIMATOR:
        raise LensbenchError(f"{source}: its matrices are no Jacobians: it says estimator {estimator!r}")
    return found


def _parsed(source: str, content: Any) -> JacobianFile:
    what = "a Jacobian lens has the key J, a checkpoint of its fit jacobian_sum"
    if not isinstance(content, dict) or not ({"J", "jacobian_sum"} & set(content)):
        raise LensbenchError(f"{source}: {what}; this file has neither")
    metadata = dict(content.get("metadata") or {})
    for key in ("model_name", "model_revision", "target_layer"):  # checkpoints say them outside of it
        if key in content:
            metadata.setdefault(key, content[key])
    if "J" in content:
        given, prompts, count = content["J"], int(content.get("n_prompts", 0)), 1
    else:
        given, prompts = content["jacobian_sum"], int(content.get("n_done") or content.get("n_prompts") or 0)
        count = prompts
        if prompts < 1:
            raise LensbenchError(f"{source}: it is the checkpoint of a fit that has seen no prompt")
    if not given:
        raise LensbenchError(f"{source}: it has no matrix")
    blocks = sorted(int(layer) for layer in given)
    if blocks[0] < 0:
        raise LensbenchError(f"{source}: layer {blocks[0]}: layers are outputs of blocks, numbered from 0")
    named = content.get("source_layers")
    if named is not None and sorted(int(layer) for layer in named) != blocks:
        raise LensbenchError(f"{source}: source_layers says {sorted(named)}, its matrices are of layers {blocks}")
    stored = {int(layer) + 1: matrix for layer, matrix in given.items()}
    if OURS in content:
        stored[0] = content[OURS]
    dtype = str(next(iter(stored.values())).dtype).removeprefix("torch.")
    width = content.get("d_model")
    matrices = {layer: matrix.float() / count for layer, matrix in sorted(stored.items())}
    found = JacobianFile(source, matrices, prompts, dtype, metadata)
    if width is not None and int(width) != found.width:
        raise LensbenchError(f"{source}: it says d_model {width}, its matrices are of width {found.width}")
    return found


def write_jacobian(
    path: Path,
    matrices: Tensor,
    facts: JacobianFacts,
    *,
    model: str,
    commit: str = "",
    dtype: torch.dtype = torch.float16,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write J of h_0..h_{L-1} ``[L, d, d]``, moved into place whole.

    ``model``: its source. A name of the hub is recorded as others check it, any other under a key that they leave alone;
    so is the ``commit`` that the hub has of it, or the revision that the source names.
    """
    layers, d = len(matrices), matrices.shape[-1]
    kind, _, rest = model.partition(":")
    name, _, asked = rest.partition("@")
    metadata: dict[str, Any] = {"model_name": name} if kind == "hub" else {"fitted_to": model}
    if kind == "hub" and (commit or asked):
        metadata["model_revision"] = commit or asked
    metadata |= {"estimator": ESTIMATOR, "target_layer": layers - 1, "written_by": "lensbench", **(more or {})}
    metadata |= {"skip_first_positions": facts.skip_first, "relative_error": facts.relative_error}
    metadata |= facts.model_dump(exclude={"prompts", "skip_first", "error"})
    content = {
        "J": {layer - 1: matrices[layer].to(dtype).clone() for layer in range(1, layers)},
        "n_prompts": facts.prompts,
        "source_layers": list(range(layers - 1)),
        "d_model": d,
        "metadata": metadata,
        OURS: matrices[0].to(dtype).clone(),
    }
    write_atomically(path, partial(_save, content))


def _save(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    torch.save(content, path)
