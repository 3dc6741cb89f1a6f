"""The pictures are a function of the tables: the same bytes for the same tables, an error for what cannot be drawn."""

import io
import os
import re
import subprocess
import sys
import zlib
from itertools import combinations, product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers.decomposed import block_rows, index_rows, landmark_rows
from matplotlib import pyplot
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from typer.testing import CliRunner

from lensbench.cli import app
from lensbench.errors import LensbenchError
from lensbench.report.figures import draw as figures
from lensbench.report.figures import frames, indices, layout, lenses, plane, probes, registry, style, transfer
from lensbench.results.folder import Run, read_run, write_table
from lensbench.results.schema import SCHEMA

RESULTS = Path(__file__).resolve().parents[2] / "results"

FILES = [
    "gain_visibility.png", "kl_by_layer.png", "pair_penalty.png", "penalty_by_distance.png", "plane.png", "probes.png",
    "profile_over_depth.png", "tolerances.png", "transfer_penalty.png", "visibility_by_distance.png",
]  # fmt: skip
OF_DISTANCE = {"visibility_by_distance.png", "penalty_by_distance.png", "pair_penalty.png", "profile_over_depth.png"}


def rows_of(name: str, rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame([{**dict.fromkeys(SCHEMA[name]), **row} for row in rows], columns=list(SCHEMA[name]))


LENS_STAGES = {
    "logit": ("none",),
    "tuned": ("closed", "refined"),
    "shared": ("closed", "refined"),
    "shared_bias": ("closed", "refined"),
    "shared_loo": ("closed",),
}
SHIFTS = {"logit": 2.5, "tuned": 0.0, "shared": 0.5, "shared_bias": 0.35, "shared_loo": 0.62}


def lens_rows(who: dict, own: np.ndarray, rank: int) -> list[dict]:
    """Made-up rows of ``lenses.csv`` of one model and seed; of the first model its rotated view, too."""
    layers, rows = len(own) - 1, []
    for (lens, shift), stage in ((item, s) for item in SHIFTS.items() for s in LENS_STAGES[item[0]]):
        for layer in range(layers + (lens == "logit")):
            kl = own[layer] * (1 + shift / (1 + rank)) + (0.12 if stage == "closed" else 0.0) * (layer < layers)
            how = {"lens": lens, "layer": layer, "stage": stage, "prior": "zero", "kl": kl}
            rows.append({**who, **how, "kl_ci_low": 0.96 * kl, "kl_ci_high": 1.04 * kl})
    for layer in range(layers if rank == 0 else 0):
        how = {"lens": "shared", "layer": layer, "stage": "closed", "prior": "zero", "kl": 3.6 - 0.2 * layer}
        rows.append({**who, **how, "model": who["model"] + "+rotated"})
    return rows


def write_run(folder: Path, models: dict[str, int], seeds: tuple[str, ...] = ("0",), scale: float = 1.0) -> Path:
    """A run folder of made-up numbers of the right order: ``models`` maps a name to its number of layers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    tables: dict[str, list[dict]] = {name: [] for name in SCHEMA}
    tables["baselines.csv"].append({"tokenizer": "trained here", "baseline": "unigram", "ce": 6.5})
    for (rank, (model, layers)), seed in product(enumerate(models.items()), seeds):
        who = {"model": model, "seed": seed}
        tables["models.csv"].append({**who, "family": "toy", "layers": layers, "ce": 3.5, "clusters": 80})
        own = np.append(np.linspace(2.4, 0.3, layers), 0.0)
        for i, j in product(range(layers + 1), repeat=2):
            far = abs(i - j) ** 1.3 * (1.6 if i < j else 1.0) / layers**1.3
            penalty = 0.0 if i == j else 5 * scale * far / (1 + rank) * float(rng.uniform(0.8, 1.2))
            how = {"stage": "closed", "prior": "identity", "tolerance": 0.02, "lens_layer": i, "stream_layer": j}
            tables["transfer.csv"].append(
                {**who, **how, "kl": own[j] + penalty, "ce": 3.5 + own[j] + penalty, "penalty_ce": penalty}
            )
        tables["lenses.csv"] += lens_rows(who, own, rank)
        for index, value in {
            "gain_visibility": -1.1 + 0.8 * rank,
            "gain_visibility_adjacent": -0.4 + 0.5 * rank,
            "movement": 2.2 - 0.6 * rank,
            "shared_consistency": min(0.98, 0.6 + 0.17 * rank),
            "gain_visibility_without_layer0": 0.6 - 0.2 * rank,
            "movement_without_layer0": 0.8,
            "shared_consistency_without_layer0": 0.9,
        }.items():
            width = {"ci_low": value - 0.08, "ci_high": value + 0.08, "fit_low": value - 0.15, "fit_high": value + 0.12}
            how = {"stage": "closed", "tolerance": None if index == "shared_consistency" else 0.02}
            tables["indices.csv"].append({**who, **how, "index": index, "value": value, **width})
        for apart in range(1, layers):
            value = 0.8 - 0.3 * apart + 0.1 * rank
            ends = {"ci_low": value - 0.1, "ci_high": value + 0.1}
            tables["indices.csv"].append({**who, "index": f"gain_visibility_distance_{apart}", "value": value, **ends})
        for quantity, block in product(
            ("gradient_alignment", "gradient_alignment_null", "ce_rise_deleted"), range(layers)
        ):
            value = (0.01 if quantity.endswith("null") else 0.2) * (1 + block) / (1 + rank)
            what = {"probe": "of_blocks", "quantity": quantity, "layer": block, "value": value}
            tables["probes.csv"].append({**who, **what, "ci_low": 0.9 * value, "ci_high": 1.1 * value})
        known = "carry-along" if rank == 1 else None
        tables["verdicts.csv"].append({**who, "scope": "all layers", "verdict": "cannot tell", "known": known})
        for k, tolerance in enumerate(("0", "1se", "0.02", "0.05", "0.1")):
            for index, first in (("gain_visibility", -2.0), ("gain_visibility_without_layer0", 0.1)):
                value = first + 0.3 * k + 0.2 * rank
                what = {"tolerance": tolerance, "index": index, "value": value, "ridge": "0.1 1", "layers": "0 1"}
                ends = {"ci_low": value - 0.1, "ci_high": value + 0.1, "stage": "closed", "prior": "identity"}
                tables["tolerances.csv"].append({**who, **what, **ends})
        for i, j in product(range(layers), repeat=2):
            if i < j:
                cost = 0.1 * (j - i) * (1 + rank)
                pair = {"layer_i": i, "layer_j": j, "penalty": cost, "rotated_penalty": cost + 0.5}
                tables["pairs.csv"].append({**who, **pair})
        tables["blocks.csv"] += block_rows(who, layers, rank)
        tables["indices.csv"] += index_rows(who, layers, rank)
        tables["landmarks.csv"] += landmark_rows(who)
    for name, rows in tables.items():
        write_table(folder, name, rows_of(name, rows))
    return folder


def change(folder: Path, name: str, edit) -> Run:
    """The run after ``edit`` of one of its tables."""
    table = pd.read_csv(folder / name, keep_default_na=False, na_values=[""])
    write_table(folder, name, edit(table))
    return read_run(folder, need_manifest=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {"gpt": 3, "pc": 2})


@pytest.fixture(scope="module")
def drawn_pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    base = tmp_path_factory.mktemp("pictures")
    drawn = figures.draw_figures(read(write_run(base / "run", {"gpt": 3, "pc": 2})), base / "out")
    return {path.name: path.read_bytes() for path in drawn}


@pytest.fixture
def pictures(drawn_pictures: dict[str, bytes]) -> dict[str, bytes]:
    """File name -> all figures of ``folder``, drawn once for all tests."""
    return dict(drawn_pictures)


def read(folder: Path) -> Run:
    return read_run(folder, need_manifest=False)


def heatmaps(figure: Figure) -> list:
    return [mesh for axes in figure.axes for mesh in axes.collections if axes.get_xlabel().startswith("read at")]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


@pytest.mark.slow
def test_all_figures_are_written_and_a_redraw_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = figures.draw_figures(read(folder), tmp_path / "deep" / "a")
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30}):  # a user's own settings make no difference
        second = figures.draw_figures(read(folder), tmp_path / "b")
    with matplotlib.rc_context({"font.size": 20}):
        beside = figures.draw_side_by_side(read(folder), tmp_path / "c", 2)
    assert [path.name for path in first] == [path.name for path in beside] == FILES
    assert sorted((tmp_path / "c").iterdir()) == beside
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in beside]
    assert sorted(path.name for path in (tmp_path / "deep" / "a").iterdir()) == sorted(FILES)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first)
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "column", "changed"),
    [
        ("transfer.csv", "penalty_ce", {"transfer_penalty.png", "penalty_by_distance.png"}),
        ("lenses.csv", "kl", {"kl_by_layer.png"}),
        ("lenses.csv", "kl_ci_high", {"kl_by_layer.png"}),
        ("indices.csv", "value", {"gain_visibility.png", "plane.png"}),
        ("indices.csv", "fit_high", {"gain_visibility.png"}),
        ("probes.csv", "value", {"probes.png"}),
    ],
)
def test_a_changed_value_changes_the_pictures_of_its_table(pictures, folder, tmp_path, name, column, changed) -> None:

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        values = table[column].to_numpy(float, copy=True)
        values[0 if name == "indices.csv" else 1] += 0.5
        return table.assign(**{column: values})

    after = figures.draw_figures(change(folder, name, edit), tmp_path / "after")
    assert {path.name for path in after if path.read_bytes() != pictures.pop(path.name)} == changed
    assert not pictures


def test_heatmaps_share_one_scale_that_one_enormous_cell_does_not_stretch(folder: Path) -> None:
    def edit(table: pd.DataFrame) -> pd.DataFrame:
        enormous = (table["model"] == "pc") & (table["lens_layer"] == 0) & (table["stream_layer"] == 2)
        table.loc[enormous, "penalty_ce"] = 900.0
        return table

    frame = frames.transfer_frame(change(folder, "transfer.csv", edit))
    with style.style():
        figure = transfer.transfer_penalty(frame)
    gpt, pc = heatmaps(figure)
    assert gpt.get_array().size == 16
    assert pc.get_array().size == 9
    assert gpt.get_clim() == pc.get_clim()
    assert gpt.cmap == pc.cmap
    assert gpt.get_clim()[0] == 0
    assert 1 < gpt.get_clim()[1] < 10
    assert len(figure.axes) == 3  # two heatmaps and the one colour bar
    assert "nats/token" in words(figure)
    assert f"colours end at {gpt.get_clim()[1]:.2g}, the highest is 900" in words(figure)
    assert "900 (pc)" in words(figure).replace("\n", " "), "a median alone would hide it"
    cell = frame.query("model == 'gpt' and lens_layer == 0 and stream_layer == 2")["penalty_ce"].item()
    assert gpt.get_array().reshape(4, 4)[0, 2] == pytest.approx(cell)  # rows are lenses, columns are streams


def test_seeds_are_averaged_and_indices_taken_from_their_mean(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"gpt": 2}, seeds=("0", "1", "2"))
    table = read(folder).tables["transfer.csv"]
    mean = table.query("lens_layer == 0 and stream_layer == 1")["penalty_ce"].mean()
    frame = frames.transfer_frame(read(folder))
    assert frame.query("lens_layer == 0 and stream_layer == 1")["penalty_ce"].item() == pytest.approx(mean)

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table[table["seed"] == 0].assign(seed="all", value=0.25), table])

    frame = frames.index_frame(change(folder, "indices.csv", edit))
    assert list(frame["value"]) == [0.25] * 4


def test_landmarks_of_the_plane_are_what_the_verdicts_know(folder: Path) -> None:
    frame = plane.plane_frame(read(folder))
    models = frame[frame["part"] == "model"]
    assert models.groupby("model")["known"].first().to_dict() == {"gpt": "", "pc": "carry-along"}
    with style.style():
        drawing = plane.plane(frame)
    for panel, view in zip(drawing.axes, plane.VIEWS, strict=True):
        gpt, pc = (m for m in panel.collections if len(m.get_offsets()))
        assert (
            len(gpt.get_paths()[0].vertices) > len(pc.get_paths()[0].vertices) == 5
        )  # a circle, a square on its corner
        for mark, model in ((gpt, "gpt"), (pc, "pc")):
            values = models[models["model"] == model].set_index("index")["value"]
            assert tuple(mark.get_offsets()[0]) == (values[view.x], values[view.y])


def test_visibility_by_distance_and_probes_are_drawn_as_their_tables_say(folder: Path) -> None:
    run = read(folder)
    frame = frames.distance_frame(run)
    assert frame[["model", "distance"]].values.tolist() == [["gpt", 1], ["gpt", 2], ["pc", 1]]
    with style.style():
        panel = indices.visibility_by_distance(frame).axes[0]
        several = probes.probes(frames.probe_frame(run))
    lines = {line.get_label(): line for line in panel.lines}
    assert list(lines["gpt"].get_ydata()) == pytest.approx([0.5, 0.2])
    assert list(lines["pc"].get_ydata()) == pytest.approx([0.6])
    names = [axes.get_ylabel() for axes in several.axes]
    assert len(names) == 2
    assert names[1].startswith("rise of CE")
    deleted = {line.get_label(): line for line in several.axes[1].lines}
    assert list(deleted["gpt"].get_ydata()) == pytest.approx([0.2, 0.4, 0.6])


def test_no_two_of_many_models_look_alike() -> None:
    found = [tuple(look.values()) for look in style.line_looks(40)]
    assert len(set(found)) == 40


def test_the_refined_lens_is_drawn_where_there_is_one(folder: Path) -> None:
    frame = frames.lens_frame(read(folder))
    stages = frame[frame["model"] == "gpt"].groupby("lens")["stage"].unique().map(list).to_dict()
    assert stages == {
        "logit": ["none"],
        "tuned": ["refined"],
        "shared": ["refined"],
        "shared_bias": ["refined"],
        "shared_loo": ["closed"],
        "rotated": ["rotated"],
    }
    assert frame["layer"].max() == 2  # the logit lens at L is the model itself


def test_a_kl_of_zero_does_not_break_the_log_axis(folder: Path) -> None:
    def edit(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["lens"] == "shared_loo", ["kl", "kl_ci_low", "kl_ci_high"]] = [0.0, -1e-9, 1e-9]
        return table

    run = change(folder, "lenses.csv", edit)
    with style.style():
        panel = lenses.kl_by_layer(frames.lens_frame(run)).axes[0]
    low, high = panel.get_ylim()
    assert 0 < low <= frames.SMALLEST_KL < 1 < high
    assert all(np.isfinite(line.get_ydata()).all() for line in panel.lines)


def test_missing_cells_are_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    def edit(table: pd.DataFrame) -> pd.DataFrame:
        pc = table["model"] == "pc"
        table.loc[pc & (table["lens_layer"] == 0) & (table["stream_layer"] == 1), "penalty_ce"] = None
        return table[~(pc & (table["lens_layer"] == 2) & (table["stream_layer"] == 0))]

    with pytest.raises(LensbenchError, match="2 cells of model pc, seed 0, have no penalty_ce"):
        figures.draw_figures(change(folder, "transfer.csv", edit), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_kl_is_named(folder: Path) -> None:
    def edit(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["model"] == "pc") & (table["lens"] == "shared_loo"), "kl"] = None
        return table

    with pytest.raises(LensbenchError, match="model pc: 2 of 16 kl are missing"):
        frames.lens_frame(change(folder, "lenses.csv", edit))


def test_an_undefined_index_is_said_and_its_model_is_an_open_circle_in_the_plane(folder, tmp_path, monkeypatch) -> None:
    numbers = ["value", "ci_low", "ci_high", "fit_low", "fit_high"]

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["model"] == "gpt") & (table["index"] == "gain_visibility"), numbers] = None
        return table[table["index"] != "gain_visibility_without_layer0"]

    run = change(folder, "indices.csv", edit)
    with style.style():
        assert words(indices.gain_visibility(frames.index_frame(run))).split("\n").count("undefined") == 3
        panels = plane.plane(plane.plane_frame(run)).axes
    assert [panel.get_title(loc="left") for panel in panels] == [plane.VIEWS[0].title, plane.VIEWS[2].title]
    (circle,) = (line for line in panels[0].lines if line.get_label() == "undetermined")
    y = run.tables["indices.csv"].query("model == 'gpt' and index == 'shared_consistency'")["value"].item()
    assert list(circle.get_ydata()) == [y]
    assert circle.get_markerfacecolor() == "white"
    left, right = panels[0].get_xlim()
    assert left < circle.get_xdata()[0] < left + plane.GUTTER * (right - left)
    assert {text.get_text() for text in panels[0].texts} >= {"gpt", "pc", "undetermined"}

    def nothing(table: pd.DataFrame) -> pd.DataFrame:
        table[numbers] = None
        return table

    # Figures of a series of models (sizes, checkpoints) have nothing to draw here.
    with style.style():
        made = {name: each for name, each in registry.FIGURES.items() if "indices.csv" in each.needs}
        of_indices = {name: each for name, each in made.items() if each.of_run(run) is not None}
    monkeypatch.setattr(figures, "FIGURES", of_indices)
    assert len(figures.draw_figures(change(folder, "indices.csv", nothing), tmp_path / "out")) == len(of_indices) > 2


def test_names_in_the_plane_touch_neither_each_other_nor_an_error_bar(tmp_path: Path) -> None:
    names = ["gpt", "gpt-untrained", "gpt-partitioned", "gpt-twin", "pc", "pc+state"]
    frame = plane.plane_frame(read(write_run(tmp_path / "run", dict.fromkeys(names, 2))))
    frame = frame[~frame["index"].str.endswith("_without_layer0")]
    close = frame["index"].isin(["gain_visibility", "shared_consistency"])
    rank = frame["model"].map({name: k for k, name in enumerate(names)})
    frame.loc[close, "value"] = (0.5 + 0.02 * rank)[close]
    frame.loc[close, "ci_low"], frame.loc[close, "ci_high"] = frame["value"] - 0.1, frame["value"] + 0.1
    with style.style():
        panel = plane.plane(frame).axes[0]
    boxes = [text.get_window_extent() for text in panel.texts if text.get_text() in names]
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    bars = [line.get_window_extent() for line in panel.lines if line.get_linewidth() == 1.3]
    assert len(bars) == 2 * len(names)
    assert not any(box.overlaps(bar) for box in boxes for bar in bars)


@pytest.mark.slow
@pytest.mark.parametrize("models", [{"one": 2}, {"small": 2, "deep": 24}])
def test_any_depth_and_number_of_models(tmp_path: Path, models: dict[str, int]) -> None:
    run = read(write_run(tmp_path / "run", models))
    with style.style():
        figure = transfer.transfer_penalty(frames.transfer_frame(run))
    for axes, layers in zip(figure.axes, models.values(), strict=False):
        assert bool(axes.texts) == (layers <= style.ANNOTATED_LAYERS)
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels[-1] == "logit"
        assert sum(map(bool, labels)) <= style.ANNOTATED_LAYERS + 1
    assert len(figures.draw_figures(run, tmp_path / "out")) == len(FILES)


@pytest.mark.slow
def test_a_single_layer_leaves_no_distance_to_draw_but_all_other_figures(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run", {"flat": 1}))
    drawn = [path.name for path in figures.draw_figures(run, tmp_path / "out")]
    assert drawn == [name for name in FILES if name not in OF_DISTANCE]


def test_a_figure_is_added_by_one_function_and_drawn_where_its_tables_have_rows(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(figures, "write_figure", lambda _, path, **how: path.write_bytes(b""))
    before = dict(registry.FIGURES)
    seen = []

    @registry.figure("movement", needs=("indices.csv",), frame=frames.index_frame)
    def movement(frame: pd.DataFrame) -> Figure:
        seen.append(frame)
        return Figure()

    @registry.figure("curves", needs=("curves.csv",), frame=frames.curve_frame)
    def curves(frame: pd.DataFrame) -> Figure:
        raise AssertionError("the run has no learning curves")

    try:
        drawn = figures.draw_figures(read(folder), tmp_path / "out")
    finally:
        registry.FIGURES.clear()
        registry.FIGURES.update(before)
    assert [path.name for path in drawn] == sorted([*FILES, "movement.png"])
    assert list(seen[0]["unit"].unique()) == ["image"]
    assert registry.nats_per(seen[0]) == "nats/image"


def test_small_numbers_are_told_where_all_are_small_and_nowhere_else():
    assert [style.cell_text(v, 1.3) for v in (0.0, 0.003, -0.004, 0.058, 1.26, -13.1)] == [
        "0",
        "0",
        "0",
        ".06",
        "1.3",
        "\N{MINUS SIGN}13",
    ]
    assert [style.cell_text(v, 0.02) for v in (0.0, 0.003, -0.004, 0.0182)] == [
        text.replace("-", "\N{MINUS SIGN}") for text in ("0", "3e-3", "-4e-3", "2e-2")
    ]


# For papers

QUICK = RESULTS / "quick"
WIDTHS = {1: 3.35, 2: 6.9}


def invoked(folder: Path, out: Path, *options: str):
    return CliRunner().invoke(app, ["figures", str(folder), "--out", str(out), *options])


def drawn(folder: Path, out: Path, *options: str) -> dict[str, bytes]:
    found = invoked(folder, out, *options)
    assert found.exit_code == 0, found.output
    return {path.name: path.read_bytes() for path in out.iterdir()}


def drawn_elsewhere(folder: Path, out: Path, *options: str) -> dict[str, bytes]:
    """In another process, where sets and hashes are in another order."""
    command = [sys.executable, "-m", "lensbench.cli", "figures", str(folder), "--out", str(out), *options]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def for_papers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, bytes]]:
    """Columns -> all figures as PDF and SVG; drawn where a user's own settings are others."""
    vector = ("--format", "pdf", "--format", "svg")
    with matplotlib.rc_context({"font.size": 20, "pdf.fonttype": 3, "svg.fonttype": "none", "svg.hashsalt": None}):
        before = dict(matplotlib.rcParams)
        found = {n: drawn(QUICK, tmp_path_factory.mktemp("out") / "x", "--columns", str(n), *vector) for n in WIDTHS}
        assert dict(matplotlib.rcParams) == before
        assert not pyplot.get_fignums()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_figures_for_a_paper_are_as_wide_as_its_columns_and_hold_their_letters(for_papers, columns: int) -> None:
    figures_of = for_papers[columns]
    assert len(figures_of) == 2 * sum(each.of_run(read_run(QUICK)) is not None for each in registry.FIGURES.values())
    for name, content in figures_of.items():
        if name.endswith("svg"):
            assert not re.search(rb"<text|font-family|<dc:date>|Matplotlib", content), name
            continue
        box = re.search(rb"/MediaBox \[ *0 0 ([0-9.]+) ([0-9.]+) *\]", content)
        assert box is not None
        assert float(box[1]) / 72 == pytest.approx(WIDTHS[columns], rel=0.01), name
        assert float(box[2]) / 72 < 9.5, name  # a page
        packed = re.findall(rb"/FlateDecode.*?stream\r?\n(.*?)endstream", content, re.S)
        unpacked = content + b"".join(zlib.decompress(part) for part in packed)
        assert b"/FontFile2" in unpacked, name
        assert b"/Type3" not in unpacked, name
        assert b"CreationDate" not in unpacked, name
        assert b"Matplotlib" not in unpacked, name


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(for_papers, tmp_path: Path) -> None:
    again = drawn_elsewhere(QUICK, tmp_path / "a", "--columns", "1", "--format", "pdf", "--format", "svg")
    assert again == for_papers[1]


def letters(figure: Figure) -> list[Text]:
    """All that is written and seen, of ticks those within the axis."""
    found = []
    for artist in [figure, *figure.axes, *figure.legends]:
        found += [text for text in artist.findobj(Text) if text.get_visible() and text.get_text().strip()]
    ticks = {}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        seen = {id(tick) for tick in axis._update_ticks()}
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            ticks |= {id(label): id(tick) in seen for label in (tick.label1, tick.label2)}
    return [text for text in dict.fromkeys(found) if ticks.get(id(text), True)]


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
def test_letters_in_a_paper_are_legible_whole_and_apart(tmp_path: Path, monkeypatch, columns: int) -> None:
    models = {"gpt": 3, "gpt-untrained": 6, "gpt-conv+rotated": 12, "pc": 2, "predictive-coding": 6}
    run = read(write_run(tmp_path / "run", models))
    kept: dict[str, Figure] = {}
    monkeypatch.setattr(figures, "write_figure", lambda figure, path, **_: kept.update({path.name: figure}))
    monkeypatch.setattr(figures, "write_atomically", lambda path, write: write(path))
    figures.draw_figures(run, tmp_path / "out", columns=columns)
    assert sorted(kept) == sorted(FILES)
    for name, figure in kept.items():
        with style.style():
            figure.draw_without_rendering()
        written = letters(figure)
        assert {6 <= text.get_fontsize() <= 8 for text in written} == {True}, name
        boxes = [(text.get_text(), Text.get_window_extent(text)) for text in written]
        for text, box in boxes:
            assert box.x0 >= -1, (name, text)
            assert box.y0 >= -1, (name, text)
            assert box.x1 <= figure.bbox.width + 1, (name, text)
            assert box.y1 <= figure.bbox.height + 1, (name, text)
        for (a, one), (b, other) in combinations(boxes, 2):
            wide = min(one.x1, other.x1) - max(one.x0, other.x0)
            high = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert wide <= 1 or high <= 2, (name, a, b)


@pytest.mark.slow
def test_no_title_is_cut_off_and_no_number_is_wider_than_its_cell(tmp_path: Path) -> None:
    models = {"a-model-of-a-rather-long-name": 2}
    for part, run in (("one", models), ("many", {"small": 3, "another-of-a-long-name": 6})):
        read_in = read(write_run(tmp_path / part, run, scale=0.002))
        for name, each in registry.FIGURES.items():
            with style.style():
                drawing = each.of_run(read_in)
            if drawing is None:
                continue
            drawing.draw_without_rendering()
            title = drawing._suptitle.get_window_extent()
            assert drawing.bbox.x0 <= title.x0 <= title.x1 <= drawing.bbox.x1, name
            assert title.y1 <= drawing.bbox.y1 + 1, name
            for panel in drawing.axes:
                if any(isinstance(c, QuadMesh) for c in panel.collections) and panel.texts:
                    cell = panel.bbox.width / abs(np.subtract(*panel.get_xlim()))
                    assert all(text.get_window_extent().width <= cell for text in panel.texts), name


def test_a_label_is_broken_between_words_and_never_in_a_formula() -> None:
    with style.style():
        label = Figure(figsize=(3, 3)).supxlabel("$C_{ij} - C_{jj}$ (nats/token, linear below 0.1)", size=8)
        layout.break_label(label, 120.0, 0)
        lines = label.get_text().split("\n")
        assert lines[0].startswith("$C_{ij} - C_{jj}$")
        assert len(lines) > 1
        assert label.get_window_extent().width <= 120


def test_dots_per_inch_are_chosen(tmp_path: Path, monkeypatch) -> None:
    kind = "transfer_penalty"
    name = f"{kind}.png"
    monkeypatch.setattr(figures, "FIGURES", {kind: registry.FIGURES[kind]})
    fine = drawn(QUICK, tmp_path / "a", "--dpi", "300")
    with Image.open(io.BytesIO(fine[name])) as large, Image.open(QUICK / "figures" / name) as small:
        assert large.width == pytest.approx(2 * small.width, abs=2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "jpg"], "png, pdf, svg"),
        (["--dpi", "49"], "at least 50, not 49"),
        (["--dpi", "1201"], "at most 1200, not 1201"),
        (["--columns", "3"], "at most 2, not 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path: Path, options: list[str], told: str) -> None:
    found = invoked(QUICK, tmp_path / "b", *options)
    assert found.exit_code == 2
    assert not (tmp_path / "b").exists()
    assert told in found.output
    assert found.output.count("\n") == 1
