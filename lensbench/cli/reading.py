"""One model on one text: how well it predicts, and what each layer predicts."""

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lensbench.cli.app import Debug, Device, Dtype, Source, answerable, app, console, noted, say
from lensbench.errors import LensbenchError
from lensbench.runtime.bars import Bars


class Begin(StrEnum):
    """Which windows begin with the model's beginning-of-text token."""

    auto = "auto"
    every = "every"
    first = "first"


@app.command()
@answerable
def bits(
    model: Source,
    text: Annotated[Path, typer.Argument(help="A text file.")],
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window; default 512, or the model's context.", show_default=False),
    ] = None,
    begin: Annotated[
        Begin,
        typer.Option(
            help="Windows that begin with the beginning- (or end-) of-text token: every one, the first alone, or auto: "
            "every one where the tokenizer adds such a token by itself, else the first."
        ),
    ] = Begin.auto,
    bos: Annotated[
        bool, typer.Option(help="With --no-bos no window does, and the first token of the text is not scored.")
    ] = True,
    max_bytes: Annotated[int | None, typer.Option(min=1, help="Read no more than this.", show_default=False)] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """How well a model predicts a text: nats per token and bits per byte, every token scored once."""
    from lensbench.data.reading import read_documents
    from lensbench.data.tokens import beginning, spelled_out
    from lensbench.models.likelihood import text_likelihood
    from lensbench.models.pretrained import check_context, context_length, load_pretrained, without_progress_bars
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.statistics import bootstrap_weights, interval

    documents = read_documents(f"file:{text}", max_bytes, say=say)
    if len(documents) != 1:
        raise LensbenchError(f"{text} holds {len(documents)} documents: give one text file")
    with without_progress_bars():
        loaded = load_pretrained(model, dtype=dtype_named(dtype), device=choose_device(device), say=noted)
    length = length or min(512, context_length(loaded.model.config) or 512)
    check_context(model, loaded.model.config, length, "set --length to {} or less")
    with Bars() as bars:
        found = text_likelihood(
            loaded.model,
            loaded.tokenizer,
            documents[0].text,
            length=length,
            begin=begin.value if bos else None,
            progress=bars,
        )
    weights = bootstrap_weights(len(found.nats), 2000, 0)
    for name, nats, per in (
        ("nats/token", found.nats, found.tokens),
        ("bits/byte", found.nats / math.log(2), found.bytes),
    ):
        low, high = interval((weights @ nats) / (weights @ per))
        console.print(f"{name}: {nats.sum() / per.sum():.4f} [{low:.4f}, {high:.4f}]", highlight=False, markup=False)
    total = f"{found.tokens.sum()} tokens, {found.bytes.sum()} bytes, {len(found.nats)} windows of {length} tokens"
    console.print(f"{total}; intervals: 95 %, bootstrap over windows", highlight=False, markup=False)
    front = beginning(loaded.tokenizer, begin.value)
    if not bos or not front.ids:
        line = "the text stands as it is, so its first token is not scored"
    elif front.every_window:
        line = f"every window begins with {front.text}, which is not scored"
    else:
        line = f"the text begins with {front.text}; every later window begins with the last token of the one before it"
    console.print(line, highlight=False, markup=False)
    if written := spelled_out(loaded.tokenizer, documents[0].text):
        words = ", ".join(f"{word} ({count})" for word, count in written.items())
        line = f"special tokens that the text spells out are read as the characters that they are: {words}"
        console.print(line, highlight=False, markup=False)


@app.command()
@answerable
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="hub:ORG/NAME[@REVISION], path:FOLDER, gguf:FILE or package:NAME; with --run a model's name in that run."
        ),
    ],
    text: Annotated[str, typer.Argument(help="The text itself.")],
    lens: Annotated[
        str | None,
        typer.Option(
            help="logit; tuned, shared, shared_bias or tuned_headline (of a run); path:FOLDER of a tuned or shared lens, "
            "hub:RESOURCE of a tuned one. Left out: the run's shared lens, without a run the logit lens.",
            show_default=False,
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="A run folder: its models by name, and the lenses it fitted.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the run's seeds; default: the first.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Show the last so many tokens.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Write a page here, as HTML.", show_default=False)] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """What each layer predicts next in a text, through a lens of your choice; prediction errors where a model has them."""
    from lensbench.models.predictive_coding import PredictiveCodingForCausalLM
    from lensbench.models.pretrained import load_pretrained, without_progress_bars
    from lensbench.report.trace import token_ids, traced, traced_model, words_of
    from lensbench.report.trace_errors import errors_of
    from lensbench.report.trace_page import trace_page
    from lensbench.report.trace_tables import error_tables, trace_tables
    from lensbench.runtime.environment import choose_device, dtype_named
    from lensbench.runtime.files import write_atomically

    if out is not None and out.is_dir():
        raise LensbenchError(f"--out {out} is a folder: name a file, {out / 'trace.html'} say")
    named = traced_model(model, lens, run, seed)
    with without_progress_bars():
        loaded = load_pretrained(named.model, dtype=dtype_named(dtype), device=choose_device(device), say=noted)
    trajectory = traced(loaded, text, named.lens, tokens, named.view)
    for table in trace_tables(trajectory, tokens, console.width):
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
    if out is not None:
        read = "the logit lens" if named.lens is None else f"lens {named.lens.rpartition('/')[2]}"
        page = trace_page(trajectory, title=f"{model}, {read}: {text}", errors=errors, ids=ids.tolist(), note=note)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda partial: partial.write_text(page, encoding="utf-8"))
        console.print(str(out), highlight=False, markup=False)
