"""The profile over depth shows every row of blocks.csv: in the figure, in the terminal and on the page."""

import io
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.decomposed import VIEWS, decomposed_run
from helpers.pages import Read
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from scipy import stats

from lensbench import LensbenchError, plot_profile
from lensbench.report.figures.blocks import profile_frame
from lensbench.report.figures.plane import VIEWS as VIEWS_OF_PLANE
from lensbench.report.figures.plane import crowd, finding, plane, plane_frame
from lensbench.report.figures.profile import ADDS, KEEPS, NEWS, STRIPS, profile_over_depth
from lensbench.report.figures.profile import finding as finding_of_profile
from lensbench.report.figures.style import SHEETS, on_sheet, style
from lensbench.report.formatting import shown_seeds
from lensbench.report.joining import together
from lensbench.report.profile_svg import profiles
from lensbench.report.profile_table import BARS, profile_table
from lensbench.results.folder import Run, read_run

RESULTS = Path(__file__).resolve().parents[2] / "results"

FOUR = {"gpt": 6, "gpt-partitioned": 6, "gpt+rotated": 6, "gpt-untrained": 6}
"""One of each kind: added up, carried along, re-represented, gated"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return decomposed_run(tmp_path_factory.mktemp("run"), FOUR)


@pytest.fixture(scope="module")
def of_four(four: Run) -> Figure:
    drawing = plot_profile(four)
    drawing.draw_without_rendering()
    return drawing


def draw(run: Run, columns: int | None = None) -> Figure:
    with on_sheet(SHEETS[columns]), style():
        drawing = profile_over_depth(profile_frame(run))
        drawing.draw_without_rendering()
    return drawing


def bars(panel: Axes, label: str) -> list:
    """The bars of a part, without the last, that of all blocks, and without those of no height."""
    found = [bar for group in panel.containers if group.get_label() == label for bar in group]
    end = max(bar.get_x() for group in panel.containers for bar in group)
    return [bar for bar in found if bar.get_x() < end and bar.get_height() > 0]


def blocks_of(run: Run, model: str) -> pd.DataFrame:
    table = run.tables["blocks.csv"]
    return table[table["model"] == model].reset_index(drop=True)


def edit(run: Run, name: str, change) -> Run:
    return replace(run, tables={**run.tables, name: change(run.tables[name].copy())})


def test_every_block_is_drawn_as_its_row_says(four: Run, of_four: Figure) -> None:
    panels = of_four.axes
    assert len(panels) == 4
    for panel, model in zip(panels, FOUR, strict=True):
        rows = blocks_of(four, model)
        kept = bars(panel, "kept")
        assert len(kept) == len(rows) == 5
        for bar, (_, row) in zip(kept, rows.iterrows(), strict=True):
            assert row["from_layer"] < bar.get_x() < bar.get_x() + bar.get_width() < row["to_layer"]
            assert bar.get_y() == KEEPS.base
            assert bar.get_height() == pytest.approx(min(row["clarity"], 1.0) * KEEPS.height)
        passed = rows[rows["gate"].isna()]
        in_place = [bar.get_height() / ADDS.height for bar in bars(panel, "in place")]
        assert in_place == pytest.approx([x for x in np.clip(1 - passed["carried"].astype(float), 0, 1) if x > 0])
        elsewhere = [bar.get_height() / ADDS.height for bar in bars(panel, "elsewhere")]
        assert elsewhere == pytest.approx([x for x in np.clip(passed["carried"].astype(float), 0, 1) if x > 0])
        assert [bar.get_height() / NEWS.height for bar in bars(panel, "news")] == pytest.approx(list(rows["news"]))


def test_drowned_is_claimed_only_where_the_signal_did_not_shrink(four: Run, of_four: Figure) -> None:
    gpt, _, turned, _ = of_four.axes
    assert len(bars(gpt, "drowned")) == 5
    assert bars(gpt, "turned") == []
    assert len(bars(turned, "turned")) == 5
    assert bars(turned, "drowned") == []
    for panel, model in ((gpt, "gpt"), (turned, "gpt+rotated")):
        frames = [lines for lines in panel.collections if lines.get_label() == "bracket"][:5]
        for drawn, (_, row) in zip(frames, blocks_of(four, model).iterrows(), strict=True):
            ends = sorted(y for _, y in drawn.get_segments()[0])
            assert ends == pytest.approx(sorted(KEEPS.base + np.array([row["kept_low"], row["kept_high"]], float)))


def test_an_undetermined_block_is_an_open_hatched_bar_with_the_name_of_its_gate(four: Run, of_four: Figure) -> None:
    panel = of_four.axes[3]
    rows = blocks_of(four, "gpt-untrained")
    gated = rows[rows["gate"].notna()]
    assert len(gated) == 4
    for gate, of_gate in gated.groupby("gate"):
        opened = bars(panel, f"undetermined: {gate}")
        assert [round(bar.get_x()) for bar in opened] == list(of_gate["from_layer"])
        assert all(bar.get_facecolor()[3] == 0 and bar.get_hatch() for bar in opened)
        assert gate in {text.get_text() for text in panel.texts}
        assert f"undetermined: {gate}" in {text.get_text() for text in of_four.legends[0].get_texts()}
    assert len({bars(panel, f"undetermined: {gate}")[0].get_hatch() for gate in gated["gate"].unique()}) == 3
    assert len(bars(panel, "in place")) == 1
    assert panel.get_title(loc="left").startswith("gpt-untrained: undetermined (no fall)\n")


def test_merged_neighbours_are_one_bar_as_wide_as_the_group(tmp_path: Path) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6}, ("1",))
    kept = bars(draw(run).axes[0], "kept")
    assert [round(bar.get_width()) for bar in kept] == list(blocks_of(run, "gpt")["blocks"]) == [1, 2, 1, 1]


def test_of_several_seeds_the_mean_is_drawn_and_every_seed_as_a_thin_line(tmp_path: Path) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6}, ("0", "1", "2"))  # seed 1 merges layers 1 to 3
    frame = profile_frame(run)
    rows = blocks_of(run, "gpt")
    for _, block in frame[frame["part"] == "block"].iterrows():
        covering = rows[(rows["from_layer"] <= block["from_layer"]) & (rows["to_layer"] >= block["to_layer"])]
        values = 1 - covering["carried"].to_numpy(float)
        assert len(values) == 3
        assert block["in_place"] == pytest.approx(values.mean())
        half = stats.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
        assert (block["in_place_low"], block["in_place_high"]) == pytest.approx(
            (values.mean() - half, values.mean() + half)
        )
    panel = draw(run).axes[0]
    thin = [lines for lines in panel.collections if lines.get_alpha() == 0.7]
    segments = [tuple(s[:, 1]) for lines in thin for s in lines.get_segments()]
    assert len(segments) == len(rows) * len(STRIPS)
    drawn = sorted(y for y, _ in segments)
    wanted = [*KEEPS.at(rows["clarity"]), *ADDS.at(1 - rows["carried"].astype(float)), *NEWS.at(rows["news"])]
    assert drawn == pytest.approx(sorted(wanted))


def test_a_block_that_some_seeds_do_not_pass_says_how_many(tmp_path: Path) -> None:
    def one_gate(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["seed"] == "2") & (table["from_layer"] == 3), "gate"] = "no room"
        return table

    run = edit(decomposed_run(tmp_path, {"gpt": 6}, ("0", "1", "2")), "blocks.csv", one_gate)
    (block,) = profile_frame(run).query("part == 'block' and gate != ''").to_dict("records")
    rows = blocks_of(run, "gpt").query("from_layer == 3 and gate.isna()")
    assert (block["passed"], block["seeds"]) == (2, 3)
    assert block["in_place"] == pytest.approx(1 - rows["carried"].astype(float).mean())
    assert len(bars(draw(run).axes[0], "undetermined: no room at some seeds")) == 1
    assert "3-4 no room (1 of 3 seeds)" in printed(run, bars=False)


def test_a_share_beyond_zero_and_one_ends_at_the_edge_of_its_strip(tmp_path: Path) -> None:
    def far(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[0, ["carried", "carried_ci_low", "carried_ci_high"]] = [-3.0, -4.0, 5.0]
        return table

    panel = draw(edit(decomposed_run(tmp_path, {"gpt": 3}), "blocks.csv", far)).axes[0]
    assert bars(panel, "in place")[0].get_height() == ADDS.height
    assert "^" in {line.get_marker() for line in panel.lines}
    everything = [y for lines in panel.collections for s in lines.get_segments() for y in s[:, 1]]
    assert max(everything) <= panel.get_ylim()[1]


def test_landmarks_are_grey_lines_with_their_names_and_the_undetermined_ones_are_named(of_four: Figure) -> None:
    for panel in of_four.axes:
        lines = {(line.get_label(), line.get_ydata()[0]) for line in panel.lines if line.get_label().startswith("+")}
        wanted = {(f"+{name}", float(KEEPS.at(clarity))) for name, (_, clarity) in VIEWS.items()}
        wanted |= {(f"+{name}", float(ADDS.at(share))) for name, (share, _) in VIEWS.items() if share is not None}
        assert lines == wanted
        boxes = [Text.get_window_extent(text) for text in panel.texts if text.get_text().startswith("+")]
        assert len(boxes) == len(wanted)
        assert not any(a.overlaps(b.padded(-1)) for a, b in combinations(boxes, 2))
    assert "Undetermined in what they add: +rotated, +shuffled." in of_four.get_supxlabel().replace("\n", " ")


def test_a_model_that_was_not_decomposed_is_named_with_its_reason(tmp_path: Path) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6, "odd": 1})
    why = "undefined: an update needs two layers before the last"
    rows = [{"model": "odd", "seed": "0", "index": "in_place_without_layer0", "reason": why}]
    run = edit(run, "indices.csv", lambda table: pd.concat([table, pd.DataFrame(rows)]))
    drawing = draw(run)
    assert len(drawing.axes) == 1
    assert f"odd ({why})" in drawing.get_supxlabel().replace("\n", " ")
    assert why.split()[0] in printed(run, bars=True)
    assert f"odd ({why})" in profiles([run], [{"gpt": "gpt", "odd": "odd"}])


def test_a_run_without_the_decomposition_has_no_profile(tmp_path: Path) -> None:
    run = edit(decomposed_run(tmp_path, {"gpt": 6}), "blocks.csv", lambda table: table.iloc[:0])
    assert profile_frame(run).empty
    with pytest.raises(LensbenchError, match=r"no row in blocks\.csv"):
        plot_profile(run)
    assert profile_table(run, bars=True) is None
    assert profiles([run], [{"gpt": "gpt"}]) == ""


def test_the_planes_title_gives_the_verdicts_that_the_profile_of_the_same_run_gives() -> None:
    """A verdict needs more than a region: seeds that agree, and passed gates."""
    run = read_run(RESULTS / "standard" / "controls")
    frame = plane_frame(run)
    said = finding(frame)
    assert said == finding_of_profile(profile_frame(run))
    numbers = [int(number) for number in re.findall(r"\d+", said)]
    assert numbers[0] == sum(numbers[1:]) == run.tables["models.csv"]["model"].nunique()
    few = frame[frame["model"].isin(["gpt2", "gpt-untrained"])]
    assert finding(few) == "Added up in one representation: gpt2; undetermined: gpt-untrained"
    assert finding(frame[frame["part"] != "verdict"]).endswith("?")


def test_a_plane_without_a_decomposition_gives_the_verdicts_of_lenses_held_fixed():
    run = read_run(RESULTS / "probes" / "small")
    frame = plane_frame(run)
    own = frame[frame["part"] == "model"]
    assert not own["index"].str.startswith("in_place").any()
    said = finding(frame)
    assert said.startswith("With lenses held fixed, of 6 models, ")
    verdicts = shown_seeds(run.tables["verdicts.csv"]).query("scope == 'without layer 0'")["fixed_lens_verdict"]
    for verdict, count in verdicts.value_counts().items():
        assert f" {count} {verdict}" in said
    few = frame[frame["model"].isin(list(own["model"].unique()[:2]))]
    assert finding(few).startswith("With lenses held fixed, ")


def test_a_model_without_a_y_is_named_and_not_drawn_where_its_place_would_be_an_answer(tmp_path: Path) -> None:
    """At the bottom of the plane it would lie in the region of re-representation."""
    run = decomposed_run(tmp_path, {"gpt": 6, "empty": 6})
    x, y = "gain_visibility", "shared_consistency"
    rows = [("gpt", x, 0.5), ("gpt", y, 0.7), ("empty", x, None), ("empty", y, None)]
    rows = [{"model": model, "seed": "0", "index": index, "value": value} for model, index, value in rows]
    run = edit(run, "indices.csv", lambda table: pd.concat([table, pd.DataFrame(rows)]))
    with style():
        drawing = plane(plane_frame(run))
    assert not [line for line in drawing.axes[0].lines if line.get_label() == "undetermined"]
    assert [text.get_text() for text in drawing.axes[0].texts if text.get_weight() == "bold"] == ["gpt"]
    assert "Undefined along y, and not drawn: empty (all layers)." in drawing.get_supxlabel().replace("\n", " ")


def test_models_that_lie_on_each_other_are_named_in_a_close_up_alone() -> None:
    runs = together([read_run(RESULTS / "standard" / part) for part in ("gpt", "pc", "controls")])
    frame = plane_frame(runs)
    near = crowd(frame[frame["part"] == "model"], VIEWS_OF_PLANE[-1])
    assert {"gpt", "pc", "pc+state"} <= set(near)
    assert "gpt-partitioned" not in near
    with style():
        far, close = plane(frame).axes[2:]
    bold = [[text.get_text() for text in panel.texts if text.get_weight() == "bold"] for panel in (far, close)]
    assert sorted(bold[1]) == sorted(near)
    assert not set(bold[0]) & set(near)
    boxes = [text.get_window_extent() for text in close.texts if text.get_weight() == "bold"]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_run_without_landmarks_has_no_column_for_them(tmp_path: Path) -> None:
    run = edit(decomposed_run(tmp_path, {"gpt": 6}), "landmarks.csv", lambda table: table.iloc[:0])
    assert "its own landmarks" not in printed(run, bars=False)


def numbers_of(panel: Axes) -> list[Text]:
    return [text for text in panel.texts if re.fullmatch(r"\N{MINUS SIGN}?\d*\.\d\d", text.get_text())]


def test_numbers_stand_upright_where_they_fit_and_are_turned_in_the_bars_of_a_deep_model(tmp_path: Path) -> None:
    for model, layers, angle in (("gpt", 6, 0), ("smollm2", 30, 90)):
        panel = draw(decomposed_run(tmp_path / model, {model: layers})).axes[0]
        blocks = [text for text in numbers_of(panel) if text.get_gid().startswith("block")]
        assert len(blocks) >= 2 * (layers - 2)
        assert {text.get_rotation() for text in blocks} == {angle}
        boxes = [text.get_window_extent() for text in blocks]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_what_leaves_a_strip_has_an_arrowhead_and_the_caption_says_so(tmp_path: Path) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6})
    none = draw(run)
    assert "Arrowheads" not in none.get_supxlabel()

    def far(table: pd.DataFrame) -> pd.DataFrame:
        """News of one block leaves at the top, its interval at both ends; of another the interval alone."""
        table.loc[table.index[:2], ["news", "news_ci_low", "news_ci_high"]] = [[3.0, -2.0, 8.0], [0.5, 0.2, 1.5]]
        return table

    drawing = draw(edit(run, "blocks.csv", far))
    assert "Arrowheads: a value (filled), or an end of its interval (open)" in drawing.get_supxlabel().replace(
        "\n", " "
    )
    heads = [
        (line.get_marker(), line.get_markerfacecolor() == "white", line.get_xdata()[0])
        for line in drawing.axes[0].lines if line.get_marker() in ("^", "v")
    ]  # fmt: skip
    assert sorted(heads, key=lambda head: head[::-1])[:3] == sorted(
        [("^", False, 0.5), ("v", True, 0.5), ("^", True, 1.5)], key=lambda head: head[::-1]
    )


MANY = dict.fromkeys(["gpt", "gpt-partitioned", "gpt-conv+rotated", "gpt-untrained", "pc", "pc+state", "cnn", "vit"], 6)


@pytest.mark.parametrize(
    "models",
    [
        {"gpt": 6},
        pytest.param({"smollm2": 30}, marks=pytest.mark.slow),
        pytest.param({"gpt": 6, "smollm2": 30}, marks=pytest.mark.slow),
        pytest.param(dict(list(MANY.items())[:3]), marks=pytest.mark.slow),
        pytest.param({**MANY, "cnn": 30}, marks=pytest.mark.slow),
    ],
    ids=lambda models: f"{len(models)} models, {max(models.values())} layers",
)
@pytest.mark.parametrize(
    "columns", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)]
)
def test_nothing_written_lies_on_anything_else_written(
    tmp_path: Path, models: dict[str, int], columns: int | None
) -> None:
    drawing = draw(decomposed_run(tmp_path, models), columns)
    panels = drawing.axes
    written = [text for panel in panels for text in panel.findobj(Text) if text.get_visible()]
    written += [text for legend in drawing.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in written if text.get_text().strip()]
    for (a, one), (b, other) in combinations(boxes, 2):
        wide = min(one.x1, other.x1) - max(one.x0, other.x0)
        high = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert wide <= 1 or high <= 2, (a, b)
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= drawing.bbox.width + 1, text


# The terminal and the page


def printed(run: Run, *, bars: bool) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(profile_table(run, bars=bars))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_has_a_bar_per_block_and_plain_text_its_number(four: Run) -> None:
    lines = printed(four, bars=True).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    kept = [cell[2].split() for cell in cells if cell[1] == "keeps (clarity)"]
    for model, glyphs in zip(FOUR, kept, strict=True):
        wanted = [BARS[round(min(x, 1) * 7)] for x in blocks_of(four, model)["clarity"]]
        assert glyphs == wanted
    in_place = [cell[2].split() for cell in cells if cell[1].startswith("adds in place")]
    assert in_place[0] == ["█"] * 5
    assert in_place[1] == ["▁"] * 5
    assert in_place[3][1:] == ["?"] * 4
    assert "1-2 no room, 2-3 not kept, 3-4 no fall, 4-5 no room" in printed(four, bars=True)
    plain = printed(four, bars=False)
    assert not set(BARS) & set(plain)
    assert " ".join(f"{x:.2f}" for x in blocks_of(four, "gpt")["clarity"]) in plain


def test_a_merged_group_is_as_wide_in_the_terminal_as_its_layers(tmp_path: Path) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6}, ("1",))
    assert "██" in printed(run, bars=True)
    assert "(1-3)" in printed(run, bars=False)


def test_the_page_draws_every_block_with_its_numbers(four: Run) -> None:
    read = Read(str(profiles([four], [{model: f"{model} here" for model in FOUR}])))
    pictures = [a for tag, a in read.tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(pictures) == len(FOUR)
    assert all(len(a["aria-label"]) > 60 for a in pictures)
    for model in FOUR:
        for _, row in blocks_of(four, model).iterrows():
            where = f"{model} here, layers {row['from_layer']} to {row['to_layer']}\n"
            tips = {tip for tip in read.tips if tip.startswith(where)}
            assert len(tips) == 1
            (tip,) = tips
            # Intervals are 0.1 wide: two decimals.
            assert f"keeps (clarity) {row['clarity']:.2f} [" in tip
            share = f"{round(1 - row['carried'], 2) + 0.0:.2f} ["
            said = f"undetermined: {row['gate']}" if pd.notna(row["gate"]) else share
            assert f"adds in place {said}" in tip
    opened = [a for tag, a in read.tags if tag == "rect" and a.get("class") == "open"]
    assert len(opened) == 4 + 1  # the gated blocks, and the bar of all


# The plane


def test_the_plane_has_the_regions_of_the_runs_own_rule_and_the_landmarks_open_where_undetermined(
    tmp_path: Path,
) -> None:
    run = decomposed_run(tmp_path, {"gpt": 6})
    known = {"gain_visibility": 0.5, "shared_consistency": 0.7, "movement": 1.0}
    known |= {f"{name}_without_layer0": value for name, value in known.items()}
    rows = [{"model": "gpt", "seed": "0", "index": name, "value": value} for name, value in known.items()]
    run = edit(run, "indices.csv", lambda table: pd.concat([table, pd.DataFrame(rows)]))
    run.manifest.suite.verdict.update({"visible": 0.4, "consistent": 0.6, "update": {"added": 0.7, "carried": 0.2}})
    with style():
        panels = plane(plane_frame(run)).axes
    assert len(panels) == len(VIEWS_OF_PLANE)
    for panel in panels[:2]:
        region = next(patch for patch in panel.patches if patch.get_label() == "refinement")
        assert region.get_xy() == (0.4, 0.6)
    regions = {patch.get_label(): patch for patch in panels[2].patches}
    assert regions["added up"].get_x() == 0.7
    assert (regions["mixed"].get_x(), regions["mixed"].get_x() + regions["mixed"].get_width()) == pytest.approx(
        (0.2, 0.7)
    )
    assert regions["carried along"].get_x() + regions["carried along"].get_width() == pytest.approx(0.2)
    marks = {line.get_label(): line for line in panels[2].lines if line.get_label().startswith("+")}
    assert set(marks) == {f"+{name}" for name in VIEWS}
    for name, (in_place, clarity) in VIEWS.items():
        mark = marks[f"+{name}"]
        assert mark.get_ydata()[0] == clarity
        assert (mark.get_markerfacecolor() == "white") == (in_place is None)
        if in_place is not None:
            assert mark.get_xdata()[0] == in_place
