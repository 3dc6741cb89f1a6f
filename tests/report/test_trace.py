"""Traces: the numbers of a page are those of the distributions, what errors did sums up, and any text can be shown."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import refused, run
from helpers.pages import Read, opened
from markupsafe import escape
from rich.console import Console
from tuned_lens.plotting import PredictionTrajectory

from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.models.pretrained import identity, load_pretrained
from lensbench.report.render import shade
from lensbench.report.trace import (
    TracedModel,
    fitted_lens,
    growth_of,
    load_lens,
    traced,
    traced_in_place,
    traced_model,
    words_of,
)
from lensbench.report.trace_errors import errors_of, largest_moves
from lensbench.report.trace_page import TracedText, entropies, kl_to_model, trace_page
from lensbench.report.trace_tables import trace_tables
from lensbench.results.manifest import read_manifest, write_manifest
from lensbench.streams.stream import ResidualStream

SHAPE = {"vocab_size": 40, "d_model": 16, "layers": 3, "heads": 2, "context": 32, "parameters": 9_000}
TEXT = "abc de fgh abc de"


def trained_like(**settings):
    """A predictive-coding model away from its initial weights."""
    model = build("predictive-coding", seed=1, **SHAPE, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"kernel": "linear"}, {"kernel": "softmax"}, {"relaxed": True}, {"error": "linear"}, {"tied_layers": True},
     {"tie_value_output": False}, {"tie_query_key": False}, {"decay": False}],
    ids=lambda s: ",".join(s) or "plain",
)  # fmt: skip
def test_what_errors_did_to_the_last_prediction_sums_to_its_logit(settings):
    model = trained_like(**settings)
    ids = torch.randint(0, 40, (20,), generator=torch.Generator().manual_seed(3))
    found = errors_of(model, ids)
    logits = model(ids[None]).logits[0, -1].detach().double()
    assert found.word == int(logits.argmax())
    whole = found.start + found.moved.sum() + found.written
    assert whole == pytest.approx(float(logits[found.word] - logits.mean()), abs=1e-4)
    assert (found.written != 0) == bool(settings.get("relaxed"))
    assert np.abs(found.moved[:, 0]).max() < 1e-6, "the first token reveals no error"
    # Layer by layer too: what an update of the last position did is the sum over the errors that it is made of.
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
        z = output.predictions[-1][0, -1]
        scale = model.norm.weight / (z.pow(2).mean() + model.norm.eps).sqrt()
        for layer, update in enumerate(output.updates):
            logits = model.lm_head.weight @ (update[0, -1] * scale)
            assert found.moved[layer].sum() == pytest.approx(float(logits[found.word] - logits.mean()), abs=1e-4)


def test_errors_and_surprisals_are_the_models_own_and_an_error_taken_away_moves_what_is_said():
    model = trained_like()
    ids = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(4))
    found = errors_of(model, ids)
    output = model(ids[None], output_hidden_states=True)
    for layer in range(3):
        own = output.errors[layer][0].norm(dim=-1).detach().numpy()
        np.testing.assert_allclose(found.size[layer], own, rtol=1e-5)
        chances = model.read_out(output.predictions[layer])[0].log_softmax(-1).detach()
        assert found.surprisal[layer, 5] == pytest.approx(-float(chances[4, ids[5]]), abs=1e-5)
    assert np.isnan(found.surprisal[:, 0]).all()
    moves = largest_moves(found)
    sizes = [abs(change) for *_, change in moves]
    assert len(moves) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == np.abs(found.moved).max()
    # In the last layer an error's effect is direct: without it the state is less by what it added.
    layer = model.layers[-1]
    plain = layer.update
    at = int(np.abs(found.moved[-1]).argmax())

    def without(u, error, *rest):
        error = error.clone()
        error[:, at] = 0
        return plain(u, error, *rest)

    layer.update = without
    with torch.no_grad():
        final = model(ids[None], output_hidden_states=True).predictions[-1][0, -1]
        before = output.predictions[-1][0, -1]
        along = (model.lm_head.weight[found.word] - model.lm_head.weight.mean(0)) * model.norm.weight
        change = (before - final) @ along * torch.rsqrt(before.pow(2).mean() + model.norm.eps)
    assert float(change) == pytest.approx(found.moved[-1, at], abs=1e-5)


def test_models_without_a_sum_over_errors_say_so():
    ids = torch.arange(6)
    with pytest.raises(LensbenchError, match="without errors"):
        errors_of(trained_like(error="none"), ids)
    with pytest.raises(LensbenchError, match="delta rule"):
        errors_of(trained_like(kernel="linear", delta_rule=True), ids)


def test_a_page_tells_the_ten_most_probable_words_entropy_and_kl(tiny_run):
    source = f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}"
    loaded = load_pretrained(source)
    trajectory = traced(loaded, TEXT, f"path:{tiny_run / 'stages' / 'fit-gpt-seed0' / 'shared'}", 4)
    tips = Read(trace_page([TracedText(TEXT, trajectory)], title="a trace")).tips
    assert len(tips) == trajectory.log_probs.shape[0] * 4
    tip = next(t for t in tips if t.startswith("layer 1 after")).splitlines()
    q = np.exp(trajectory.log_probs[1, 0].astype(float))
    assert len(tip) == 1 + 10 + 3
    target, at = int(trajectory.targets[0]), q[trajectory.targets[0]]
    assert target == trajectory.input_ids[1]
    assert tip[13].endswith(f", number {(q > at).sum() + 1}, {at:.3f}")
    assert [float(line.rpartition(" ")[2]) for line in tip[1:11]] == [round(x, 3) for x in sorted(q, reverse=True)[:10]]
    assert float(tip[11].split()[1]) == pytest.approx(-(q * np.log(q)).sum(), abs=2e-3)
    p = np.exp(trajectory.log_probs[-1, 0].astype(float))
    assert float(tip[12].split()[4]) == pytest.approx((p * np.log(p / q)).sum(), abs=2e-3)
    np.testing.assert_allclose(kl_to_model(trajectory)[-1], 0, atol=1e-12)


def test_any_title_and_word_is_escaped_and_nothing_is_asked_for(tiny_run, tmp_path):
    page = tmp_path / "sub" / "t.html"
    text = '<script>alert("x")</script> & "abc" \n é'
    found = run("trace", "pc", text, "--run", tiny_run, "--out", page, "--tokens", 40)
    assert found.exit_code == 0, found.output
    content = page.read_text()
    Read(content)
    assert "<script>alert" not in content
    assert "http" not in content
    assert "src=" not in content
    assert str(escape('<script>alert("x")</script>')) in content
    assert "Which errors moved the last prediction most" in content


def test_a_model_of_a_run_is_named_and_read_through_its_own_lenses(tiny_run):
    shared = run("trace", "pc", TEXT, "--run", tiny_run)
    assert shared.exit_code == 0, shared.output
    assert "prediction error" in shared.output
    assert "what moved the logit" in shared.output
    logit = run("trace", "pc", TEXT, "--run", tiny_run, "--lens", "logit")
    alone = run("trace", f"path:{tiny_run / 'stages' / 'train-pc-seed0'}", TEXT)
    assert logit.exit_code == alone.exit_code == 0
    assert logit.output == alone.output
    for name, lens in (("gpt", "tuned"), ("pc+state", "shared"), ("pc+state", "tuned")):
        assert run("trace", name, TEXT, "--run", tiny_run, "--lens", lens).exit_code == 0
    subject = traced_model("pc+state", "tuned", tiny_run, None)
    assert subject.model.endswith("train-pc-seed0")
    assert "fit-pc+state-seed0" in str(subject.lens)
    assert traced_model("pc", None, tiny_run, 0).view == "prediction"


def test_what_cannot_be_traced_is_told(tiny_run, tmp_path):
    refused(run("trace", "gtp", TEXT, "--run", tiny_run), "no model 'gtp'; it has gpt, pc, pc+state")
    refused(run("trace", "gpt", TEXT, "--run", tiny_run, "--seed", 7), "no lenses of 'gpt' at seed 7", "fit-gpt-seed0")
    refused(run("trace", "gpt", TEXT, "--run", tmp_path), "not a run folder")
    refused(run("trace", f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}", TEXT, "--lens", "shared"), "--run")
    refused(run("trace", "gpt", TEXT), "unknown model 'gpt'")


def test_colours_are_left_out_where_nobody_sees_them(tiny_run):
    assert not re.search(r"\x1b\[", run("trace", "gpt", TEXT, "--run", tiny_run).output)


class Odd:
    """A tokenizer of five words that no page may stumble over, and a sixth that decoding leaves out."""

    words = ("</td><script>alert(1)</script>", "\"'&", "\n\t", "\udc80", "  ", "<eos>")

    def decode(self, ids):
        return "" if ids[0] == 5 else self.words[ids[0]]

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] for i in ids]


def odd_trajectory(layers=3, tokens=4, impossible=False):
    logits = torch.randn(layers, tokens, 6, generator=torch.Generator().manual_seed(0)).double()
    if impossible:
        logits[..., 2] = -torch.inf
    log_probs = logits.log_softmax(-1).float().numpy()
    ids = np.arange(tokens) % 6
    return PredictionTrajectory(log_probs, ids, targets=ids, tokenizer=Odd()), logits


def test_entropy_and_kl_are_those_by_hand_and_those_of_tuned_lens(tiny_run):
    trajectory, logits = odd_trajectory()
    q = np.exp(logits.numpy())
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(entropies(trajectory), -(q * np.log(q)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(kl_to_model(trajectory), (q[-1] * np.log(q[-1] / q)).sum(-1), atol=1e-5)
    # Theirs name ten words on the way, so that they need as many.
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")
    trajectory = traced(loaded, TEXT, f"path:{tiny_run / 'stages' / 'fit-gpt-seed0' / 'tuned'}")
    np.testing.assert_allclose(entropies(trajectory), trajectory.entropy().stats, atol=1e-5)
    np.testing.assert_allclose(kl_to_model(trajectory), trajectory.forward_kl().stats, atol=1e-5)
    # Theirs between two trajectories is KL(self || other): the model's own, at every layer, against the lens's.
    last = np.broadcast_to(trajectory.log_probs[-1], trajectory.log_probs.shape)
    own = PredictionTrajectory(last, trajectory.input_ids, targets=trajectory.targets, tokenizer=trajectory.tokenizer)
    np.testing.assert_allclose(kl_to_model(trajectory), own.kl_divergence(trajectory).stats, atol=1e-5)


def test_a_word_that_cannot_come_makes_nothing_undefined():
    trajectory, logits = odd_trajectory(impossible=True)
    possible = logits[..., [0, 1, 3, 4, 5]].softmax(-1)
    np.testing.assert_allclose(entropies(trajectory), -(possible * possible.log()).sum(-1), atol=1e-5)
    assert np.isfinite(kl_to_model(trajectory)).all()
    assert "nan" not in trace_page([TracedText("x", trajectory)], title="x")


def test_no_token_breaks_a_page_or_is_lost():
    trajectory, _ = odd_trajectory(tokens=6)
    assert words_of(trajectory, range(6))[2:] == ["\\n\\t", "\\udc80", "\u2423\u2423", "<eos>"]
    content = trace_page(
        [TracedText("\udc80 <script>x</script>", trajectory)], title="\udc80 </title><script>x</script>"
    )
    content.encode()
    read = Read(content)
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert "alert(1)<" not in content
    assert any(Odd.words[0] in tip for tip in read.tips)
    cells = [a for tag, a in read.tags if tag == "td" and "data-tip" in a]
    best = trajectory.log_probs[:, :-1].argmax(-1) == np.asarray(trajectory.targets)[:-1]
    assert sum("hit" in a["class"].split() for a in cells) == best.sum()
    assert len(cells) == 3 * 6
    assert all(a["tabindex"] == "0" for a in cells)
    # The model itself is at the end, as in the terminal.
    assert [tip.partition(" after")[0] for tip in read.tips[::6]] == ["layer 0", "layer 1", "model"]
    for asks in ("http://", "https://", "<script src", "@import", "url("):
        assert asks not in content
    assert "prefers-color-scheme:dark" in content
    assert "print-color-adjust:exact" in content


def shown(tables, width, **options):
    file = io.StringIO()
    console = Console(file=file, width=width, **options)
    for table in tables:
        console.print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [30, 60, 200])
def test_the_terminal_shows_every_probability_however_narrow(tiny_run, width):
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")
    trajectory = traced(loaded, TEXT)
    with torch.no_grad():
        logits = loaded.model(torch.from_numpy(trajectory.input_ids)[None]).logits[0].double().numpy()
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances = (chances / chances.sum(-1, keepdims=True)).max(-1)
    told = shown(trace_tables(trajectory, 7, width), width)
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) <= width
    rows = [line for line in told.splitlines() if "model" in line]
    assert (len(rows) > 1) == (width < 200)
    found = [float(x) for row in rows for x in re.findall(r"(\d\.\d\d) +\u2502", row)]
    np.testing.assert_allclose(found, chances[-7:], atol=0.006)
    coloured = shown(trace_tables(trajectory, 7, width), width, force_terminal=True, color_system="truecolor")
    fill = bytes.fromhex(shade(float(chances[-1]))[0][1:])
    assert "48;2;{};{};{}m".format(*fill) in coloured


def test_what_blocks_add_sums_to_the_models_own_and_in_place_is_the_earlier_lens_at_the_next_layer(tiny_run):
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")
    source = f"path:{tiny_run / 'stages' / 'fit-gpt-seed0' / 'tuned'}"
    trajectory, later = traced_in_place(loaded, TEXT, source)
    growth = growth_of(trajectory, later)
    ids = torch.from_numpy(trajectory.input_ids)
    stream = ResidualStream(loaded.model, "state")
    with torch.no_grad():
        own = loaded.model(ids[None]).logits[0].double().log_softmax(-1)
        at = torch.arange(len(ids))
        states, _ = stream.at(ids[None], torch.zeros_like(at), at)
        lens = load_lens(stream, source)
        for token, target in enumerate(trajectory.targets):
            whole = growth.start[token] + growth.added[:, token].sum()
            assert whole == pytest.approx(float(own[token, target]), abs=1e-4)
            for block in range(stream.layers - 1):
                here, there = (
                    float(lens(states[layer].float(), idx=block).double().log_softmax(-1)[token, target])
                    for layer in (block, block + 1)
                )
                assert growth.in_place[block, token] == pytest.approx(there - here, abs=1e-4)
    assert not growth.fixed
    assert growth_of(*traced_in_place(loaded, TEXT)).fixed, "the logit lens reads every layer alike"


def test_several_texts_stand_under_each_other_without_the_place_of_the_model(tiny_run, tmp_path):
    page = tmp_path / "t.html"
    model = f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}"
    found = run("trace", model, "abc de", "fgh abc", "--out", page)
    assert found.exit_code == 0, found.output
    content = page.read_text()
    assert content.index(">abc de</h2>") < content.index(">fgh abc</h2>")
    assert str(tiny_run) not in content
    assert "train-gpt-seed0, the logit lens</h1>" in content


def test_every_kind_that_a_run_fitted_for_all_layers_can_be_read(tiny_run):
    stage = tiny_run / "stages" / "fit-gpt-seed0"
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}")
    stream = ResidualStream(loaded.model, "state")
    for kind in ("tuned", "shared"):
        fitted, saved = fitted_lens(stream.readout, stage, kind), load_lens(stream, f"path:{stage / kind}")
        h = torch.randn(3, stream.d_model, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(fitted(h, idx=1), saved(h, idx=1))
    refused(run("trace", "gpt", TEXT, "--run", tiny_run, "--lens", "pair"), "holds no lens 'pair'")


def changed_run(tiny_run, folder, **changes):
    """A copy of the run's manifest and stages whose suite has other models: name -> what is added to its recipe."""
    folder.mkdir()
    (folder / "stages").symlink_to(tiny_run / "stages")
    manifest = read_manifest(tiny_run).content()
    for name, change in changes.items():
        recipe = next((m for m in manifest["suite"]["models"] if m["name"] == name), None)
        if recipe is None:
            manifest["suite"]["models"].append(recipe := {**manifest["suite"]["models"][0], "name": name})
            manifest["models"].append(name)
        recipe.update(change)
    write_manifest(folder, manifest)
    return folder


