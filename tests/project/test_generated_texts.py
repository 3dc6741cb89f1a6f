"""Pages are what their templates give, numbers are rounded as their intervals allow, and words that no longer hold fail."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.texts.lenses import LensResults, in_words, named
from benchmarks.texts.numbers import Number, TextError, claim
from benchmarks.texts.pages import differing_pages, environment, page_names, rendered, write_pages
from benchmarks.texts.tables import Results
from lensbench.measures.update.verdict import UpdateRule

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "results"


@pytest.mark.results
@pytest.mark.timeout(600)
def test_the_committed_pages_are_what_the_command_writes():
    assert list(differing_pages()) == []


@pytest.mark.results
def test_differences_are_those_of_compare(standard_comparison):
    table = standard_comparison.table
    table = table[(table["kind"] == "difference") & (table["seed"] == "all")]
    parts = Results(RESULTS, ("standard/gpt", "standard/pc", "standard/controls"))
    for model, against, index in (
        ("pc+state", "gpt-conv", "shared_consistency"), ("gpt-noskip", "gpt", "clarity_without_layer0"),
    ):  # fmt: skip
        ours = parts.index_difference(model, against, index)
        for sign, one, other in ((1, model, against), (-1, against, model)):
            rows = table[(table["model"] == one) & (table["against_model"] == other) & (table["index"] == index)]
            for row in rows.to_dict("records"):
                assert sign * row["value"] == pytest.approx(ours.value)
                assert sorted([sign * row["ci_low"], sign * row["ci_high"]]) == pytest.approx([ours.low, ours.high])


@pytest.mark.parametrize(
    ("value", "low", "high", "written"),
    [
        (0.5803, 0.5223, 0.6381, "0.58 [0.52, 0.64]"),
        (1.00712, 0.99061, 1.02364, "1.007 [0.991, 1.024]"),
        (-10.155, -11.480, -8.830, "-10.2 [-11.5, -8.8]"),
        (28.987, 25.434, 33.102, "29 [25, 33]"),
        (-0.0001, -0.0004, 0.0003, "0.000 [0.000, 0.000]"),
        (1234.5, 1000.0, 1500.0, "1,234 [1,000, 1,500]"),
    ],
)
def test_the_last_digit_of_a_number_is_worth_at_most_half_of_its_intervals_half_width(value, low, high, written):
    number = Number(value, low, high, "x")
    assert str(number) == written
    assert 10.0**-number.decimals <= (high - low) / 4 * 1.0001 or number.decimals == 3


def test_words_that_the_numbers_no_longer_support_are_refused():
    rise = Number(0.2, -0.1, 0.5, "rise of gpt")
    assert claim("hardly rises", rise.holds(0)) == "hardly rises"
    said = r"no longer support 'rises': rise of gpt \(0\.2 \[-0\.1, 0\.5\]\) does not lie above 0"
    with pytest.raises(TextError, match=said):
        claim("rises", rise.above(0))
    with pytest.raises(TextError, match="claimed without a condition"):
        claim("rises")


def environment_of(tmp_path, template):
    (tmp_path / "page.md.j2").write_text(template)
    return environment(RESULTS, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ('results("nowhere")', "results/nowhere is missing"),
        ('results("quick").index("gpt", "nonsense")', "quick: indices.csv has no row with model gpt, index nonsense"),
        ('results("quick").loss("gtp")', "quick: models.csv has no row with model gtp"),
        ('studies.row("calibration/none.csv", a=1)', "results/calibration/none.csv is missing"),
        ("nonsense(1)", "'nonsense' is undefined"),
    ],
)
def test_what_is_missing_is_told_in_one_line_with_the_line_of_the_template(tmp_path, asked, message):
    made = environment_of(tmp_path, f"# Title\n\ntext {{{{ {asked} }}}}\n")
    with pytest.raises(TextError) as error:
        rendered(made, "page.md")
    assert str(error.value) == f"page.md.j2, line 3: {message}"


def test_a_number_follows_the_results(tmp_path):
    folder = shutil.copytree(RESULTS / "update-calibration", tmp_path / "results" / "update-calibration")
    (tmp_path / "page.md.j2").write_text('{{ studies.right("held_out", "news", "committed") }}\n')
    before = rendered(environment(tmp_path / "results", tmp_path), "page.md")
    table = pd.read_csv(folder / "right.csv")
    table.loc[(table["set"] == "held_out") & (table["family"] == "news"), "committed"] = 0.94
    table.to_csv(folder / "right.csv", index=False)
    after = rendered(environment(tmp_path / "results", tmp_path), "page.md")
    assert before.replace("1.00 [", "0.94 [") == after != before


def test_a_page_is_written_where_it_differs_and_told_where_it_does(tmp_path):
    (tmp_path / "templates" / "guides").mkdir(parents=True)
    (tmp_path / "templates" / "guides" / "page.md.j2").write_text("one\n{{ 1 + 1 }}\n")
    places = {"root": tmp_path, "results": RESULTS, "templates": tmp_path / "templates"}
    name = "guides/page.md"
    told = f"{name}, line 1: not what its template and results/ give; run python -m benchmarks.texts"
    assert list(differing_pages(**places)) == [told]
    assert list(write_pages(**places)) == [f"written: {name}"]
    assert (tmp_path / name).read_text().splitlines()[1:] == ["one", "2"]
    assert list(write_pages(**places)) == list(differing_pages(**places)) == []
    (tmp_path / name).write_text((tmp_path / name).read_text()[:-2] + "3\n")
    assert list(differing_pages(**places)) == [told.replace("line 1", "line 3")]


def test_a_page_of_runs_that_are_not_there_is_no_page_until_they_are(tmp_path):
    templates, results = tmp_path / "templates", tmp_path / "results"
    templates.mkdir()
    (templates / "a.md.j2").write_text("{# needs one two #}\n{{ 1 / 0 }}\n")
    (templates / "b.md.j2").write_text("b\n")
    for name in ("one", "two"):
        assert page_names(results, templates) == ["b.md"]
        (results / name).mkdir(parents=True)
        (results / name / "manifest.json").write_text("{}")
    assert page_names(results, templates) == ["a.md", "b.md"]


class MadeUpLenses(LensResults):
    """A model of three layers of which each lens's KL is given, with intervals of +-0.1."""

    def __init__(self, kl):
        self.kl, self.names = kl, ("made up",)

    def table(self, name):
        if name == "models.csv":
            return pd.DataFrame({"model": ["it"], "seed": ["0"], "layers": [3]})
        rows = [
            {"model": model, "seed": "0", "lens": lens, "stage": stage, "layer": k, "kl": kl}
            for (model, lens, stage), kls in self.kl.items()
            for k, kl in enumerate(kls)
        ]
        table = pd.DataFrame(rows)
        return table.assign(kl_ci_low=table["kl"] - 0.1, kl_ci_high=table["kl"] + 0.1)


