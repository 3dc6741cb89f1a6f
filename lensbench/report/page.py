"""One self-contained HTML page from run folders: the ruler, verdicts, heatmaps, curves, tables, and how to run it again.

Reads run folders and nothing else. All that is shown is in the markup; the script adds what hovers and sorts.
No file, font or address outside the page is asked for.
"""

import base64
import html
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from lensbench.errors import LensbenchError
from lensbench.measures.verdict import rule_in_words
from lensbench.report.figures.frames import lens_frame
from lensbench.report.figures.lenses import LENS_COLOURS
from lensbench.report.formatting import number, shown_seeds, with_interval
from lensbench.report.terminal import doubts
from lensbench.report.verdicts import rule_of, statements
from lensbench.results.folder import Run, read_run
from lensbench.results.manifest import Manifest, read_manifest
from lensbench.results.schema import SCHEMA, unit
from lensbench.runtime.files import write_atomically

PAGE = "report.html"


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's colours, which the colour-blind tell apart; shapes and names say the same."""


LARGEST_CSV = 1_500_000
"""Bytes of a table that is put into the page; a larger one is named with its folder."""


SHOWN_TABLES = ("models.csv", "indices.csv", "verdicts.csv", "baselines.csv", "tolerances.csv")


MOST_ROWS = 400


STYLE, SCRIPT = (
    resources.files("lensbench.report").joinpath("templates", f"page.{kind}").read_text() for kind in ("css", "js")
)


def text(value: object) -> str:
    return html.escape(str(value), quote=True)


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page of run folders; raises :class:`LensbenchError` for folders that are damaged or hold no run."""
    for folder in folders:
        if folder.is_dir() and read_manifest(folder).sweep is not None:
            raise LensbenchError(f"{folder} holds a sweep, which has no lenses: give folders of `lensbench run`")
    runs = [read_run(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    content = page(runs)
    write_atomically(path, lambda partial: partial.write_text(content, encoding="utf-8"))


def page(runs: Sequence[Run]) -> str:
    """The whole page; the same folders give the same bytes."""
    questions = list(dict.fromkeys(run.manifest.suite.question for run in runs))
    names = names_of(runs)
    body = [
        f"<header><p class=soft>lensbench report of {text(', '.join(dict.fromkeys(r.folder.name for r in runs)))}</p>",
        *(f"<h1>{text(question)}</h1>" for question in questions),
        verdict_list(runs, names),
        "</header><main>",
        "<h2 id=ruler>The ruler</h2>",
        "<p>To the right: lenses fixed at one layer see later layers improve (<em>gain visibility</em>, 1 is all of the "
        "gain). Upward: one lens serves all layers beyond what it would in random bases (<em>shared consistency</em>, 1 is "
        "as well as a lens per layer). Refinement of one prediction in one representation lies at the upper right.</p>",
        ruler(runs, names),
    ]
    for number_of_run, run in enumerate(runs):
        body += run_section(run, number_of_run, names[number_of_run])
    body.append(
        "</main><footer><p class=soft>Intervals are 95 %: over documents (bootstrap), of several seeds over seeds (Student "
        "t). Everything on this page was read from run folders; it asks for nothing from a network.</p></footer>"
    )
    title = text(questions[0] if questions else "lensbench")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        + "\n".join(body)
        + f'<div id="tip" role="status"></div><script>{SCRIPT}</script></body></html>\n'
    )


def names_of(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What each run's models are called on the page: with their folder where two runs have one of a name."""
    models = [list(run.tables["models.csv"]["model"].unique()) for run in runs]
    twice = {m for a, b in itertools.combinations(models, 2) for m in set(a) & set(b)}
    return [
        {m: f"{m} ({run.folder.name})" if m in twice else str(m) for m in own}
        for run, own in zip(runs, models, strict=True)
    ]


