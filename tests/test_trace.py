"""Traces: the numbers of a page are those of the distributions, what errors did sums up, and any text can be shown."""

import html
import re

import numpy as np
import pytest
import torch
from test_cli import refused, run
from test_page import Read

from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.models.pretrained import load_pretrained
from lensbench.trace import errors_of, kl_to_model, largest_moves, subject_of, trace_page, traced

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
    assert len(moves) == 10 and sizes == sorted(sizes, reverse=True) and sizes[0] == np.abs(found.moved).max()
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
    tips = Read(trace_page(trajectory, title="a trace")).tips
    assert len(tips) == trajectory.log_probs.shape[0] * 4
    tip = next(t for t in tips if t.startswith("layer 1 behind")).splitlines()
    q = np.exp(trajectory.log_probs[1, 0].astype(float))
    assert len(tip) == 1 + 10 + 2
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
    assert "<script>alert" not in content and "http" not in content and "src=" not in content
    assert html.escape('<script>alert("x")</script>') in content
    assert "Which errors moved the last prediction most" in content


def test_a_model_of_a_run_is_named_and_read_through_its_own_lenses(tiny_run):
    shared = run("trace", "pc", TEXT, "--run", tiny_run)
    assert shared.exit_code == 0, shared.output
    assert "prediction error" in shared.output and "what moved the logit" in shared.output
    logit = run("trace", "pc", TEXT, "--run", tiny_run, "--lens", "logit")
    alone = run("trace", f"path:{tiny_run / 'stages' / 'train-pc-seed0'}", TEXT)
    assert logit.exit_code == alone.exit_code == 0 and logit.output == alone.output
    for name, lens in (("gpt", "tuned"), ("pc+state", "shared"), ("pc+state", "tuned")):
        assert run("trace", name, TEXT, "--run", tiny_run, "--lens", lens).exit_code == 0
    subject = subject_of("pc+state", "tuned", tiny_run, None)
    assert subject.model.endswith("train-pc-seed0") and "fit-pc+state-seed0" in str(subject.lens)
    assert subject_of("pc", None, tiny_run, 0).view == "prediction"


def test_what_cannot_be_traced_is_told(tiny_run, tmp_path):
    refused(run("trace", "gtp", TEXT, "--run", tiny_run), "no model 'gtp'; it has gpt, pc, pc+state")
    refused(run("trace", "gpt", TEXT, "--run", tiny_run, "--seed", 7), "no lenses of 'gpt' at seed 7", "fit-gpt-seed0")
    refused(run("trace", "gpt", TEXT, "--run", tmp_path), "not a run folder")
    refused(run("trace", f"path:{tiny_run / 'stages' / 'train-gpt-seed0'}", TEXT, "--lens", "shared"), "--run")
    refused(run("trace", "gpt", TEXT), "unknown model 'gpt'")


def test_colours_are_left_out_where_nobody_sees_them(tiny_run):
    assert not re.search(r"\x1b\[", run("trace", "gpt", TEXT, "--run", tiny_run).output)
