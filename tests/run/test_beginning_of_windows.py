"""Runs of a model whose tokenizer puts a token in front of every text: windows with it and without it."""

import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.pretrained import run, save_model, write_suite
from helpers.suites import without_figures, write_texts
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lensbench.data.corpus import load_corpus
from lensbench.results.folder import read_run
from lensbench.results.manifest import read_manifest

pytestmark = pytest.mark.run

LENGTH = 32
BOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small Gemma 3 with a tokenizer that adds a beginning-of-text token, run with each setting."""
    root = tmp_path_factory.mktemp("beginning")
    texts = write_texts(root / "texts", documents=120)
    folder = save_model(root / "gemma", "gemma3_text", texts, 300)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    )
    tokenizer.save_pretrained(folder)
    for setting in ("auto", "first"):
        path = write_suite(root / f"{setting}.toml", texts, gemma={"source": f"path:{folder}"})
        text = path.read_text().replace("[evaluate]\n", f'[evaluate]\nbegin = "{setting}"\n')
        # Every position but the first is scored, so that a plain loop needs to draw none.
        path.write_text(text.replace("positions = 8\nrefit_positions = 4\n", f"positions = {LENGTH - 2}\n"))
        with without_figures():
            result = run("run", path, "--out", root / setting)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("begins every window" if setting == "auto" else "begins the first window") == 1
    return root


def plain_losses(root: Path, every_window: bool) -> dict[tuple[str, int], float]:
    """Nats/token of each whole window of the eval split, by document and number, from transformers alone."""
    folder = root / "gemma"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    bos = tokenizer.convert_tokens_to_ids(BOS)
    suite = tomllib.loads((root / "auto.toml").read_text())
    fractions = read_manifest(root / "auto").suite.content()["corpus"]
    splits = load_corpus(
        suite["corpus"]["spec"], fractions={k: fractions[k] for k in ("train", "fit", "dev", "eval")}
    ).splits
    losses = {}
    for document in splits["eval"]:
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        step = LENGTH - 1 if every_window else LENGTH
        ids = ids if every_window else [bos, *ids]
        for number, start in enumerate(range(0, len(ids), step)):
            window = [bos] * every_window + ids[start : start + step]
            with torch.no_grad():
                logits = model(torch.tensor([window])).logits[0].double()
            nats = torch.nn.functional.cross_entropy(logits[1:-1], torch.tensor(window[2:]), reduction="mean")
            losses[document.name, number] = float(nats)
    return losses


@pytest.mark.parametrize("setting", ["auto", "first"])
def test_losses_are_those_of_a_plain_loop_with_the_token_in_its_windows(made, setting):
    expected = plain_losses(made, setting == "auto")
    rows = pd.read_parquet(made / setting / "stages" / "score-gemma-seed0" / "sequences.parquet")
    rows = rows[rows["lens"] == "model"]
    assert len(rows) > 20
    for row in rows.itertuples():
        assert row.ce / row.tokens == pytest.approx(expected[row.document, row.sequence], abs=1e-4)


def test_the_token_and_its_worth_are_reported_in_models_and_manifest(made):
    for setting, where in (("auto", "every window"), ("first", "first window")):
        (row,) = read_run(made / setting).tables["models.csv"].to_dict("records")
        assert (row["begin_token"], row["begin"]) == (BOS, where)
        assert row["begin_gain_ci_low"] <= row["begin_gain"] <= row["begin_gain_ci_high"]
        assert np.isfinite(row["begin_gain"])
        manifest = read_manifest(made / setting)
        assert manifest.tokenizers["gemma"]["begin"] == {"begin_token": BOS, "begin": where}
        assert manifest.suite.content()["evaluate"]["begin"] == setting


def test_a_large_model_passes_in_float16_where_that_is_fast_and_not_where_the_user_forbids_it(
    made, tmp_path, monkeypatch
):
    monkeypatch.setattr("lensbench.streams.half.half_is_fast", lambda: True)
    monkeypatch.setattr("lensbench.streams.half.LEAST_PARAMETERS", 0)
    with without_figures():
        half, exact = (
            run("run", made / "auto.toml", "--out", tmp_path / str(way), "--set", f"evaluate.half_products={way}")
            for way in ("true", "false")
        )
    assert half.exit_code == exact.exit_code == 0, half.output + exact.output
    assert half.stderr.count("forward passes multiply in float16") == 1
    assert "float16" not in exact.stderr
    facts = read_manifest(tmp_path / "true").half_passes["gemma"]
    assert facts["passes"] == "float16"
    assert 0 < facts["kl"] < 1e-4
    assert read_manifest(tmp_path / "false").half_passes == {}
    ours, plain, before = (
        pd.read_csv(folder / "lenses.csv") for folder in (tmp_path / "true", tmp_path / "false", made / "auto")
    )
    assert plain.equals(before)
    assert not ours.equals(plain)
    assert (ours["kl"] - plain["kl"]).abs().max() < 1e-3
    # Finished stages of one way are not those of the other.
    with without_figures():
        again = run("run", made / "auto.toml", "--out", tmp_path / "true", "--set", "evaluate.half_products=false")
    assert again.exit_code != 0 or pd.read_csv(tmp_path / "true" / "lenses.csv").equals(plain)


def test_runs_with_the_token_in_other_places_are_not_compared(made):
    found = run("compare", made / "auto", made / "first")
    assert found.exit_code != 0
    assert "beginning-of-text token of gemma stands in every window and first window" in found.output


def test_folders_of_earlier_versions_without_these_columns_are_read(made, tmp_path):
    table = pd.read_csv(made / "auto" / "models.csv")
    older = table.drop(columns=[c for c in table if c.startswith("begin")])
    older.to_csv(tmp_path / "models.csv", index=False)
    from lensbench.results.folder import read_table

    read = read_table(tmp_path / "models.csv")
    assert read["begin"].isna().all()
    assert read["begin_gain"].isna().all()