def test_a_lens_is_behind_or_ahead_where_intervals_are_apart():
    jacobian, logit, shared = ("jacobian", "backward"), ("logit", "none"), ("shared_jacobian", "backward")
    lenses = MadeUpLenses(
        {
            ("it", *jacobian): [2.0, 1.0, 0.25],
            ("it", *logit): [1.0, 0.9, 0.8],
            ("it", *shared): [0.5, 0.5, 0.5],
            ("it+rotated", *shared): [0.6, 0.9, 0.9],
            ("it", "tuned", "closed"): [0.1, 0.1, 0.1],
        }
    )
    assert lenses.behind("it", jacobian, logit) == [0]
    assert lenses.ahead("it", jacobian, logit) == [2]
    assert lenses.ahead("it", shared, shared, null=True) == [1, 2]
    assert lenses.everywhere(ahead=False, lens=jacobian, against=("tuned", "closed")) == []
    assert lenses.compared().splitlines()[2] == "| `it` | 0 | 2 | 0, 1 | 1, 2 | 2 |"
    assert lenses.by_layer("it").splitlines()[2].endswith("| 0.50 [0.40, 0.60] | 0.60 [0.50, 0.70] |")


class MadeUpRanks(LensResults):
    """A sweep of ranks 0, 1, 2, 4, 8, 12 of which the top-10 precision is given, and top-1 of three layers of a lens."""

    def __init__(self, top10, top1=(), errors=()):
        self.top10, self.top1, self.errors, self.names = top10, top1, errors, ("made up",)

    def table(self, name):
        who, ends = {"model": "it", "seed": "0"}, {"top1_ci_low": None, "top1_ci_high": None}
        if name == "models.csv":
            return pd.DataFrame([who | {"layers": 3}])
        if name == "lenses.csv":
            return pd.DataFrame([
                who | ends | {"lens": "jacobian", "stage": "backward", "layer": k, "top1": top1, "jacobian_error": error}
                for k, (top1, error) in enumerate(zip(self.top1, self.errors, strict=True))
            ])  # fmt: skip
        ranks = (0, 1, 2, 4, 8, 12)
        return pd.DataFrame([
            who
            | {"quantity": f"rank_{score}_tuned", "layer": None, "other": rank}
            | {"value": value, "ci_low": None, "ci_high": None}
            for score in ("kl", "top10")
            for rank, value in zip(ranks, self.top10, strict=True)
        ])  # fmt: skip