def test_rotated_views_pretrained_models_and_other_kinds_of_runs(tiny_run, tmp_path):
    folder = changed_run(
        tiny_run, tmp_path / "run", mine={"source": "path:weights"}, **{"gpt+rotated": {"view_of": "gpt", "rotated": True}},
        packed={"source": "package:words/m.gguf"}, hub={"source": "hub:o/m@r"}, late={"seeds": [3]},
        one={"source": "hub:o/two"}, two={"source": "hub:o/two"}, three={"source": "hub:o/four"},
        four={"source": "hub:o/four", "dtype": "bfloat16"}, five={"source": "hub:o/x"}, six={"source": "hub:o/x"},
    )  # fmt: skip
    refused(run("trace", "gpt+rotated", TEXT, "--run", folder), "'gpt+rotated' is a rotated view", "trace 'gpt'")
    refused(
        run("trace", "mine", TEXT, "--run", folder, "--lens", "logit"),
        "was read from path:weights",
        "lensbench trace path:PLACE TEXT --run",
    )
    # A source is found by what it was, not only by what its folder is called.
    with pytest.raises(LensbenchError, match="no lenses of 'mine' at seed 0"):
        traced_model("path:/some/weights", None, folder, None)
    found = traced_model("path:/some/weights", "logit", folder, None)
    assert (found.model, found.lens) == ("path:/some/weights", None)
    assert traced_model("packed", "logit", folder, None).model == "package:words"
    for name in ("hub", "hub:o/m@r"):
        assert traced_model(name, "path:x", folder, None) == TracedModel("hub:o/m@r", "state", "path:x")
    with pytest.raises(LensbenchError, match="no lenses of 'late' at seed 3"):
        traced_model("late", None, folder, None)
    with pytest.raises(LensbenchError, match="no lenses of 'two'"):
        traced_model("hub:o/two", None, folder, None)
    with pytest.raises(LensbenchError, match="no lenses of 'four'"):
        traced_model("hub:o/four", None, folder, None)
    with pytest.raises(LensbenchError, match="hub:o/x under several names; give one of them: five, six"):
        traced_model("hub:o/x", None, folder, None)
    with pytest.raises(LensbenchError, match="no model 'other'; it has gpt, pc"):
        traced_model("hub:o/other", None, folder, None)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_run, bare, ignore=shutil.ignore_patterns("stages"))
    refused(run("trace", "gpt", TEXT, "--run", bare), "no lenses of 'gpt' at seed 0: its stages are missing")
    refused(run("trace", "gpt", TEXT, "--run", bare, "--lens", "logit"), "no training of 'gpt' at seed 0")
    for key, value, told in (("sweep", {}, "holds a sweep"), ("suite", {"images": {"spec": "digits"}}, "no text")):
        manifest = read_manifest(bare).content()
        manifest[key] = {**manifest.get(key, {}), **value}
        write_manifest(bare, manifest)
        refused(run("trace", "gpt", TEXT, "--run", bare), told)
        shutil.copy(tiny_run / "manifest.json", bare)