def verdict_list(runs: Sequence[Run], names: list[dict[str, str]]) -> str:
    """The verdict on each model and scope, with the intervals that it rests on and what holds it back."""
    lines = []
    for run, called in zip(runs, names, strict=True):
        known = run.tables["verdicts.csv"].dropna(subset=["known"]).drop_duplicates("model").set_index("model")["known"]
        said = statements(run)
        for model, name in called.items():
            own = [
                f"<li>{text(s.scope)}: <span class=verdict>{text(s.answer)}</span>. {text(s.reasons)}</li>"
                for s in said
                if s.model == model
            ]
            built = f" (by construction: {text(known[model])})" if model in known else ""
            lines.append(
                f"<li><strong>{text(name)}</strong>{built}<ul>{''.join(own) or '<li>no verdict</li>'}</ul></li>"
            )
    return f"<ul>{''.join(lines)}</ul>"


# The ruler
def squeezed(value: float) -> float:
    """Linear between -1 and 1, logarithmic beyond: visibilities reach from -50 to 1."""
    return value if abs(value) <= 1 else math.copysign(1 + math.log10(abs(value)), value)


def ruler(runs: Sequence[Run], names: list[dict[str, str]]) -> str:
    """All models in the plane of consistency and gain visibility; numbers stand for the names beside it."""
    points = []
    for run, called in zip(runs, names, strict=True):
        rows = shown_seeds(run.tables["indices.csv"]).set_index(["model", "index"])
        known = shown_seeds(run.tables["verdicts.csv"]).dropna(subset=["known"]).drop_duplicates("model")
        built = dict(zip(known["model"], known["known"], strict=True))
        for model, name in called.items():
            x, y = rows.loc[(model, "gain_visibility")], rows.loc[(model, "shared_consistency")]
            points.append({"name": name, "x": x, "y": y, "known": built.get(model, "")})
    shown = [p for p in points if pd.notna(p["x"]["value"]) and pd.notna(p["y"]["value"])]
    left = [p["name"] for p in points if p not in shown]
    if not shown:
        return f"<p>No model has a place on it: {text(', '.join(left))} predict nearly the same everywhere.</p>"
    width, height, pad = 720, 400, 46
    lows = [squeezed(ends(p["x"])[0]) for p in shown]
    low_x, high_x = min(-1.1, *lows), max(1.15, *(squeezed(ends(p["x"])[1]) for p in shown))
    low_y = min(-0.1, *(ends(p["y"])[0] for p in shown))
    high_y = max(1.1, *(ends(p["y"])[1] for p in shown))

    def at(x: float, y: float) -> tuple[float, float]:
        across = pad + (squeezed(x) - low_x) / (high_x - low_x) * (width - pad - 14)
        return round(across, 1), round(height - pad + 12 - (y - low_y) / (high_y - low_y) * (height - pad - 8), 1)

    parts = []
    for tick in (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1):
        if low_x <= squeezed(tick) <= high_x:
            x, bottom = at(tick, low_y)
            parts.append(f'<line class="grid-line" x1="{x}" x2="{x}" y1="8" y2="{bottom}"/>')
            parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for tick in np.arange(math.ceil(low_y * 4) / 4, high_y, 0.25):
        x, y = at(0, float(tick))
        parts.append(f'<line class="grid-line" x1="{pad}" x2="{width - 14}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{pad - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    zero, bottom = at(0, low_y)
    parts.append(f'<line class="axis" x1="{zero}" x2="{zero}" y1="8" y2="{bottom}"/>')
    for label, x, y, anchor in (
        ("refinement", width - 18, 20, "end"), ("re-representation", pad + 6, bottom - 6, "start"),
        ("carry-along", zero - 5, bottom - 6, "end"),
    ):  # fmt: skip
        parts.append(
            f'<text class="soft-text" font-style="italic" x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'
        )
    parts.append(f'<text x="{(pad + width) / 2}" y="{height - 3}" text-anchor="middle">gain visibility</text>')
    parts.append(
        f'<text transform="translate(12 {height / 2}) rotate(-90)" text-anchor="middle">shared consistency</text>'
    )
    legend = []
    for k, point in enumerate(shown):
        colour = PALETTE[k % len(PALETTE)]
        (x, y), (x_low, x_high), (y_low, y_high) = (
            at(point["x"]["value"], point["y"]["value"]), ends(point["x"]), ends(point["y"]),
        )  # fmt: skip
        tip = f"{point['name']}\ngain visibility {with_interval(point['x'])}\nconsistency {with_interval(point['y'])}"
        tip += f"\nby construction: {point['known']}" if point["known"] else ""
        shape = (
            f'<rect x="{x - 7}" y="{y - 7}" width="14" height="14" transform="rotate(45 {x} {y})" '
            if point["known"]
            else f'<circle cx="{x}" cy="{y}" r="9" '
        ) + f'fill="{colour}" fill-opacity="0.9"/>'
        parts.append(
            f'<g data-tip="{text(tip)}" tabindex="0"><title>{text(tip)}</title>'
            f'<line x1="{at(x_low, 0)[0]}" x2="{at(x_high, 0)[0]}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
            f'<line x1="{x}" x2="{x}" y1="{at(0, y_low)[1]}" y2="{at(0, y_high)[1]}" stroke="{colour}" stroke-width="2"/>'
            f'{shape}<text x="{x}" y="{y + 4}" text-anchor="middle" font-weight="700" style="fill:#fff">{k + 1}</text></g>'
        )
        legend.append(f'<li style="color:{colour}"><span style="color:var(--text)">{text(point["name"])}</span></li>')
    alt = "; ".join(
        f"{p['name']}: gain visibility {with_interval(p['x'])}, consistency {with_interval(p['y'])}" for p in shown
    )
    missing = f" Without a place, being undefined: {text(', '.join(left))}." if left else ""
    return (
        f'<figure><div class=wide><svg viewBox="0 0 {width} {height}" role="img" style="min-width:34rem" '
        f'aria-label="{text("Plane of gain visibility and shared consistency. " + alt)}">{"".join(parts)}</svg></div>'
        f'<ol style="columns:14rem;margin:.4rem 0">{"".join(legend)}</ol><figcaption>Bars: 95 % intervals. Diamonds: known '
        f"by construction. Linear between -1 and 1, logarithmic beyond.{missing}</figcaption></figure>"
    )


def ends(row: Any) -> tuple[float, float]:
    """The interval of an index, or its value where there is none."""
    return tuple(row["value"] if pd.isna(row[k]) else float(row[k]) for k in ("ci_low", "ci_high"))  # type: ignore[return-value]


# One run
def run_section(run: Run, place: int, names: dict[str, str]) -> list[str]:
    manifest = run.manifest
    of = unit(run.tables["models.csv"])
    told = [f"<li>{text(line)}</li>" for line in doubts(run)]
    cells = mean_cells(run.tables["transfer.csv"])
    off = cells.loc[cells["lens_layer"] != cells["stream_layer"], "penalty_ce"]
    top = max(float(np.percentile(off.clip(lower=0), 95)), 1e-3)
    maps = [heatmap(cells[cells["model"] == m], called, top, of) for m, called in names.items()]
    lines = lens_frame(run)
    curves = [kl_curves(lines[lines["model"] == m], called, of) for m, called in names.items()]
    tables = [table_html(run, name, place) for name in SHOWN_TABLES]
    rest = [name for name in SCHEMA if name not in SHOWN_TABLES and (run.folder / name).is_file()]
    links = ", ".join(csv_link(run.folder / name) for name in rest)
    return [
        f"<h2 id=run{place}>{text(manifest.suite_name)}: {text(run.folder.name)}</h2>",
        f"<p>{text(manifest.suite.question)}</p><ul>{''.join(told)}</ul>",
        "<h3>Transfer penalties</h3><p>Row: the layer that a lens was fitted at. Column: the layer it reads. Colour: "
        f"nats/{of} lost against that layer's own lens, light is none. The last row is the logit lens. Hover a cell, or "
        f"focus a map and use the arrow keys.</p><div class=grid>{''.join(maps)}</div>",
        f"<h3>How far each layer's read-out is from the output</h3><div class=grid>{''.join(curves)}</div>",
        "<h3>Tables</h3>", *tables, f"<p>Further tables: {links}</p>" if links else "",
        "<h3>Settings, versions, and how to run it again</h3>",
        f"<p class=soft>Verdicts by the suite's rule: {text(rule_in_words(rule_of(run)))}</p>",
        f"<pre>{text(again(manifest))}</pre>",
        f"<details data-print><summary>Exact settings</summary><pre>{text(settings(manifest))}</pre></details>",
    ]  # fmt: skip


def mean_cells(table: pd.DataFrame) -> pd.DataFrame:
    """``model, lens_layer, stream_layer, penalty_ce`` and its interval: of several seeds the mean with Student's t."""
    cell = ["model", "lens_layer", "stream_layer"]
    columns = ["penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"]
    grouped = table.groupby(cell, sort=False)
    found = grouped[columns].mean()
    count, spread = grouped["penalty_ce"].count(), grouped["penalty_ce"].std()
    several = count > 1
    half = stats.t.ppf(0.975, (count - 1).clip(lower=1)) * spread / np.sqrt(count)
    for column, sign in (("penalty_ce_ci_low", -1), ("penalty_ce_ci_high", 1)):
        found[column] = found[column].where(~several, found["penalty_ce"] + sign * half)
    return found.reset_index()


def shade(share: float) -> tuple[str, str]:
    """Colour of a cell, and of text on it: light to dark, the same to the colour-blind and in print."""
    red, green, blue, _ = matplotlib.colormaps["cividis_r"](float(np.clip(share, 0, 1)))
    ink = "#000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#fff"
    return matplotlib.colors.to_hex((red, green, blue)), ink


def heatmap(cells: pd.DataFrame, model: str, top: float, of: str) -> str:
    """The matrix of one model as an SVG: hover, or arrow keys, tell lens, layer, value and interval."""
    size = int(cells["stream_layer"].max()) + 1
    side = max(9, min(34, 300 // size))
    edge, parts = 34, []
    columns = ["lens_layer", "stream_layer", "penalty_ce", "penalty_ce_ci_low", "penalty_ce_ci_high"]
    for lens_layer, stream_layer, value, low, high in cells[columns].to_numpy(float).tolist():
        i, j = int(lens_layer), int(stream_layer)
        fill, ink = shade(value / top)
        lens = f"lens of layer {i}" if i < size - 1 else "logit lens"
        told = {"v": value, "a": low, "b": high}
        tip = f"{model}\n{lens}, read at layer {j}\n{with_interval(told, 'v', 'a', 'b')} nats/{of}"
        x, y = edge + j * side, i * side + 4
        parts.append(
            f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" fill="{fill}" data-tip="{text(tip)}" '
            f'data-cell="{i},{j}"/>'
        )
        if side >= 24:
            shown = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
            parts.append(
                f'<text x="{x + (side - 1) / 2}" y="{y + side / 2 + 3}" text-anchor="middle" font-size="8.5" '
                f'style="fill:{ink};pointer-events:none">{"0" if abs(value) < 0.005 else shown}</text>'
            )
    step = max(1, math.ceil(size / 12))
    for k in range(0, size, step):
        label = "logit" if k == size - 1 else str(k)
        parts.append(f'<text x="{edge - 5}" y="{k * side + 4 + side / 2 + 4}" text-anchor="end">{label}</text>')
        parts.append(f'<text x="{edge + k * side + side / 2}" y="{size * side + 18}" text-anchor="middle">{k}</text>')
    whole = edge + size * side + 4
    off = cells[cells["lens_layer"] != cells["stream_layer"]]
    worst = off.sort_values("penalty_ce").iloc[-1]
    alt = (
        f"Transfer penalties of {model}, {size - 1} layers: median {number(float(off['penalty_ce'].median()))} nats/{of}, "
        f"largest {number(float(worst['penalty_ce']))} where lens {int(worst['lens_layer'])} reads layer "
        f"{int(worst['stream_layer'])}"
    )
    return (
        f'<figure><svg viewBox="0 0 {whole} {size * side + 24}" role="img" tabindex="0" data-size="{size}" '
        f'style="max-width:{whole * 1.3:.0f}px" aria-label="{text(alt)}">{"".join(parts)}</svg>'
        f"<figcaption><strong>{text(model)}</strong>: darkest at {number(top)} nats/{of} and more; "
        f"largest {number(float(worst['penalty_ce']))}</figcaption></figure>"
    )


def kl_curves(frame: pd.DataFrame, model: str, of: str) -> str:
    """KL to the model's output by layer, a line per lens, on a logarithmic axis."""
    frame = frame[frame["lens"].isin(["logit", "tuned", "shared", "rotated"])]
    width, height, left, bottom = 330, 210, 44, 30
    low, high = (math.log10(float(f(frame["kl"]))) for f in (np.min, np.max))
    low, high = math.floor(low * 2) / 2, max(math.ceil(high * 2) / 2, math.floor(low * 2) / 2 + 0.5)
    layers = max(1, int(frame["layer"].max()))

    def at(layer: float, kl: float) -> tuple[float, float]:
        y = 8 + (high - math.log10(kl)) / (high - low) * (height - bottom - 16)
        return round(left + layer / layers * (width - left - 12), 1), round(y, 1)

    parts = []
    for power in range(math.ceil(low), math.floor(high) + 1):
        y = at(0, 10.0**power)[1]
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for layer in range(0, layers + 1, max(1, math.ceil((layers + 1) / 8))):
        parts.append(f'<text x="{at(layer, 10**low)[0]}" y="{height - 14}" text-anchor="middle">{layer}</text>')
    parts.append(f'<text class="soft-text" x="{width / 2}" y="{height - 1}" text-anchor="middle">layer</text>')
    legend, alt = [], []
    dashes = {"logit": "2 3", "rotated": "7 3", "tuned": "", "shared": ""}
    for (lens, name), rows in frame.groupby(["lens", "name"], sort=False):
        colour = {"logit": "var(--text)"}.get(str(lens), LENS_COLOURS[str(lens)])
        rows = rows.sort_values("layer")
        line = rows[["layer", "kl", "kl_ci_low", "kl_ci_high"]].to_numpy(float).tolist()
        path = " ".join(f"{x},{y}" for x, y in (at(layer, kl) for layer, kl, *_ in line))
        parts.append(
            f'<polyline points="{path}" fill="none" style="stroke:{colour}" stroke-width="2" '
            f'stroke-dasharray="{dashes[str(lens)]}"/>'
        )
        for layer, kl, kl_low, kl_high in line:
            x, y = at(layer, kl)
            told = {"v": kl, "a": kl_low, "b": kl_high}
            tip = f"{model}\n{name}, layer {layer:.0f}\n{with_interval(told, 'v', 'a', 'b')} nats/{of}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" style="fill:{colour}" data-tip="{text(tip)}"/>')
        legend.append(
            f'<span style="white-space:nowrap"><svg viewBox="0 0 22 8" style="display:inline;width:22px;height:8px" '
            f'aria-hidden="true"><line x1="0" x2="22" y1="4" y2="4" style="stroke:{colour}" stroke-width="2" '
            f'stroke-dasharray="{dashes[str(lens)]}"/></svg> {text(name)}</span>'
        )
        alt.append(f"{name} from {number(float(rows['kl'].iloc[0]))} to {number(float(rows['kl'].iloc[-1]))}")
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="'
        f'{text(f"KL to the output of {model} by layer, nats/{of}: " + "; ".join(alt))}">{"".join(parts)}</svg>'
        f"<figcaption><strong>{text(model)}</strong>, nats/{of}. {' '.join(legend)}</figcaption></figure>"
    )


# Tables
def csv_link(path: Path) -> str:
    """A link to a table that is in the page itself; of a large one its name."""
    raw = path.read_bytes()
    if len(raw) > LARGEST_CSV:
        return f"<code>{text(path.name)}</code> ({len(raw) / 1e6:.1f} MB, in the run folder)"
    data = base64.b64encode(raw).decode()
    return f'<a download="{text(path.name)}" href="data:text/csv;base64,{data}">{text(path.name)}</a>'


def table_html(run: Run, name: str, place: int) -> str:
    """A sortable table with a link to its CSV; rows over seeds where there are, else each."""
    table = run.tables[name]
    if table.empty or not (run.folder / name).is_file():
        return ""
    shown = shown_seeds(table) if {"model", "seed"} <= set(table) and name != "models.csv" else table
    cut = len(shown) > MOST_ROWS
    shown = shown.head(MOST_ROWS).dropna(axis=1, how="all")
    heads = "".join(f'<th scope="col"><button type="button">{text(c)}</button></th>' for c in shown)
    rows = []
    for row in shown.itertuples(index=False):
        cells = []
        for column, value in zip(shown, row, strict=True):
            if isinstance(value, float | int | np.number) and not isinstance(value, bool):
                known = not np.isnan(float(value))
                cells.append(f'<td data-value="{float(value)!r}">{cell(value)}</td>' if known else "<td></td>")
            else:
                wrap = ' class="wrap"' if column in ("reason",) else ""
                cells.append(f"<td{wrap}>{'' if pd.isna(value) else text(value)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    more = f" (the first {MOST_ROWS} of its rows)" if cut else ""
    opened = " open" if name in ("models.csv", "verdicts.csv") else ""
    return (
        f"<details data-print{opened}><summary>{text(name)}{more}: {csv_link(run.folder / name)}</summary><div class=wide>"
        f'<table id="table-{place}-{name.partition(".")[0]}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def cell(value: Any) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{float(value):.4g}"


# Running it again
def again(manifest: Manifest) -> str:
    """Commands that give this run again, on a machine like its own."""
    versions, hardware = manifest.versions, manifest.hardware
    packages = " ".join(
        f"{name}=={v.partition('+')[0]}" for name, v in versions.items() if name not in ("python", "lensbench")
    )
    lines = [
        f"# lensbench {versions.get('lensbench', '?')}, Python {versions.get('python', '?')}; "
        + ", ".join(f"{k} {v}" for k, v in sorted(hardware.items())),
        f"python -m pip install {packages}",
    ]
    revision = manifest.git_revision
    if revision:
        changed = " (and local changes)" if str(revision).endswith("dirty") else ""
        lines.append(f"git checkout {str(revision).removesuffix('-dirty')}{changed} && python -m pip install -e .")
    sources = "".join(f" --model {s['source']}" for s in manifest.sources.values())
    only = (
        "".join(f" --only {m}" for m in manifest.models)
        if len(manifest.models) < len(manifest.suite.models)
        else ""
    )
    text_of = manifest.corpus.spec
    lines.append(f"lensbench run {manifest.suite_name}{sources}{only}")
    lines.append(f"# text or images: {text_of}, SHA-256 {manifest.corpus.checksum}; seeds {manifest.seeds}")
    memory = "?" if manifest.peak_gib is None else f"{manifest.peak_gib:g}"
    lines.append(f"# took {sum(manifest.seconds.values()):,.0f} s in all, {memory} GiB")
    return "\n".join(lines)


def settings(manifest: Manifest) -> str:
    told: Iterable[str] = ("suite", "versions", "hardware", "git_revision", "corpus", "scored", "sources", "written")
    content = manifest.content()
    return json.dumps({k: content[k] for k in told if k in content}, indent=1, sort_keys=True)