def test_the_rank_that_a_lens_needs_is_the_least_of_the_sweep_with_its_share_of_what_the_whole_lens_has():
    lenses = MadeUpRanks((0.1, 0.3, 0.56, 0.79, 0.8, 0.8))
    assert lenses.ranks("it") == [0, 1, 4, 12]
    assert [lenses.rank_needed("it", "tuned", share) for share in (0.95, 0.7, 1.0)] == [4, 2, 8]
    table = lenses.shortcuts("it", "top10").splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        ["| 0", "0.100"],
        ["| 1", "0.300"],
        ["| 4", "0.790"],
        ["| 12", "0.800"],
    ]
    assert table[2].endswith("| - | - | - | - |")


def test_an_exit_is_the_first_layer_from_which_a_lens_is_right_often_enough_at_all_later_ones():
    lens = ("jacobian", "backward")
    tops = ((0.96, 0.5, 0.97), (0.96, 0.97, 0.98), (0.5, 0.6, 0.7))
    assert [MadeUpRanks((), top1, (0.1,) * 3).first_exit("it", lens, 0.95) for top1 in tops] == [2, 0, None]


def test_errors_of_jacobians_are_shown_where_they_are_known_and_finite():
    lenses = MadeUpRanks((), (1.0,) * 4, (0.05, float("inf"), float("nan"), 0.2))
    assert [lenses.error("it", k) for k in range(4)] == ["0.05", "all noise", "one prompt: unknown", "0.2"]
    assert lenses.undecided("it", 0.1) == [1, 2, 3]


def test_layers_and_models_in_words():
    assert [in_words(k, 5) for k in ([], range(5), [3, 1, 2], [0, 2], [0, 1])] == [
        "none",
        "all",
        "1 to 3",
        "0, 2",
        "0, 1",
    ]
    assert [named(k) for k in ([], ["a"], ["a", "b", "c"])] == ["no model", "`a`", "`a`, `b` and `c`"]


def test_no_page_says_twice_where_it_comes_from():
    for page in ROOT.rglob("*.md"):
        assert len(re.findall(r"<!-- Written by `python -m benchmarks\.texts`", page.read_text())) <= 1, page


def test_the_page_on_verdicts_has_the_defaults_of_the_rule():
    page = " ".join((ROOT / "benchmarks" / "update-decomposition.md").read_text().split())
    for name in ("added", "carried", "clear", "changed", "kept", "readable", "reach"):
        assert re.search(rf"`{name}` (is )?{getattr(UpdateRule(), name)}\b", page), name


def test_what_follows_a_table_is_not_taken_for_one_of_its_rows():
    """A line right after a table is its next row: a blank line has to come between."""
    for page in ROOT.rglob("*.md"):
        code, before = False, ""
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if line.startswith("```"):
                code = not code
            elif not code and before.startswith("|"):
                assert not line.strip() or line.startswith("|"), f"{page}, line {number}"
            before = line


def test_tables_of_whole_models_leave_out_those_that_nothing_is_known_of():
    class Known(LensResults):
        def __init__(self):
            pass

        def probed(self, model, quantity, layer=None, other=None):
            known = {("a", "exit_saved_tuned"): "0.2", ("a", "exit_kept_tuned"): "0.96", ("b", "share"): "0.5"}
            return known.get((model, quantity), "-")

    table = Known().of_models(["a", "b"], {"share": "its share"}).splitlines()
    assert table == ["| model | its share |", "| --- | --- |", "| `b` | 0.5 |"]
    exits = Known().exits(["a", "b"], 95).splitlines()
    assert exits[2:] == ["| `a` | a lens per layer | 0.2 | 0.96 | - | - |"]
