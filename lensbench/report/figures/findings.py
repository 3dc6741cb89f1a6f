"""What figures find, in the words of their titles."""

from collections.abc import Mapping, Sequence

import pandas as pd

from lensbench.report.claims import LEVEL
from lensbench.report.figures.style import MINUS

MOST_NAMED = 4
"""Models that a figure's title names; of more it gives the range, or counts them"""


def by_model(values: "pd.Series[float]", form: str = "{:.2g}") -> str:
    """A number of each model: ``0.08 (gpt), 0.02 (pc)``; of one model its number alone, of many the range."""
    texts = {str(model): form.format(value).replace("-", MINUS) for model, value in values.items()}
    if len(texts) > MOST_NAMED:
        low, high = (form.format(end).replace("-", MINUS) for end in (values.min(), values.max()))
        return low if low == high else f"{low} to {high}"
    return (
        ", ".join(f"{text} ({model})" for model, text in texts.items())
        if len(texts) > 1
        else next(iter(texts.values()))
    )


def models_or_count(models: Sequence[str], among: int) -> str:
    """The models by name, or how many they are among many."""
    return ", ".join(models) if among <= MOST_NAMED else f"{len(models)} of {among} models"


def verdicts_said(verdicts: Mapping[str, str], among: int) -> str:
    """The verdicts with their models, or how many models get each where there are many; ``among``: of so many models."""
    groups = {verdict: [m for m, given in verdicts.items() if given == verdict] for verdict in verdicts.values()}
    if among <= MOST_NAMED:
        return "; ".join(f"{verdict}: {', '.join(models)}" for verdict, models in groups.items())
    return f"of {among} models, " + ", ".join(f"{len(models)} {verdict}" for verdict, models in groups.items())


def lens_cost(frame: pd.DataFrame, unit: str) -> str:
    """What one lens for all layers costs over a lens per layer: the title of the figure of KL by layer."""
    wide = frame[frame["lens"].isin(["tuned", "shared"])].pivot_table(
        index=["model", "layer"], columns="lens", values="kl", sort=False
    )
    if not {"tuned", "shared"} <= set(wide) or wide.dropna().empty:
        return "How far each layer's read-out is from the model's output"
    costs = (wide["shared"] - wide["tuned"]).dropna().groupby("model", sort=False).median()
    return f"One lens for all layers costs a median of {by_model(costs)} {unit} over a lens per layer"


