"""Guess and refine: every quantity against plain loops in float64, its nulls and its chance, and what must not matter."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.known_blocks import WIDTH, drawn, known_model
from helpers.planted import V, planted, subject_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lensbench.lenses.fit import Fit
from lensbench.lenses.lens import FittedLens, LensId, LensRecord
from lensbench.lenses.maps import AffineMaps, TurnedMap
from lensbench.probes.guess_and_refine import Chance, Guesses, early_layers, most_frequent
from lensbench.probes.registry import PROBES
from lensbench.probes.tools.layer_lenses import Uninformed, layer_lenses, top_words
from lensbench.run.probing import further_lenses
from lensbench.streams.rotated import RotatedView


def some_maps(seed, count, d):
    generator = torch.Generator().manual_seed(seed)
    return AffineMaps(
        torch.eye(d) + 0.5 * torch.randn(count, d, d, generator=generator) / d**0.5,
        torch.randn(count, d, generator=generator),
    )


@pytest.fixture(scope="module")
def subject():
    plain = subject_of(planted("none"), count=24)
    d, layers = plain.stream.d_model, plain.stream.layers
    view = RotatedView.random(torch.eye(d).double().repeat(layers, 1, 1), seed=1, variance=1.0)
    shared = some_maps(2, 1, d)
    null, own = TurnedMap(shared, view, list(range(layers))), some_maps(1, layers, d)
    frequent = np.flatnonzero(most_frequent(plain.words.fit_windows, V))
    own.offset[1] += 4 * plain.stream.model.lm_head.weight[frequent[0]].detach()  # a lens that says a frequent word
    return replace(plain, own=own, shared=shared, nulls={"shared": null})


@pytest.fixture(scope="module")
def values(subject):
    measured = PROBES["guess_and_refine"].measure(replace(subject, further={"jacobian": subject.shared}))
    frame = measured.frame(20)
    layers = [None if np.isnan(layer) else int(layer) for layer in frame["layer"].astype(float)]
    return dict(zip(zip(frame["quantity"], layers, strict=True), frame["value"], strict=True))


def word_of(subject, x):
    """The most probable word of a state, in float64 and by hand."""
    model = subject.stream.model
    gain, head = (w.detach().numpy().astype(float) for w in (model.model.norm.weight, model.lm_head.weight))
    x = np.asarray(x, dtype=float)
    return int(np.argmax(head @ (gain * x / np.sqrt((x**2).mean() + model.config.rms_norm_eps))))


def by_loops(subject):
    """Quantity and layer -> value, token by token; without those of the per-layer null, which a test of its own has."""
    states, layers = subject.eval.states.double().numpy(), subject.stream.layers
    tokens = [(w, t) for w in range(len(subject.windows)) for t in subject.windows.positions[w]]
    document = [int(subject.windows.documents[w]) for w, _ in tokens]
    counts = Counter(int(i) for row in subject.words.fit_windows.ids for i in row)
    frequent = sorted(range(V), key=lambda word: (-counts[word], word))[:10]
    final = [word_of(subject, states[-1, n]) for n in range(len(tokens))]
    turns = subject.nulls["shared"].view.maps.numpy()
    own, shared = ((m.matrix.double().numpy(), m.offset.double().numpy()) for m in (subject.own, subject.shared))

    def read(kind, layer, h):
        if kind == "logit":
            return h
        if kind == "tuned":
            return own[0][layer] @ h + own[1][layer]
        return shared[0][0] @ (turns[layer] @ h if kind == "shared_null" else h) + shared[1][0]

    found, sides = {}, {}
    for kind in ("logit", "tuned", "shared", "shared_null"):
        top = [[word_of(subject, read(kind, k, states[k, n])) for n in range(len(tokens))] for k in range(layers)]
        for k in range(layers):
            said = [word in frequent for word in top[k]]
            revised = [word != last for word, last in zip(top[k], final, strict=True)]
            settled = [all(top[m][n] == final[n] for m in range(k, layers)) for n in range(len(tokens))]
            for what, each in (("frequent", said), ("revised", revised), ("settled", settled)):
                name = f"{what}_{kind}" if kind != "shared_null" else f"{what}_shared_null"
                found[name, k] = np.mean(each)
            elsewhere = []
            for n, word in enumerate(top[k]):
                others = [final[m] for m in range(len(tokens)) if document[m] != document[n]]
                elsewhere.append(np.mean([last != word for last in others]))
            sides[kind, k] = said, revised, elsewhere
            if kind != "shared_null":
                guesses = [n for n, yes in enumerate(said) if yes]
                found[f"frequent_revised_{kind}", k] = np.mean([revised[n] for n in guesses])
                found[f"frequent_revised_{kind}_chance", k] = np.mean([elsewhere[n] for n in guesses])
    found["frequent_model", None] = np.mean([word in frequent for word in final])
    found["frequent_text", None] = np.mean([subject.windows.ids[w, t + 1] in frequent for w, t in tokens])
    bigram = subject.words.bigram()
    best = [int(bigram.distribution(int(subject.windows.ids[w, t])).argmax()) for w, t in tokens]
    found["frequent_bigram", None] = np.mean([word in frequent for word in best])
    for kind in ("logit", "tuned", "shared"):  # of three blocks the layer after the first is early
        said, revised, elsewhere = sides[kind, 1]
        found[f"guess_{kind}", None] = np.mean(said) - found["frequent_model", None]
        rate = np.mean([r for r, yes in zip(revised, said, strict=True) if yes])
        found[f"early_revised_{kind}", None] = rate
        found[f"early_revised_beyond_chance_{kind}", None] = rate - np.mean(
            [e for e, yes in zip(elsewhere, said, strict=True) if yes]
        )
    for what in ("frequent", "revised", "settled"):
        for k in range(layers):
            found[f"{what}_tuned_minus_shared", k] = found[f"{what}_tuned", k] - found[f"{what}_shared", k]
    found["guess_tuned_minus_shared", None] = found["guess_tuned", None] - found["guess_shared", None]
    found["guess_kept_shared", None] = found["guess_shared", None] / found["guess_tuned", None]
    found["early_revised_tuned_minus_shared", None] = found["revised_tuned", 1] - found["revised_shared", 1]
    return found


def test_every_quantity_is_what_plain_loops_over_tokens_say(subject, values):
    expected = by_loops(subject)
    assert {key for key in values if "tuned_null" not in key[0] and "jacobian" not in key[0]} == set(expected)
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=1e-9), key


def test_a_further_lens_has_the_quantities_of_its_maps(values):
    """Here the shared lens by another name, without a null."""
    of_shared = {key for key in values if "shared" in key[0] and "null" not in key[0]}
    assert len(of_shared) > 20
    for name, layer in of_shared:
        assert values[name.replace("shared", "jacobian"), layer] == values[name, layer]


def test_the_lenses_of_a_fit_that_probes_read_are_found():
    d, layers, names = 4, 3, ["shared-zero-closed", "jacobian-none-backward", "shared_jacobian-none-backward"]
    fitted = {}
    for name in [
        *names,
        *(f"{n}-view{k}" for n in names[::2] for k in (0, 1)),
        f"{names[0]}-refit0",
        "pair-zero-closed",
    ]:
        lens = LensId.parse(name)
        count = layers if lens.kind == "jacobian" else 1
        record = LensRecord(lens=lens, reads=[list(range(layers))], basis="view" if lens.view >= 0 else "plain")
        fitted[lens] = FittedLens(record, some_maps(len(fitted), count, d))
    views = [RotatedView.random(torch.eye(d).double().repeat(layers, 1, 1), seed=k, variance=1.0) for k in range(2)]
    nulls, further = further_lenses(Fit(fitted, views, None))
    assert set(nulls) == {"shared", "shared_jacobian"}
    assert set(further) == {"jacobian", "shared_jacobian"}
    h, null = torch.randn(2, d), fitted[LensId.parse(f"{names[0]}-view0")].maps
    by_hand = (h.double() @ views[0].maps[1].T) @ null.matrix[0].double().T + null.offset[0].double()
    torch.testing.assert_close(nulls["shared"].read(1, h), by_hand.float())


def test_the_null_of_per_layer_lenses_is_a_ridge_regression_on_other_documents(subject):
    null, own, layer = Uninformed.of(replace(subject, ridges=(0.1, 0.2, 0.3))), subject.own, 1
    document = subject.fit.document
    donor = null.donor.numpy()
    assert sorted(donor) == list(range(len(donor)))
    assert all(document[a] != document[b] for a, b in enumerate(donor))
    h, r = subject.fit.states[layer].double().numpy(), subject.fit.states[-1].double().numpy()[donor]
    d = h.shape[1]
    values = np.linalg.eigvalsh(np.cov(h.T, bias=True))
    penalty = 0.2 * values[(len(values) - 1) // 2] * len(h)
    rows = np.concatenate([h - h.mean(0), np.sqrt(penalty) * np.eye(d)])
    aims = np.concatenate([r - r.mean(0), np.zeros((d, d))])
    expected = np.linalg.lstsq(rows, aims, rcond=None)[0].T
    found = null.maps(layer)
    np.testing.assert_allclose(found.matrix[0].numpy(), expected, atol=1e-8)
    mean = own.matrix[layer].double().numpy() @ h.mean(0) + own.offset[layer].double().numpy()
    np.testing.assert_allclose(null.read(layer, torch.from_numpy(h)).mean(0).numpy(), mean, atol=1e-8)


def test_a_text_of_one_large_document_has_no_null_of_shuffled_targets(subject):
    large = replace(subject.fit, document=np.zeros_like(subject.fit.document))
    subject = replace(subject, read=lambda split: large if split == "fit" else subject.eval)
    assert layer_lenses(subject)["tuned"].null is None
    assert layer_lenses(replace(subject, nulls={}))["shared"].null is None


def test_a_model_that_says_frequent_words_until_its_last_block_guesses_and_revises_all():
    """Two blocks hold the direction of the most frequent word, the last one a word that the token decides."""
    frequent = np.flatnonzero(most_frequent(subject_of(planted("none"), count=24).words.fit_windows, V))
    rare = np.setdiff1d(np.arange(V), frequent)
    head = torch.nn.functional.normalize(drawn(1, V, WIDTH), dim=-1)
    aim = head[torch.from_numpy(rare[np.arange(V) % len(rare)])]

    def guess(h, ids):
        return head[frequent[0]].expand_as(h) + 0 * h

    model = known_model([guess] * 3 + [lambda h, ids: aim[ids]], drawn(2, V, WIDTH))
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    frame = PROBES["guess_and_refine"].measure(subject_of(model, count=24)).frame(20)
    value = frame.set_index(["quantity", "layer"])["value"].astype(float)
    assert value["frequent_model"].item() == 0
    assert value["frequent_logit"].tolist()[1:] == [1, 1, 1]
    assert value["revised_logit"].tolist()[1:] == [1, 1, 1]
    assert value["settled_logit"].tolist()[1:] == [0, 0, 0]
    assert value["guess_logit"].item() == 1
    assert value["early_revised_logit"].item() == 1
    assert value["early_revised_beyond_chance_logit"].item() == pytest.approx(0)


@given(
    words=arrays.arrays(np.int64, (3, 12), elements=st.integers(0, 6)),
    final=arrays.arrays(np.int64, 12, elements=st.integers(0, 6)),
    document=arrays.arrays(np.int64, 12, elements=st.integers(0, 3)),
    frequent=arrays.arrays(np.bool_, 7),
    order=st.permutations(range(7)),
)
@settings(max_examples=20, deadline=None)
def test_a_permutation_of_the_vocabulary_changes_nothing(words, final, document, frequent, order):
    new = np.array(order)
    renamed = np.zeros(7, dtype=bool)
    renamed[new] = frequent
    found = Guesses.of(words, final, frequent, Chance(final, document, 7))
    other = Guesses.of(new[words], new[final], renamed, Chance(new[final], document, 7))
    for name in vars(found):
        np.testing.assert_array_equal(getattr(found, name), getattr(other, name))
    assert (found.settled <= 1 - found.revised).all()
    assert (np.diff(found.settled, axis=0) >= 0).all(), "what is settled stays settled"


def test_a_guess_whose_logits_overflow_is_unknown(subject):
    x = torch.ones(3, subject.stream.d_model)
    x[1] = torch.nan
    words = top_words(subject.stream.readout, x)
    assert words[1] == -1
    assert (words[[0, 2]] >= 0).all()
    found = Guesses.of(words[None], np.array([1, 1, 1]), np.ones(V, bool), Chance(np.ones(3, int), np.arange(3), V))
    for name in vars(found):
        assert np.isnan(getattr(found, name)).tolist() == [[False, True, False]]


def test_early_layers_are_the_first_quarter_of_the_blocks_without_the_embeddings():
    assert early_layers(30) == [1, 2, 3, 4, 5, 6, 7]
    assert early_layers(6) == early_layers(2) == [1]
    assert early_layers(1) == []
