"""Many windows, or many positions of each? ``python -m benchmarks.speed.positions --model SOURCE --text CORPUS``

The model reads whole windows, and some positions of each are used: to fit lenses, or to score them. With more positions of
each, the model reads fewer windows for as many tokens; but neighbours in a text are alike. Here as many tokens come from
windows with few positions and with many, drawn as the suite ``pretrained`` draws them.

``positions.csv``: a row for each number of ``positions`` of a fitting window and each draw of these windows, and, for the
first of them, for each number of ``eval_positions`` of a held-out window. Columns that begin with ``eval_`` are of held-out
windows, the same in every draw.

- ``cpu_seconds``: of the passes of the model over ``forward_tokens``, padding included.
- ``kl``: held-out KL of closed-form lenses, mean over some layers, nats/token. ``difference``: less that at the first
  number of positions, in the same draw. ``redrawn``: less that at the same number of positions, in the first draw. Intervals
  are over clusters of held-out documents, with lenses fixed.
- ``in_place``: the update decomposition's index without layer 0. ``half_width``: of its interval. ``of_eval``,
  ``of_refits``: what it would be from held-out clusters alone, and from refits alone.

``positions-mean.csv``: means over draws. ``positions-documents.parquet``: sums of KL by cluster, for paired intervals.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
import typer
from scipy import stats

from benchmarks.speed.task import (
    Ledger,
    console,
    keep_documents,
    mean_kl,
    numbers_of,
    paired_difference,
    peak_memory,
    refusals,
    say,
    use_threads,
    write_description,
    write_table,
)
from lensbench.data.corpus import SPLITS
from lensbench.data.inputs import Texts
from lensbench.data.tokens import TokenizedDocument
from lensbench.data.windows import Turns, Windows, sample_windows
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.read import own_layer_sums
from lensbench.lenses.recipe import FitRecipe, spread_layers
from lensbench.measures.update.decomposition import Decomposition, Fitted, measured
from lensbench.measures.update.measure import in_clusters
from lensbench.measures.update.summary import drawn_indices, mean_carried, pairs_from, passing
from lensbench.models.pretrained import load_pretrained, load_tokenizer
from lensbench.run.inputs import read_corpus
from lensbench.runtime.environment import git_revision, hardware, versions
from lensbench.runtime.progress import QUIET
from lensbench.statistics import effective_clusters, interval, mean_over_seeds
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream
from lensbench.suite.changes import Changes, without_folder
from lensbench.suite.recipes import Suite

Made = TypeVar("Made")
Split = Literal["fit", "eval"]

IN_PLACE = "in_place_without_layer0"

OTHER_DRAW = 1000
"""Added to the seed of the suite's windows for each further draw"""


@dataclass(frozen=True)
class Setting:
    """What a row is of; its fields are the key of the row."""

    fit_tokens: int
    positions: int
    """Of each fitting window, at most"""
    eval_positions: int
    """Of each held-out window, at most"""
    draw: int = 0
    """Of fitting windows"""


