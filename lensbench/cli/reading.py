"""One model on one text: how well it predicts, and what each layer predicts."""

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lensbench.cli.app import Debug, Device, Dtype, Source, Strict, answerable, app, console, noted
from lensbench.cli.mistakes import check_places, say
from lensbench.errors import LensbenchError
from lensbench.report.in_width import show_line
from lensbench.runtime.bars import Bars

if TYPE_CHECKING:  # imported where they are used: torch and transformers take a second to load
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from lensbench.data.tokens import BeginSetting
    from lensbench.models.likelihood import Likelihood
    from lensbench.models.pretrained import Pretrained
    from lensbench.report.trace_page import TracedText


class Begin(StrEnum):
    """Which windows begin with the model's beginning-of-text token."""

    auto = "auto"
    every = "every"
    first = "first"


@app.command(short_help="How well a model predicts a text.")
@answerable
def bits(
    model: Source,
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="What --corpus of `lensbench run` takes: stdlib, file:PATH (a text, .jsonl[#FIELD], a folder, a pattern), "
            "hf:NAME[/CONFIG][@SPLIT][#FIELD]; or the path of a file or folder.",
        ),
    ],
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window; default 512, or the model's context.", show_default=False),
    ] = None,
    begin: Annotated[
        Begin | None,
        typer.Option(
            help="Windows that begin with the beginning- (or end-) of-text token: every one, the first alone, or auto "
            "(the default): every one where the tokenizer adds such a token by itself, else the first.",
            show_default=False,
        ),
    ] = None,
    bos: Annotated[
        bool,
        typer.Option(
            help="With --no-bos no window begins with such a token, and the first token of the text is not scored."
        ),
    ] = True,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Read at most so many bytes of the text.", show_default=False)
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    strict: Strict = False,
    debug: Debug = False,
) -> None:
    """How well a model predicts a text: nats per token and bits per byte, every token scored once."""
    from lensbench.data.sources import read_sources, refuse_missing, sources_of
    from lensbench.models.likelihood import texts_likelihood
    from lensbench.models.pretrained import (
        check_context,
        check_source,
        context_length,
        load_pretrained,
        without_progress_bars,
    )
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.runtime.hub import HERE, TEXTS_HERE, refuse_unreachable

    if not bos and begin is not None:
        raise LensbenchError(f"--begin {begin.value} and --no-bos contradict each other: give one of them")
    chosen = begin or Begin.auto
    front: BeginSetting | None = chosen.value if bos else None
    of_device, of_dtype = choose_device(device), dtype_named(dtype)
    check_source(model)
    refuse_unreachable(model, HERE)
    spec = f"file:{text}" if os.path.exists(text) and text != "stdlib" else text
    refuse_missing(spec)
    for source in sources_of(spec):
        refuse_unreachable(source, TEXTS_HERE)
    texts = [document.text for document in read_sources(spec, max_bytes, say=say, strict=strict).documents]
    with without_progress_bars():
        loaded = load_pretrained(model, dtype=of_dtype, device=of_device, say=noted)
    length = length or min(512, context_length(loaded.model.config) or 512)
    check_context(model, loaded.model.config, length, "set --length to {} or less")
    with Bars() as bars:
        found = texts_likelihood(loaded.model, loaded.tokenizer, texts, length=length, begin=front, progress=bars)
    show_likelihood(found, len(texts), length)
    for line in read_as(loaded.tokenizer, texts, front):
        show_line(line, console)


def show_likelihood(found: "Likelihood", documents: int, length: int) -> None:
    """Print nats per token and bits per byte of so many documents, with intervals, and what was scored."""
    from lensbench.statistics import bootstrap_weights, few_clusters, interval

    many = documents > 1
    scored = found.by_document() if many else found
    weights = bootstrap_weights(len(scored.nats), 2000, 0)
    for name, nats, per in (
        ("nats/token", scored.nats, scored.tokens),
        ("bits/byte", scored.nats / math.log(2), scored.bytes),
    ):
        low, high = interval((weights @ nats) / (weights @ per))
        line = f"{name}: {nats.sum() / per.sum():.4f} [{low:.4f}, {high:.4f}]"
        show_line(line, console)
    total = f"{found.tokens.sum()} tokens, {found.bytes.sum()} bytes, {len(found.nats)} windows of {length} tokens"
    total += f", {documents} documents" * many
    line = f"{total}; intervals: 95 %, bootstrap over {'documents' if many else 'windows'}"
    show_line(line, console)
    if few := few_clusters(len(scored.nats)) if many else "":
        noted(few.replace("clusters", "documents"))