def halfway_accuracy(frame: pd.DataFrame) -> str:
    """How often the per-layer lens is right at half of the depth."""
    lines = frame[frame["lens"] == "tuned"].astype({"layer": int})
    if lines.empty:
        return "How often each layer's read-out is right"
    half = lines[lines["layer"] == lines.groupby("model")["layer"].transform("max") // 2]
    shares = half.groupby("model", sort=False)["value"].first() * 100
    return f"Halfway through the layers, the tuned lens is right in {by_model(shares, '{:.0f} %')} of targets"


def change_with_distance(pairs: pd.DataFrame, unit: str) -> str:
    """The mean penalty of the nearest and of the farthest layers."""
    apart = (pairs["lens_layer"] - pairs["stream_layer"]).abs()
    ends = {}
    for model, rows in pairs.assign(apart=apart).groupby("model", sort=False):
        means = rows.groupby("apart")["penalty_ce"].mean()
        ends[str(model)] = float(means.iloc[0]), float(means.iloc[-1])
    if len(ends) > MOST_NAMED:
        rising = sum(far > near for near, far in ends.values())
        return f"The farthest layers cost more than neighbours in {rising} of {len(ends)} models"
    spans = {m: f"{near:.2g} to {far:.2g}".replace("-", MINUS) for m, (near, far) in ends.items()}
    said = ", ".join(span + (f" ({model})" if len(ends) > 1 else "") for model, span in spans.items())
    return f"From neighbours to the farthest layers, the mean penalty goes from {said} {unit}"


def guessed_words(frame: pd.DataFrame, lens: str, name: str) -> str:
    """Where the first layer's top-1, through ``lens``, is surely a frequent word more often than the model's own."""
    model = frame[frame["what"] == "model"].groupby("model", sort=False)["value"].first()
    rows = frame[(frame["what"] == "frequent") & (frame["lens"] == lens) & (frame["beside"] == "")]
    rows = rows[rows["model"].isin(model.index)].sort_values("layer", kind="stable")
    first = rows.groupby("model", sort=False).first().reindex([m for m in model.index if m in set(rows["model"])])
    if first.empty:
        return "How often each layer's top-1 is a frequent word"
    own = model[first.index]
    groups = {
        "more often than the model's own in": first.index[first["ci_low"] > own],
        "less often in": first.index[first["ci_high"] < own],
    }
    said = [f"{where} {models_or_count(list(names), len(first))}" for where, names in groups.items() if len(names)]
    how = ", ".join(said) or "neither more nor less often than the model's own"
    return f"At layer {first['layer'].min():g}, the top-1 of {name} is surely a frequent word {how}"


def ranks_needed(frame: pd.DataFrame, kinds: dict[str, str]) -> str:
    """The smallest rank at which a lens's KL is that of its full rank, their intervals overlapping; ``kinds``: its name."""
    said = []
    for kind, name in kinds.items():
        lines = frame[(frame["what"] == "kl") & (frame["kind"] == kind)].dropna(subset=["ci_low", "ci_high"])
        needed = {}
        for model, line in lines.sort_values("rank").groupby("model", sort=False):
            whole = line.iloc[-1]
            needed[str(model)] = float(line.loc[line["ci_low"] <= whole["ci_high"], "rank"].iloc[0])
        if needed:
            said.append(f"{name} {by_model(pd.Series(needed), '{:.0f}')}")
    return f"As near the output as at full rank from rank: {'; '.join(said)}" if said else "KL and top-1 over the rank"


def nearest_to_bayes(rows: pd.DataFrame, part: str) -> str:
    """Which models are nearest to the Bayes predictor; ``rows``: the last positions, a row for each task and model.

    Those whose interval overlaps that of the nearest are as near.
    """
    said = []
    for task, of_task in rows.dropna(subset=["excess"]).groupby("task", sort=False):
        best = of_task.sort_values("excess").iloc[0]
        near = of_task[(of_task["model"] == best["model"]) | (of_task["excess_ci_low"] <= best["excess_ci_high"])]
        names = " and ".join(near["model"]) if len(near) <= MOST_NAMED else f"{len(near)} of {len(of_task)} models"
        said.append(f"{task}: {names}")
    if not said:
        return "How much of its document a model fails to use"
    return f"Nearest to the Bayes predictor at positions {part}: {'; '.join(said)}"


def nearest_rival(rows: pd.DataFrame, kinds: dict[str, str], names: dict[tuple[int, str], str]) -> str:
    """What has the largest cosine of sensitivities with trained attention.

    ``kinds``: rival -> its name; ``names``: layers and attention of a model -> its name.
    Rivals whose interval overlaps that of the nearest are as near.
    """
    nearest: dict[str, list[str]] = {}
    for _, of_model in rows[rows["against"].isin(kinds)].groupby(["layers", "attention"], sort=False):
        best = of_model.iloc[int(of_model["value"].argmax())]
        near = of_model[(of_model["against"] == best["against"]) | (of_model["ci_high"] >= best["ci_low"])]
        said = " or ".join(kinds[kind] for kind in kinds if kind in set(near["against"]))
        nearest.setdefault(said, []).append(names[int(best["layers"]), str(best["attention"])])
    count = sum(map(len, nearest.values()))
    groups = [f"{said} ({models_or_count(models, count)})" for said, models in nearest.items()]
    if not groups:
        return "Trained attention and its rivals"
    return f"Trained attention's sensitivities are most like those of {'; '.join(groups)}"


def seen_at_distances(frame: pd.DataFrame) -> str:
    """At which distances a fixed lens surely sees gain, by model."""
    defined = frame[frame["value"].notna()]
    seen = (defined["ci_low"] > 0).groupby(defined["model"], sort=False).agg(["all", "any"])
    if seen.empty:
        return "How far ahead does a fixed lens see?"
    if len(seen) == 1:
        if not seen["any"].all():
            return "At no distance does a fixed lens surely see gain"
        return f"A fixed lens surely sees gain at {'all' if seen['all'].all() else 'some'} distances"
    groups = {
        "at all distances in": seen.index[seen["all"]],
        "at some in": seen.index[seen["any"] & ~seen["all"]],
        "at none in": seen.index[~seen["any"]],
    }
    said = [f"{where} {models_or_count(list(names), len(seen))}" for where, names in groups.items() if len(names)]
    return f"A fixed lens surely sees gain {'; '.join(said)}"


def pair_cost(frame: pd.DataFrame, unit: str) -> str:
    """What one lens for two layers costs, and in random bases."""
    medians = frame.groupby("model", sort=False)[["penalty", "rotated_penalty"]].median()
    own = by_model(medians["penalty"])
    null = (
        f"; in random bases {by_model(medians['rotated_penalty'])}" if medians["rotated_penalty"].notna().all() else ""
    )
    return f"One lens for two layers costs a median of {own} {unit}{null}"


def heads_found(frame: pd.DataFrame) -> str:
    """How many heads are found to use expectations with the sign turned, and how much of an error that is at most."""
    groups = frame.assign(ratio=frame["ratio"].where(frame["found"] > 0)).groupby("model", sort=False)
    heads, counts = groups.size(), groups["found"].agg(lambda found: int((found > 0).sum()))
    most = groups["ratio"].max()
    if not counts.sum():
        return f"None of {heads.sum()} heads is found to use expectations with the sign turned"
    if len(counts) > MOST_NAMED:
        said = f"{counts.sum()} of {heads.sum()} heads in {len(counts)} models use expectations with the sign turned"
        return f"{said}, beta / alpha at most {most.max():.2g} (1 in an error)"
    named = [
        f"{m} {counts[m]} of {heads[m]}" + (f" (at most {most[m]:.2g})" if counts[m] else "") for m in counts.index
    ]
    if len(named) > 1:
        return (
            f"Heads found to use expectations with the sign turned, by beta / alpha (1 in an error): {', '.join(named)}"
        )
    said = f"{counts.iloc[0]} of {heads.iloc[0]} heads use expectations with the sign turned"
    return f"{said}, beta / alpha at most {most.iloc[0]:.2g} (1 in an error)"


def lowest_loss(last: pd.DataFrame, unit: str) -> str:
    """Which models have the lowest loss after the largest budget; ``last``: a row each, with ``ce`` and its interval.

    Those whose interval overlaps that of the lowest are as low.
    """
    ordered = last.sort_values("ce")
    best, worst = ordered.iloc[0], ordered.iloc[-1]
    low = ordered[(ordered["ce"] == best["ce"]) | (ordered["ce_ci_low"] <= best["ce_ci_high"])]
    said = f"Lowest loss after all tokens: {' and '.join(low['model'])}, {best['ce']:.2f}"
    return said + (f"; highest: {worst['model']}, {worst['ce']:.2f} {unit}" if len(low) < len(ordered) else f" {unit}")


def sure_trends(frame: pd.DataFrame, names: dict[str, str], over: str) -> str:
    """Which quantities surely rise or fall as tokens or parameters double; ``names``: index -> its name.

    Surely: p of the slope, corrected by Holm, is below :data:`LEVEL`, as texts say it.
    """
    slopes = frame.drop_duplicates(["series", "index"])
    told = slopes[slopes["p_holm"].astype(float) < LEVEL]
    said = []
    for index, name in names.items():
        of_index = told.loc[told["index"] == index, "slope"].astype(float)
        ways = {"rises": int((of_index > 0).sum()), "falls": int((of_index < 0).sum())}
        if counts := [f"{way} in {count}" for way, count in ways.items() if count]:
            said.append(f"{name} {' and '.join(counts)}")
    if not said:
        return f"Nothing surely changes as {over} double"
    return f"As {over} double, of {frame['series'].nunique()} series: {'; '.join(said)}"