def test_slips_of_the_command_line_are_told(tiny_run, tmp_path):
    model = f"path:{tiny_run / 'stages' / 'train-pc-seed0'}"
    refused(run("trace", "pc", TEXT, "--seed", 0), "--run")
    refused(run("trace", "pc", TEXT), "unknown model 'pc'", "--run FOLDER")
    refused(run("trace", "pc", TEXT, "--run", tiny_run, "--out", tmp_path), "is a folder", "name a file")
    refused(run("trace", "pc", "a\udcffb", "--run", tiny_run), "no valid UTF-8")
    lens = f"path:{tiny_run / 'stages' / 'fit-pc-seed0' / 'shared'}"
    refused(run("trace", model, TEXT, "--lens", lens), "it has width 16, the model 48", "with --run")
    assert run("trace", "pc", TEXT, "--run", tiny_run, "--lens", lens).exit_code == 0


def test_a_model_without_errors_says_so_in_the_terminal_and_on_the_page(tiny_run, tmp_path):
    stages = tmp_path / "stages"
    shutil.copytree(tiny_run / "stages" / "tokenizer", stages / "tokenizer")
    model = build("predictive-coding", seed=0, **{**SHAPE, "vocab_size": 300, "parameters": 20_000}, error="none")
    model.save_pretrained(stages / "none")
    (stages / "none" / "stage.json").write_text("{}")
    page = tmp_path / "t.html"
    found = run("trace", f"path:{stages / 'none'}", TEXT, "--out", page)
    assert found.exit_code == 0, found.output
    assert "without errors" in found.output, found.output
    assert "without errors" in page.read_text()
    assert "what moved" not in found.output