def read_as(
    tokenizer: "Tokenizer | PreTrainedTokenizerBase", texts: list[str], begin: "BeginSetting | None"
) -> list[str]:
    """What the windows of texts begin with, and which special tokens the texts spell out."""
    from lensbench.data.tokens import beginning, spelled_out

    each = "each" if len(texts) > 1 else "the"
    front = None if begin is None else beginning(tokenizer, begin)
    if front is None or not front.ids:
        lines = [f"{each} text stands as it is, so its first token is not scored"]
    elif front.every_window:
        lines = [f"every window begins with {front.text}, which is not scored"]
    else:
        lines = [
            f"{each} text begins with {front.text}; every later window begins with the last token of the one before it"
        ]
    if written := spelled_out(tokenizer, "\n".join(texts)):
        words = ", ".join(f"{word} ({count})" for word, count in written.items())
        lines.append(f"special tokens that the text spells out are read as the characters that they are: {words}")
    return lines


@app.command(short_help="What each layer predicts in a text.")
@answerable
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME; with --run a model's name in that run."
        ),
    ],
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT...", help="The text itself; several are shown one by one.")
    ],
    lens: Annotated[
        str | None,
        typer.Option(
            help="logit; tuned, shared, shared_bias, tuned_headline or another kind that a run fitted; path:FOLDER of a "
            "tuned or shared lens, hub:RESOURCE of a tuned one. Left out: the run's shared lens, without a run the logit "
            "lens.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run folder: its models by name, and the lenses it fitted.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="A seed of the run; default: its first.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Show the last N tokens.")] = 8,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page here, as HTML.", show_default=False)
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """What each layer predicts next in a text, and what each block adds to it; errors of predictive-coding models."""
    from lensbench.models.pretrained import load_pretrained, without_progress_bars
    from lensbench.report.trace import traced_model
    from lensbench.report.trace_page import trace_page
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.runtime.files import write_atomically
    from lensbench.runtime.hub import HERE, LENSES_HERE, lens_is_cached, refuse_unreachable
    from lensbench.suite.files import name_of

    check_places({"--out": out}, {})
    of_device, of_dtype = choose_device(device), dtype_named(dtype)
    named = traced_model(model, lens, run, seed)
    refuse_unreachable(named.model, HERE)
    if named.lens is not None:
        refuse_unreachable(named.lens, LENSES_HERE, held=lens_is_cached(named.lens))
    with without_progress_bars():
        loaded = load_pretrained(named.model, dtype=of_dtype, device=of_device, say=noted)
    shown = []
    for text in texts:
        if len(texts) > 1:
            show_line(f"\n{text}", console)
        shown.append(_trace_text(loaded, text, named.lens, named.view, tokens))
    if out is not None:
        read = "the logit lens" if named.lens is None else f"lens {named.lens.rpartition('/')[2]}"
        content = trace_page(shown, title=f"{name_of(model) if ':' in model else model}, {read}")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda partial: partial.write_text(content, encoding="utf-8"))
        show_line(str(out), console)


def _trace_text(loaded: "Pretrained", text: str, lens: str | None, view: str, tokens: int) -> "TracedText":
    """Print the tables of one text, of its last ``tokens``; return what a page shows of it."""
    from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
    from lensbench.report.trace import growth_of, token_ids, traced_in_place, words_of
    from lensbench.report.trace_errors import errors_of
    from lensbench.report.trace_page import TracedText
    from lensbench.report.trace_tables import error_tables, growth_tables, trace_tables

    trajectory, later = traced_in_place(loaded, text, lens, tokens, view)
    growth = growth_of(trajectory, later)
    tables = trace_tables(trajectory, tokens, console.width)
    for table in [*tables, *growth_tables(trajectory, growth, tokens, console.width)]:
        console.print(table)
    ids, errors, note = token_ids(loaded, text), None, None
    if isinstance(loaded.model, PredictiveCodingForCausalLM):
        try:
            errors = errors_of(loaded.model, ids)
        except LensbenchError as error:
            note = str(error)
            noted(note)
        else:
            words, word = words_of(trajectory, ids.tolist()), words_of(trajectory, [errors.word])[0]
            for part in error_tables(errors, words, word, tokens, console.width):
                console.print(part, highlight=False)
    return TracedText(text, trajectory, growth, errors, ids.tolist(), note)