def windows_of(
    documents: Sequence[TokenizedDocument],
    tokens: int,
    positions: int,
    *,
    split: Split,
    draw: int,
    length: int,
    max_share: float | None,
    turns: Turns,
    first_position: int,
) -> Windows:
    """As many windows as hold the tokens, drawn as a suite draws them; what the last one has beyond them is left out.

    Short windows have fewer positions than asked, so that there are more windows than tokens over positions. Raises
    :class:`LensbenchError` where the text has too few.
    """
    count = -(-tokens // positions)
    while True:
        drawn = sample_windows(
            documents, n_sequences=count, length=length, positions=positions, max_share=max_share, turns=turns,
            first_position=first_position, seed=SPLITS.index(split) + OTHER_DRAW * draw,
        )  # fmt: skip
        there = int(drawn.valid.sum())
        if there >= tokens:
            return first_tokens(drawn, tokens)
        if len(drawn) < count:
            raise LensbenchError(
                f"split {split} has {there:,} tokens at {positions} positions of each window, and {tokens:,} are asked for"
            )
        count += -(-(tokens - there) // positions)


def first_tokens(windows: Windows, tokens: int) -> Windows:
    """The windows of the first tokens; the last window keeps those of its positions that are among them."""
    kept = windows.valid & (np.cumsum(windows.valid).reshape(windows.valid.shape) <= tokens)
    rows = np.flatnonzero(kept.any(1))
    some, kept = windows.take(rows), kept[rows]
    last = np.take_along_axis(some.positions, kept.sum(1, keepdims=True) - 1, 1)
    return replace(
        some, valid=kept, positions=np.where(kept, some.positions, last), next_bytes=np.where(kept, some.next_bytes, 0)
    )


@dataclass(frozen=True)
class Read:
    """Windows, their states with clusters in place of documents, and what the passes of the model took."""

    windows: Windows
    captured: Capture
    cpu_seconds: float

    def columns(self, prefix: str = "") -> dict[str, Any]:
        """What a row says of them."""
        found = {
            "windows": len(self.windows),
            "forward_tokens": len(self.windows) * self.windows.positions_read,
            "cpu_seconds": self.cpu_seconds,
            "documents": len(self.windows.document_names),
            "clusters": len(np.unique(self.captured.document)),
            "effective_clusters": effective_clusters(self.captured.document),
        }
        return {prefix + name: value for name, value in found.items()}


@dataclass(frozen=True)
class Drawing:
    """A suite, and its text in the tokens of its model."""

    suite: Suite
    texts: Texts
    """Named by the source of the model"""

    @classmethod
    def of(cls, suite: Suite) -> "Drawing":
        """The text of a suite; raises :class:`LensbenchError` for a text, or a tokenizer, that cannot be read."""
        source, evaluate = suite.models[0].source, suite.evaluate
        assert source is not None
        tokenizer = load_tokenizer(source)
        texts = Texts(
            read_corpus(suite, QUIET),
            source,
            "",
            lambda: tokenizer,
            suite.length,
            evaluate.first_position,
            evaluate.begin,
        )
        return cls(suite, texts)

    def windows(self, split: Split, setting: Setting) -> Windows:
        """The windows of a split that a setting asks for."""
        evaluate, of_fit = self.suite.evaluate, self.suite.fit.of_fit
        if split == "fit":
            what = (setting.fit_tokens, setting.positions)
            draw, share, turns = setting.draw, of_fit["share"], of_fit["turns"]
        else:
            what = (evaluate.sequences * evaluate.positions, setting.eval_positions)
            draw, share, turns = 0, evaluate.max_share, evaluate.turns
        return windows_of(
            self.texts.documents(split), *what, split=split, draw=draw, length=self.texts.length, max_share=share,
            turns=turns, first_position=self.texts.first_position,
        )  # fmt: skip

    def check(self, settings: Sequence[Setting]) -> None:
        """Raises :class:`LensbenchError` for a setting that the text has too few tokens for."""
        for setting in settings:
            self.windows("fit", setting)
            self.windows("eval", setting)


@dataclass(frozen=True)
class Bench:
    """A model, and the text that it is measured on."""

    drawing: Drawing
    stream: ResidualStream
    layers: tuple[int, ...]
    """Of the decomposition"""
    scored: tuple[int, ...]
    """Those of them whose lenses are scored"""
    refits: int
    kept: dict[str, tuple[Hashable, Any]] = field(default_factory=dict)
    """The last fit, and the last held-out tokens, with what they are of"""

    @classmethod
    def of(cls, drawing: Drawing, *, layers: int, scored: int, refits: int) -> "Bench":
        """The suite's model on its text; raises :class:`LensbenchError` for one that cannot be loaded."""
        stream = ResidualStream(load_pretrained(drawing.texts.name).model)
        chosen = spread_layers(stream.layers, layers)
        at = spread_layers(len(chosen), min(scored, len(chosen)))
        return cls(drawing, stream, tuple(chosen), tuple(chosen[k] for k in at), refits)

    @property
    def recipe(self) -> FitRecipe:
        """How the suite fits lenses."""
        return self.drawing.suite.fit

    def read(self, windows: Windows) -> Read:
        """Run the model on windows."""
        begin = time.process_time()
        captured = capture(self.stream, windows, memory_gib=self.recipe.memory_gib)
        return Read(windows, in_clusters(captured, windows), time.process_time() - begin)

    def once(self, name: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made anew where the one that is kept under the name is of another key."""
        if name not in self.kept or self.kept[name][0] != key:
            self.kept.pop(name, None)  # before the next one takes its room
            self.kept[name] = (key, make())
        made: Made = self.kept[name][1]
        return made

    @cached_property
    def dev(self) -> Capture:
        """The dev tokens of the suite, the same for all; the loss of a constant is that of their own mean distribution."""
        return self.read(self.drawing.texts.samples(**self.recipe.of_dev)).captured

    def fitted(self, setting: Setting) -> tuple[Read, Fitted]:
        """The fitting tokens of a setting, and the lenses."""
        read = self.read(self.drawing.windows("fit", setting))
        lenses = Fitted.of(
            self.stream.readout, read.captured, self.dev, self.recipe, self.layers, "fisher", self.recipe.tolerance,
            setting.draw, lambda _: None,
        )  # fmt: skip
        return read, lenses

    def measured(self, setting: Setting) -> tuple[dict[str, Any], pd.DataFrame]:
        """The columns of a row, and its sums of KL by held-out cluster."""
        fit, lenses = self.once("fit", replace(setting, eval_positions=0), lambda: self.fitted(setting))
        held_out = self.once("eval", setting.eval_positions, lambda: self.read(self.drawing.windows("eval", setting)))
        sums = self.kl_by_cluster(lenses, held_out.captured)
        found = measured(
            self.stream.readout, lenses, fit.captured, self.dev, held_out.captured, self.refits, readable=False,
            normed=False, seed=setting.draw,
        )  # fmt: skip
        return {
            **fit.columns(),
            **held_out.columns("eval_"),
            "kl": mean_kl(sums),
            **in_place_of(found),
            "peak_gib": peak_memory(),
        }, sums

    def kl_by_cluster(self, fitted: Fitted, held_out: Capture) -> pd.DataFrame:
        """Sums over the tokens of each cluster of the mean KL of lenses: columns document, kl, tokens.

        The lens of a layer is the suite's closed form, prior zero, with the ridge and the pad that are best on dev.
        """
        lenses = fitted.lenses
        at = [self.layers.index(layer) for layer in self.scored]
        maps = AffineMaps.stack([fitted.search.padded(lenses.best[[k]], lenses.choices[k][0].pad) for k in at])
        kl, _ = own_layer_sums(self.stream.readout, held_out, maps, self.scored)
        starts = np.flatnonzero(np.diff(held_out.window, prepend=-1))
        sizes = np.diff([*starts, len(held_out)]).astype(float)
        frame = pd.DataFrame({"document": held_out.document[starts], "kl": kl.mean(1), "tokens": sizes})
        return frame.groupby("document", as_index=False).sum()


def in_place_of(found: Decomposition) -> dict[str, Any]:
    """Columns of what is added in place without layer 0, and of its interval; empty where it has none."""
    one = drawn_indices(found)[IN_PLACE].estimate
    passed = passing(found, pairs_from(found, 1))
    row: dict[str, Any] = {"pairs_passed": int(passed.sum()), "in_place": one.value, "reason": one.reason or None}
    if one.low is None or one.high is None:
        return row
    mean = mean_carried(found, passed)
    low, high = interval(mean(found.draws))
    row |= {"in_place_ci_low": one.low, "in_place_ci_high": one.high}
    row |= {"half_width": (one.high - one.low) / 2, "of_eval": float(high - low) / 2}
    if found.refits is not None and len(found.refits.carried) > 1:
        values = mean(found.refits)
        row["of_refits"] = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1))
    return row


@dataclass(frozen=True)
class Tables:
    """The rows so far, and the sums of KL that they rest on."""

    folder: Path
    first: int
    """The number of positions of a fitting window that others are compared with"""

    @property
    def ledger(self) -> Ledger:
        """``positions.csv``."""
        return Ledger(self.folder / "positions.csv", tuple(vars(Setting(0, 0, 0))))

    @property
    def documents(self) -> Path:
        """``positions-documents.parquet``."""
        return self.folder / "positions-documents.parquet"

    def sums(self, setting: Setting) -> pd.DataFrame:
        """The sums of KL by cluster of a setting."""
        known = pd.read_parquet(self.documents)
        same = [known[name] == str(value) for name, value in vars(setting).items()]
        return known[np.logical_and.reduce(same)][["document", "kl", "tokens"]]

    def add(self, setting: Setting, row: dict[str, Any], sums: pd.DataFrame) -> None:
        """Keep what was measured of a setting."""
        keep_documents(self.documents, sums.astype({"kl": np.float32, "tokens": np.float32}), **vars(setting))
        own = self.sums(setting)
        row |= with_interval("kl", paired_difference(own, own.assign(kl=0.0)))
        others = {"difference": replace(setting, positions=self.first), "redrawn": replace(setting, draw=0)}
        for name, other in others.items():
            if other != setting:
                row |= with_interval(name, paired_difference(own, self.sums(other)))
        self.ledger.add(**vars(setting), **row)

    def means(self) -> pd.DataFrame:
        """A row for each setting but the draw: means over draws.

        ``difference``: with its interval over held-out clusters, and with Student's over draws (``difference_draws``).
        ``kl_sd``, ``in_place_sd``: standard deviations over draws.
        """
        rows, keys = [], ["fit_tokens", "positions", "eval_positions"]
        for key, of in self.ledger.rows().groupby(keys, sort=False):
            settings = [Setting(*(int(value) for value in key), int(draw)) for draw in of["draw"]]
            row: dict[str, Any] = {**dict(zip(keys, key, strict=True)), "draws": len(of)}
            row |= {name: of[name].mean() for name in of.columns.drop([*keys, "draw", *NO_MEAN], errors="ignore")}
            row["kl_half_width"] = float((of["kl_ci_high"] - of["kl_ci_low"]).mean() / 2)
            if len(of) > 1:
                row |= {"kl_sd": of["kl"].std(), "in_place_sd": of["in_place"].std()}
            if settings[0].positions != self.first:
                reference = [replace(setting, positions=self.first) for setting in settings]
                row |= with_interval("difference", paired_difference(*map(self.averaged, (settings, reference))))
                if len(of) > 1:
                    _, row["difference_draws_low"], row["difference_draws_high"] = mean_over_seeds(of["difference"])
            rows.append(row)
        return pd.DataFrame(rows)

    def averaged(self, settings: Sequence[Setting]) -> pd.DataFrame:
        """Sums of KL by cluster, their means over settings."""
        return pd.concat(map(self.sums, settings)).groupby("document", as_index=False).mean()


NO_MEAN = [
    *(f"{name}{end}" for name in ("kl", "in_place", "difference", "redrawn") for end in ("_ci_low", "_ci_high")),
    "difference", "redrawn", "reason",
]  # fmt: skip
"""Columns of ``positions.csv`` whose mean says nothing"""


def with_interval(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    """Columns of a value with its interval."""
    return dict(zip((name, f"{name}_ci_low", f"{name}_ci_high"), found, strict=True))


def settings_of(tokens: int, positions: Sequence[int], eval_positions: Sequence[int], draws: int) -> list[Setting]:
    """All settings, in an order in which neighbours share a fit or held-out tokens.

    A setting comes after those that it is compared with.
    """
    first, own = positions[0], eval_positions[0]
    of_eval = [Setting(tokens, first, other) for other in eval_positions[1:]]
    return of_eval + [Setting(tokens, number, own, draw) for draw in range(draws) for number in positions]


def main(
    model: Annotated[str | None, typer.Option(help="Source of the model; left out, the suite's.")] = None,
    text: Annotated[str | None, typer.Option(help="Corpus: stdlib, file:PATH or hf:NAME.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/speed/positions"),
    tokens: Annotated[int | None, typer.Option(min=1, help="Fitting tokens; left out, the suite's.")] = None,
    positions: Annotated[
        str, typer.Option(help="Of each fitting window; others are compared with the first.")
    ] = "32,64,128,254",
    eval_positions: Annotated[
        str, typer.Option(help="Of each held-out window; fits are compared at the first.")
    ] = "16,32,64",
    draws: Annotated[int, typer.Option(min=1, help="How often fitting windows are drawn.")] = 3,
    layers: Annotated[int, typer.Option(min=2, help="Layers of the decomposition, evenly spread.")] = 8,
    scored: Annotated[int, typer.Option(min=2, help="Those of them whose lenses are scored.")] = 6,
    refits: Annotated[int, typer.Option(min=0, help="Refits of the decomposition.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the suite.")] = None,
) -> None:
    """Measure, print and write positions.csv, positions-mean.csv and positions.json into OUT; rows that are there stay."""
    with refusals():
        numbers = numbers_of(positions, "--positions"), numbers_of(eval_positions, "--eval-positions")
        use_threads(threads)
        revision = git_revision()
        suite = Changes(None, (model,) if model else (), text, settings=tuple(setting or ())).of("pretrained")
        wanted = settings_of(tokens or suite.fit.sequences * suite.fit.positions, *numbers, draws)
        drawing, tables = Drawing.of(suite), Tables(out, numbers[0][0])
        drawing.check(wanted)
        bench = Bench.of(drawing, layers=layers, scored=scored, refits=refits)
        for one in wanted:
            named = ", ".join(f"{name} {value}" for name, value in vars(one).items())
            if tables.ledger.has(**vars(one)):
                say(f"{named}: done before")
                continue
            row, sums = bench.measured(one)
            tables.add(one, row, sums)
            say(f"{named}: {row['windows']} windows in {row['cpu_seconds']:.0f} s, KL {row['kl']:.4f}")
        means = tables.means()
        write_table(out / "positions-mean.csv", means, "%.6g")
        described = {
            "model": without_folder(drawing.texts.name), "model_hash": bench.stream.readout.unembedding_hash(),
            "text": without_folder(suite.corpus.spec), "text_checksum": drawing.texts.corpus.checksum,
            "length": suite.length, "layers": list(bench.layers), "scored_layers": list(bench.scored),
            "refits": refits, "settings": list(setting or ()), "hardware": hardware(torch.device("cpu")),
            "versions": versions(), "git_revision": revision,
        }  # fmt: skip
        write_description(out, "positions", described)
    columns = ["positions", "eval_positions", "windows", "cpu_seconds", "kl", "in_place", "half_width"]
    console.print(
        means.reindex(columns=columns).to_string(index=False, float_format="%.4g"), highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    typer.run(main)