def test_terminal_and_page_name_the_same_moves(tiny_run, tmp_path):
    page = tmp_path / "t.html"
    told = run("trace", "pc", TEXT, "--run", tiny_run, "--out", page).output
    loaded = load_pretrained(f"path:{tiny_run / 'stages' / 'train-pc-seed0'}")
    trajectory = traced(loaded, TEXT)
    errors = errors_of(loaded.model, torch.from_numpy(trajectory.input_ids))
    words = words_of(trajectory, trajectory.input_ids)
    content = page.read_text()
    assert f'of the next word "{words_of(trajectory, [errors.word])[0]}"' in told
    for layer, s, change in largest_moves(errors):
        row = rf"\u2502 {layer} +\u2502 {re.escape(words[s])} +\u2502 {s} +\u2502 {re.escape(f'{change:+.3f}')} +\u2502"
        assert re.search(row, told), row
        assert f'<td>{escape(words[s])}</td><td data-value="{s}">{s}</td>' in content
        assert f'">{change:+.3f}</td>' in content
    assert f"{errors.size[1, -1]:.2f} ({errors.surprisal[1, -1]:.2f})" in told


def test_focus_tells_a_cell_and_a_phone_scrolls_the_table_alone(browser, tiny_run, tmp_path):
    path = tmp_path / "t.html"
    assert run("trace", "pc", TEXT + " " + "h" * 40, "--run", tiny_run, "--out", path, "--tokens", 40).exit_code == 0
    tab, told, asked = opened(browser, path, viewport={"width": 375, "height": 800}, color_scheme="dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    assert tab.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.wide'))")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(24, 23, 22)"
    tab.keyboard.press("Tab")
    tip = tab.locator("#tip").text_content().splitlines()
    assert tip[0].startswith("layer 0 after")
    assert len(tip) == 14
    assert tip[-2].startswith("KL to the model ")
    assert told == []
    assert asked == [f"file://{path}"]
    tab.close()


def test_a_model_of_the_runs_name_but_other_weights_is_refused_and_of_two_the_right_one_is_taken(tiny_run, tmp_path):
    def checkpoint(place: str, weights: bytes) -> Path:
        (tmp_path / place / "hf").mkdir(parents=True)
        (tmp_path / place / "hf" / "config.json").write_text("{}")
        (tmp_path / place / "hf" / "model.safetensors").write_bytes(weights)
        return tmp_path / place / "hf"

    first, second, third = (checkpoint(f"step{k}", b"%d" % k) for k in (1, 2, 3))
    both = {"one": {"source": "path:hf"}, "two": {"source": "path:hf"}}
    folder = changed_run(tiny_run, tmp_path / "run", **both)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sources"] = {
        name: {"source": "path:hf", **identity(f"path:{at}")} for name, at in (("one", first), ("two", second))
    }
    write_manifest(folder, manifest)
    for at, name in ((first, "one"), (second, "two")):
        with pytest.raises(LensbenchError, match=f"no lenses of '{name}'"):
            traced_model(f"path:{at}", None, folder, None)
    with pytest.raises(LensbenchError, match="of other weights: its lenses are not of path:"):
        traced_model(f"path:{third}", None, folder, None)
