"""The numbers of studies (calibrations, tasks, regressions, speed), for templates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.texts.numbers import Number, TextError, UndefinedNumber, markdown
from lensbench.results.folder import table_file
from lensbench.studies.update_token_tables import NEAR


class Studies:
    """Tables that studies wrote under one root; every method raises :class:`TextError` where a row is missing."""

    def __init__(self, root: Path):
        self.root, self.read = root, {}

    def table(self, path: str) -> pd.DataFrame:
        """A CSV file, packed or not, read once."""
        if path not in self.read:
            place = self.root / path
            found = table_file(place.parent, place.name)
            if found is None:
                raise TextError(f"results/{path} is missing")
            self.read[path] = pd.read_csv(found, keep_default_na=False, na_values=[""])
        return self.read[path]

    def row(self, path: str, **keys: Any) -> Any:
        """The one row with these values; a value of None asks for an empty cell."""
        rows = self.table(path)
        for key, value in keys.items():
            rows = rows[rows[key].isna() if value is None else rows[key].astype(str) == str(value)]
        if len(rows) != 1:
            said = ", ".join(f"{key} {value}" for key, value in keys.items())
            raise TextError(f"results/{path} has {len(rows)} rows with {said}, not one")
        return rows.iloc[0]

    def number(self, path: str, column: str = "value", **keys: Any) -> Number:
        """A column of the one row with these values, with its interval where it has one."""
        row = self.row(path, **keys)
        what = f"{column} of {', '.join(str(value) for value in keys.values())} ({path})"
        if pd.isna(row[column]):
            raise UndefinedNumber(f"{what} is undefined")
        prefix = "" if column == "value" else f"{column}_"
        ends = (row.get(f"{prefix}ci_{end}") for end in ("low", "high"))
        low, high = (None if end is None or pd.isna(end) else float(end) for end in ends)
        return Number(float(row[column]), low, high, what)

    def jacobian_cost(self, path: str, model: str) -> str:
        """A heading and a table of what Jacobian lenses of a model cost next to tuned ones."""
        rows = []
        for row in self.table(path).to_dict("records"):
            about = "about " if row["estimated"] else ""
            known = not pd.isna(row["prompts_to_precision"])
            rows.append([
                row["method"],
                f"{row['prompts']}" if row["prompts"] else "-",
                f"{row['passes_per_prompt']:.3g}",
                f"{about}{_short(row['seconds_per_prompt'])}",
                f"{about}{_short(row['seconds_by_closed'])}",
                "-" if pd.isna(row["peak_gib"]) else f"{row['peak_gib']:.2f}",
                "-" if pd.isna(row["error_worst"]) else f"{row['error_worst']:.2g}",
                f"{row['prompts_to_precision']:,.0f}" if known else "-",
                _short(row["seconds_to_precision_by_closed"]) if known else "-",
            ])  # fmt: skip
        heads = ["method", "prompts", "passes of a prompt", "seconds of a prompt", "by closed form", "peak GiB more"]
        heads += ["error of J", "prompts to 0.1", "seconds of these, by closed form"]
        return f"{model}:\n\n{markdown(heads, rows)}"

    def whole_commands(self, path: str) -> str:
        """A table of what whole commands took, by preset."""
        table = self.table(path)
        rows = []
        for preset, of_preset in table.groupby("preset", sort=False):
            stages = of_preset.set_index("stage")
            whole = stages.loc["the whole command"]
            first = stages.loc[
                [name for name in stages.index if name.startswith(("begin-", "update-"))], "seconds"
            ].sum()
            minutes = [f"{seconds / 60:.1f}" for seconds in (whole["seconds"], whole["predicted"], first)]
            rows.append([f"`{preset}`", *minutes, f"{whole['peak_gib']:.1f}"])
        return markdown(
            ["preset", "minutes", "predicted", "until the decomposition is there", "peak memory, GiB"], rows
        )

    def whole_minutes(self, path: str, preset: str) -> str:
        """How many minutes the whole command took with a preset."""
        table = self.table(path)
        (seconds,) = table.loc[(table["preset"] == preset) & (table["stage"] == "the whole command"), "seconds"]
        return f"{seconds / 60:.0f}"

    def algebra(self, path: str) -> str:
        """A table of what the algebra of a fit takes for each layer of the model, by width, before and now."""
        table, rows = self.table(path), []
        for row in table[table["part"] == "a fit, for each layer"].to_dict("records"):
            sizes = [row["memory_gib_before"], row["memory_gib_after"], row["disk_gib_after"]]
            rows.append([
                f"{row['d']}",
                f"{row['seconds_before']:.2g}" if row["seconds_before"] < 100 else f"{row['seconds_before']:.0f}",
                f"{row['seconds_after']:.2g}" if row["seconds_after"] < 100 else f"{row['seconds_after']:.0f}",
                *(f"{1024 * size:.2g} MiB" if size < 0.09 else f"{1024 * size:.0f} MiB" for size in sizes),
            ])  # fmt: skip
        heads = ["width", "seconds of one core, before", "now", "memory, before", "now", "on disk, now"]
        return markdown(heads, rows)

    def algebra_difference(self, path: str) -> str:
        """The largest difference of maps made in both ways, relative to their largest entry."""
        largest = self.table(path)["difference"].max()
        power = math.floor(math.log10(largest))
        return f"{math.ceil(largest / 10**power)}e{power}"

    def equal_kl(self, path: str) -> str:
        """A table of how soon closed forms and refinement reach the KL of tuned-lens's recipe, by lens."""
        rows = []
        for lens in dict.fromkeys(self.table(path)["lens"]):
            refined, closed = (self.row(path, lens=lens, stage=stage) for stage in ("refined", "closed"))
            there = [
                str(self.number(path, f"{when}_less_recipe", lens=lens, stage="refined"))
                if not pd.isna(refined[f"{when}_less_recipe"])
                else missing
                for when, missing in (("within", "takes longer"), ("equal", "not reached"))
            ]
            tokens = "-" if pd.isna(refined["equal_tokens"]) else f"{refined['equal_tokens']:,.0f}"
            rows.append([str(lens), f"{refined['recipe_kl']:.3f}", *there, tokens, _times(refined), _times(closed)])
        heads = ["lens", "recipe", "refined, in 1/100 of its seconds", "refined, at equal KL", "from tokens", "sooner"]
        return markdown([*heads, "closed form alone, sooner"], rows)

    def sooner(self, path: str, times: float) -> list[str]:
        """The lenses whose refinement reaches the recipe's KL in a share of its seconds: at least so many times sooner."""
        table = self.table(path)
        refined = table[table["stage"] == "refined"]
        return [str(lens) for lens in refined.loc[refined["equal_times_faster"] >= times, "lens"]]

    def fitting_windows(self, path: str, eval_positions: int) -> str:
        """A table of lenses from windows with few positions and with many, as many tokens from each."""
        table = self.table(path)
        rows = []
        for row in table[table["eval_positions"] == eval_positions].to_dict("records"):
            keys = {"positions": row["positions"], "eval_positions": eval_positions}
            less = "-" if pd.isna(row["difference"]) else str(self.number(path, "difference", **keys))
            rows.append([
                str(row["positions"]),
                f"{row['windows']:.0f}",
                _short(row["cpu_seconds"]),
                f"{row['effective_clusters']:.0f}",
                less,
                *(_thousandths(row.get(name)) for name in ("kl_sd", "in_place", "half_width", "of_eval", "of_refits")),
            ])  # fmt: skip
        heads = ["positions", "windows", "seconds", "clusters", "KL, less the first", "sd over draws", "added in place"]
        return markdown([*heads, "half-width", "of held-out clusters", "of refits"], rows)

    def half_products(self, path: str) -> str:
        """A table of what products in float16 gain and change."""
        rows = [
            [
                row["part"],
                *(_short(row[f"seconds_{name}"]) for name in ("single", "half")),
                f"{row['ratio']:.1f}",
                str(Number(*(1000 * row[name] for name in ("change", "change_ci_low", "change_ci_high")), row["part"])),
                f"{1000 * row['rms']:.1f}",
            ]
            for row in self.table(path).to_dict("records")
        ]
        heads = [
            "",
            "seconds in float32",
            "in float16",
            "times as fast",
            "mean change, 1e-3 nats",
            "rms over tokens, 1e-3 nats",
        ]
        return markdown(heads, rows)

    def held_out_windows(self, path: str, positions: int) -> str:
        """A table of intervals from held-out windows with few positions and with many, as many tokens from each."""
        table = self.table(path)
        rows = [
            [
                str(row["eval_positions"]),
                f"{row['eval_windows']:.0f}",
                _short(row["eval_cpu_seconds"]),
                f"{row['eval_effective_clusters']:.0f}",
                *(_thousandths(row[name]) for name in ("kl", "kl_half_width", "in_place", "half_width", "of_eval")),
            ]
            for row in table[table["positions"] == positions].sort_values("eval_positions").to_dict("records")
        ]
        heads = ["positions", "windows", "seconds", "clusters", "KL", "half-width", "added in place", "half-width"]
        return markdown([*heads, "of held-out clusters"], rows)

    def differences(self, path: str, indices: Sequence[str]) -> str:
        """A table of differences between two runs of one seed, with their notes, as ``compare --out`` writes them."""
        rows = []
        for index in indices:
            keys = {"kind": "difference", "index": index, "seed": 0}
            row = self.row(path, **keys)
            note = "-" if pd.isna(row["note"]) else str(row["note"])
            paired = "yes" if row["paired"] else "no"
            rows.append([f"`{index}`", str(self.number(path, **keys)), paired, note])
        return markdown(["index", "difference", "paired", "note"], rows)

    def right(self, group: str, family: str, column: str) -> Number:
        """A share of ``update-calibration/right.csv``: ``committed`` or ``right_when_committed``."""
        return self.number("update-calibration/right.csv", column, set=group, family=family)

    def called(self, group: str, families: Sequence[str], verdict: str) -> tuple[int, int]:
        """How many streams of some families got a verdict, and how many there are."""
        rows = [self.row("update-calibration/right.csv", set=group, family=family) for family in families]
        return int(sum(row[verdict] for row in rows)), int(sum(row["streams"] for row in rows))

    def families(self, group: str) -> list[str]:
        """The families of a set of streams, without those of all."""
        table = self.table("update-calibration/right.csv")
        of = table.loc[table["set"] == group, "family"]
        return [name for name in of if not name.startswith("all")]

    def families_table(self, group: str, families: Sequence[str]) -> str:
        """How often the rule gives a verdict on each family, how often it is right, and what it says."""
        answers = {
            "added up": "added up in one representation",
            **{name: name for name in ("carried along", "re-represented", "mixed", "undetermined")},
        }
        body = []
        for family in families:
            row = self.row("update-calibration/right.csv", set=group, family=family)
            shares = [
                "none" if pd.isna(row[column]) else str(self.right(group, family, column))
                for column in ("committed", "right_when_committed")
            ]
            body.append([f"`{family}`", *shares, *(str(row[column]) for column in answers.values())])
        return markdown(["family", "verdict given", "right when given", *answers], body)

    def coverage(self, group: str, quantity: str, truth: str, family: str = "all") -> Number:
        """How often an interval holds the truth."""
        path = "update-calibration/coverage.csv"
        return self.number(path, "covered", quantity=quantity, truth=truth, set=group, family=family)

    def least_covered(self, group: str, quantity: str, truth: str) -> tuple[str, Number]:
        """The family whose intervals hold the truth least often."""
        table = self.table("update-calibration/coverage.csv")
        rows = table[(table["set"] == group) & (table["quantity"] == quantity) & (table["truth"] == truth)]
        rows = rows[~rows["family"].str.startswith("all")]
        family = str(rows.loc[rows["covered"].idxmin(), "family"])
        return family, self.coverage(group, quantity, truth, family)

    def coverage_table(self, group: str, rows: Sequence[tuple[str, str]]) -> str:
        """How often intervals hold a truth, over all streams of a set and in the family that is covered least."""
        body = []
        for quantity, truth in rows:
            row = self.row("update-calibration/coverage.csv", quantity=quantity, truth=truth, set=group, family="all")
            family, least = self.least_covered(group, quantity, truth)
            cells = [f"{row[name]:.3f}" for name in ("rms", "bias")]
            held = str(self.coverage(group, quantity, truth))
            body.append([f"`{quantity}`", truth, str(row["streams"]), held, *cells, f"`{family}` {least}"])
        return markdown(["quantity", "truth", "streams", "covered", "rms", "bias", "covered least"], body)

    def tokens_table(self, folder: str) -> str:
        """Fitting tokens that an interval of a given half-width takes, by family and width of the stream, and from what."""
        body = []
        for row in self.table(f"{folder}/needed.csv").to_dict("records"):
            if pd.isna(row["tokens"]):
                tokens, per_width = str(row["reason"]), ""
            else:
                how = "" if row["how"] == "measured" else f"{row['how']} "
                ends = [row[f"tokens_ci_{end}"] for end in ("low", "high")]
                within = "" if pd.isna(ends[0]) else f" [{', '.join(_rounded(end) for end in ends)}]"
                tokens, per_width = f"{how}{_rounded(row['tokens'])}{within}", f"{row['per_d']:.2g}"
            body.append([f"`{row['family']}`", str(row["d"]), tokens, per_width, self._half_widths(folder, row)])
        return markdown(["family", "width d", "fitting tokens", "per width", "mean half-widths at tokens"], body)

    def _half_widths(self, folder: str, row: dict[str, Any]) -> str:
        """The mean half-widths that a number of tokens is interpolated from: those that enter its line."""
        table = self.table(f"{folder}/tokens.csv")
        of = table[(table["family"] == row["family"]) & (table["d"] == row["d"])]
        known = of[
            (of["intervals"] >= of["streams"] / 2) & of["half_width"].between(row["asked"] / NEAR, row["asked"] * NEAR)
        ]
        if known.empty:  # the fewest tokens suffice by far
            known = of[of["half_width"].notna()].head(1)
        return ", ".join(f"{one['half_width']:.2g} at {one['fit_tokens']:,}" for one in known.to_dict("records"))


def _thousandths(value: float | None) -> str:
    """Three decimals; a dash for what is missing."""
    return "-" if value is None or pd.isna(value) else f"{value:.3f}"


def _rounded(tokens: float) -> str:
    """Two digits of a number of tokens."""
    return f"{float(format(tokens, '.2g')):,.0f}"


def _short(value: float) -> str:
    """Two digits, or all whole ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _times(row: Any) -> str:
    """How many times sooner than the recipe its KL is reached."""
    return "not reached" if pd.isna(row["equal_times_faster"]) else f"{row['equal_times_faster']:.0f}x"
