"""The published side of the speed comparison: tuned-lens's own loss, optimizers and order of tokens, and the ledger."""

import copy
import shutil
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from helpers.synthetic import capture_of, read_out, windows_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from benchmarks.speed import fitting, jacobian, published, transfer
from benchmarks.speed import ours as our_side
from benchmarks.speed.recipe import STEPS, RecipeLens, Setting, visits
from benchmarks.speed.summary import ratios, timed_again
from benchmarks.speed.task import (
    Ledger,
    Task,
    keep_documents,
    matmul_rate,
    paired_difference,
    rows_of,
    steps_of,
)
from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import PILOT_PROBES, PILOT_PROMPTS
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.recipe import FitRecipe

D, V, N = 12, 50, 40
READ_OUTS = {
    "rms": {},
    "with bias": {"bias": True},
    "layer norm": {"norm": "layer", "bias": True},
    "a part of the state": {"read": 8},
}


def setting_up(name="rms", optimizer="sgd", lr_scale=1.0, steps=20, seed=0):
    """A lens away from the identity, in float64, with a layer's states and what the model makes of the last ones."""
    readout = read_out(D, V, dtype=torch.float64, seed=seed, **READ_OUTS[name])
    random = torch.Generator().manual_seed(seed + 1)
    last = torch.randn(N, D, generator=random, dtype=torch.float64)
    states = torch.stack([last + torch.randn(N, D, generator=random, dtype=torch.float64), last])
    lens = RecipeLens(readout, D, Setting(optimizer, lr_scale), steps)
    return lens, states[0], capture_of(readout, states), readout(last).log_softmax(-1)


def move(lens, seed=5):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters_of(lens):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))


def parameters_of(lens):
    return list(lens.lens.layer_translators.parameters())


def value_and_gradient(lens, loss):
    return loss.detach(), torch.autograd.grad(loss, parameters_of(lens))


def weights_of(lens):
    return [parameter.detach().clone() for parameter in parameters_of(lens)]


# The loss


@pytest.mark.parametrize("name", list(READ_OUTS))
@pytest.mark.parametrize("moved", [False, True])
def test_the_cached_loss_has_the_value_and_gradient_of_the_published_one(name, moved):
    lens, h, captured, log_p = setting_up(name)
    if moved:
        move(lens)
    published = value_and_gradient(lens, lens.published_loss(h, log_p))
    cached = value_and_gradient(lens, lens.cached_loss(h, captured.expected, captured.entropy_term))
    assert published[0] > 0.05
    torch.testing.assert_close(cached[0], published[0], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(cached[1], published[1], strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_losses_of_more_tokens_than_a_block_add_up():
    lens, h, captured, log_p = setting_up()
    move(lens)
    many = 30
    whole = lens.cached_loss(h.repeat(many, 1), captured.expected.repeat(many, 1), captured.entropy_term.repeat(many))
    torch.testing.assert_close(whole, lens.published_loss(h, log_p), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(READ_OUTS))
def test_the_published_loss_is_the_divergence_by_definition(name):
    lens, h, _captured, log_p = setting_up(name)
    move(lens)
    translator, readout = lens.lens.layer_translators[0], lens.readout
    kls = []
    for n in range(N):
        x = h[n] + translator.weight @ h[n] + translator.bias
        logits = readout.unembedding(readout.final_norm(x)).detach().numpy()
        q = np.exp(logits) / np.exp(logits).sum()
        p = log_p[n].exp().numpy()
        kls.append(sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(V)))
    assert lens.published_loss(h, log_p).item() == pytest.approx(np.mean(kls), rel=1e-9)
    # In batch and sequence, as the package has it, too.
    folded = lens.published_loss(h.view(4, -1, D), log_p.view(4, -1, V))
    assert folded.item() == pytest.approx(np.mean(kls), rel=1e-9)


def test_a_lens_begins_as_the_logit_lens_and_is_the_packages_own():
    from tuned_lens import TunedLens

    lens, h, _, log_p = setting_up()
    assert type(lens.lens) is TunedLens
    assert len(lens.lens) == 1
    logits = lens.readout(h).log_softmax(-1)
    expected = (log_p.exp() * (log_p - logits)).sum(-1).mean()
    torch.testing.assert_close(lens.published_loss(h, log_p), expected, rtol=1e-12, atol=1e-12)
    maps = lens.maps()
    assert torch.equal(maps.matrix[0], torch.eye(D, dtype=torch.float64))
    assert not maps.offset.any()


@pytest.mark.parametrize("name", ["rms", "a part of the state"])
def test_the_maps_of_a_lens_transform_as_it_does_and_are_a_copy(name):
    lens, h, _captured, log_p = setting_up(name)
    move(lens)
    maps = lens.maps()
    torch.testing.assert_close(h @ maps.matrix[0].T + maps.offset[0], lens.lens.transform_hidden(h, 0))
    before = maps.matrix.clone()
    lens.step(lens.published_loss(h, log_p))
    assert torch.equal(maps.matrix, before)


def test_only_the_translator_is_trained():
    lens, h, _, log_p = setting_up("layer norm")
    before = copy.deepcopy(lens.readout.state_dict())
    for _ in range(3):
        lens.step(lens.published_loss(h, log_p))
    assert all(torch.equal(value, before[key]) for key, value in lens.readout.state_dict().items())
    assert all(weight.abs().max() > 0 for weight in weights_of(lens))


# The optimizers


def ingredients(monkeypatch) -> ModuleType:
    """tuned-lens's own settings; newer torchdata, which its data loading needs, lacks what they import and never use."""
    try:
        import tuned_lens.scripts.ingredients as module
    except ImportError:
        monkeypatch.setitem(sys.modules, "torchdata", MagicMock())
        monkeypatch.delitem(sys.modules, "tuned_lens.scripts.ingredients", raising=False)
        try:
            import tuned_lens.scripts.ingredients as module
        except ImportError as error:
            pytest.skip(f"tuned_lens.scripts.ingredients cannot be imported: {error}")
        # A module that was imported with a stand-in is not for others.
        monkeypatch.delitem(sys.modules, "tuned_lens.scripts.ingredients")
    return module


def warm_up(optimizer: str, steps: int) -> int:
    return min(1000, steps // 5) if optimizer == "adam" else 0


def by_the_package(monkeypatch, parameters, optimizer, lr_scale, steps):
    package = ingredients(monkeypatch)
    options = package.Optimizer(lr_scale=lr_scale, optimizer=package.OptimizerOption(optimizer))
    # Given here: the package documents this default for Adam, but looks for the string "adam" where it holds an enum
    # member, so that left alone its Adam never warms up.
    options.warmup_steps = warm_up(optimizer, steps)
    made = options.create_optim(parameters)
    # It takes the warm-up off the steps before it hands them on; the recipe's last step is the one at which the rate is 0.
    return made, options.create_scheduler(made, steps + options.warmup_steps)


def by_hand(monkeypatch, parameters, optimizer, lr_scale, steps):
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(
            parameters, lr=lr_scale * (1 - 0.9), momentum=0.9, nesterov=True, weight_decay=1e-3
        )
    else:
        made = torch.optim.Adam(parameters, lr=lr_scale * 1e-3, betas=(0.9, 0.999), amsgrad=True, weight_decay=1e-3)
    first, total = warm_up(optimizer, steps), steps

    def rate(step):
        return step / first if step < first else max(0.0, (total - step) / (total - first))

    return made, torch.optim.lr_scheduler.LambdaLR(made, rate)


@pytest.mark.parametrize("reference", [by_the_package, by_hand])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("lr_scale", [1.0, 9.0])
def test_every_update_is_that_of_the_packages_optimizer_and_schedule(monkeypatch, reference, optimizer, lr_scale):
    steps = 20
    lens, h, _, log_p = setting_up(optimizer=optimizer, lr_scale=lr_scale, steps=steps)
    move(lens)
    twin = copy.deepcopy(lens.lens)
    parameters = list(twin.layer_translators.parameters())
    made, scheduler = reference(monkeypatch, parameters, optimizer, lr_scale, steps)
    rates = []
    for step in range(steps):
        before = weights_of(lens)
        at = torch.arange(step, step + 15) % N
        rates.append(lens.optimizer.param_groups[0]["lr"])
        assert rates[-1] == pytest.approx(made.param_groups[0]["lr"], abs=1e-15)
        lens.step(lens.published_loss(h[at], log_p[at]))
        # The package's loop, for this one lens.
        logits = twin(h[at], idx=0)
        torch.sum(log_p[at].exp() * (log_p[at] - logits.log_softmax(-1)), dim=-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made.step()
        made.zero_grad(set_to_none=False)
        scheduler.step()
        for ours, theirs in zip(weights_of(lens), parameters, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)
        moved = max((a - b).abs().max().item() for a, b in zip(weights_of(lens), before, strict=True))
        assert (moved > 0) == (rates[-1] > 0)
    full = lr_scale * (0.1 if optimizer == "sgd" else 1e-3)
    assert max(rates) == pytest.approx(full)
    assert rates.index(max(rates)) == warm_up(optimizer, steps)
    assert rates[-1] < 0.1 * full


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_first_updates_are_those_written_out(optimizer):
    lens, h, _, log_p = setting_up(optimizer=optimizer, steps=5)
    move(lens)
    start = weights_of(lens)
    loss = 20 * lens.published_loss(h, log_p)
    gradients = torch.autograd.grad(loss, parameters_of(lens), retain_graph=True)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    assert norm > 1, "the clipping must show"
    assert lens.step(loss) == pytest.approx(loss.item())
    if optimizer == "adam":
        # Warm-up of one step: the first has rate 0.
        assert all(torch.equal(a, b) for a, b in zip(weights_of(lens), start, strict=True))
    else:
        for after, before, gradient in zip(weights_of(lens), start, gradients, strict=True):
            g = gradient / (norm + 1e-6) + 1e-3 * before
            # Nesterov: the gradient and 0.9 times the momentum, which at first is the gradient.
            torch.testing.assert_close(after, before - 0.1 * (g + 0.9 * g), rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters_of(lens))


def test_a_gradient_that_adds_up_over_parts_is_clipped_once():
    one, h, captured, _log_p = setting_up()
    parts = setting_up()[0]
    one.step(one.cached_loss(h, captured.expected, captured.entropy_term))
    total = 0.0
    for part in torch.arange(N).split(15):
        loss = parts.cached_loss(h[part], captured.expected[part], captured.entropy_term[part]) * len(part) / N
        loss.backward()
        total += loss.item()
    parts.update(torch.tensor(total))
    for a, b in zip(weights_of(one), weights_of(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_lowers_the_divergence(optimizer):
    lens, h, captured, log_p = setting_up(optimizer=optimizer, lr_scale=3.0, steps=STEPS)
    before = lens.published_loss(h, log_p).item()
    for _ in range(STEPS // 2):
        lens.step(lens.cached_loss(h, captured.expected, captured.entropy_term))
    assert lens.published_loss(h, log_p).item() < 0.7 * before


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stop", [1, 6, 13])
def test_a_lens_stored_and_restored_goes_on_bit_for_bit(tmp_path, optimizer, stop):
    def steps(lens, h, log_p, start, end):
        for at in visits(N, 15, end, seed=3, start=start):
            lens.step(lens.published_loss(h[at], log_p[at]))

    whole, h, _, log_p = setting_up(optimizer=optimizer)
    steps(whole, h, log_p, 0, 20)
    first = setting_up(optimizer=optimizer)[0]
    steps(first, h, log_p, 0, stop)
    torch.save(first.state(), tmp_path / "state.pt")
    resumed = setting_up(optimizer=optimizer)[0]
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(resumed, h, log_p, stop, 20)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed), weights_of(whole), strict=True))
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_a_setting_says_what_it_is():
    assert str(Setting("sgd", 3.0)) == "sgd x3"
    assert str(Setting("adam", 1 / 3)) == "adam x0.333333"


# The order of tokens


@pytest.mark.parametrize(("tokens", "per_step"), [(40, 8), (40, 15), (7, 20), (40, 40), (1, 3)])
def test_every_token_is_visited_once_per_epoch(tokens, per_step):
    steps = 24
    drawn = list(visits(tokens, per_step, steps, seed=0))
    assert [len(at) for at in drawn] == [per_step] * steps
    everything = torch.cat(drawn)
    for start in range(0, len(everything) - tokens + 1, tokens):
        assert sorted(everything[start : start + tokens].tolist()) == list(range(tokens))
    rest = everything[len(everything) // tokens * tokens :].tolist()
    assert len(set(rest)) == len(rest)


def test_every_epoch_has_an_order_of_its_own_that_depends_on_the_seed_alone():
    torch.manual_seed(0)
    a = list(visits(40, 40, 6, seed=0))
    torch.manual_seed(1)
    assert all(torch.equal(x, y) for x, y in zip(a, visits(40, 40, 6, seed=0), strict=True))
    assert len({tuple(x.tolist()) for x in a}) == 6
    assert a[0].tolist() != list(range(40))
    others = {tuple(x.tolist()) for seed in (1, 2) for x in visits(40, 40, 6, seed=seed)}
    assert len(others) == 12
    assert others.isdisjoint({tuple(x.tolist()) for x in a})


@pytest.mark.parametrize("start", [0, 1, 2, 5, 8, 23, 24])
def test_visits_go_on_where_they_stopped(start):
    whole, tail = list(visits(40, 15, 24, seed=1)), list(visits(40, 15, 24, seed=1, start=start))
    assert len(tail) == 24 - start
    assert all(torch.equal(x, y) for x, y in zip(whole[start:], tail, strict=True))


# Windows


def test_windows_are_taken_in_their_order_a_few_at_a_time():
    readout = read_out(D, V)
    states = torch.randn(2, 44, D, generator=torch.Generator().manual_seed(0))
    windows = windows_of(capture_of(readout, states))  # 11 of up to 4 positions, of 6 documents
    windows.ids[:] = np.arange(windows.ids.size).reshape(windows.ids.shape)
    taken = list(steps_of(windows, 3))
    assert [len(some.ids) for some in taken] == [3, 3, 3], "a step of fewer is left out"
    for field in ("ids", "lengths", "positions", "valid", "documents", "sequence", "next_bytes"):
        together = np.concatenate([getattr(some, field) for some in taken])
        np.testing.assert_array_equal(together, getattr(windows, field)[:9])
        some = rows_of(windows, np.array([7, 2]))
        np.testing.assert_array_equal(getattr(some, field), getattr(windows, field)[[7, 2]])
    assert some.document_names == windows.document_names
    assert [len(s.ids) for s in steps_of(rows_of(windows, np.arange(6)), 3)] == [3, 3]
    assert list(steps_of(rows_of(windows, np.arange(2)), 3)) == []


# The ledger


def test_a_ledger_finds_what_was_added_in_this_process_and_the_next(tmp_path):
    ledger = Ledger(tmp_path / "new" / "table.csv", ("lens", "step"))
    assert len(ledger.rows()) == 0
    assert not ledger.has(lens="a")
    assert not ledger.has(lens="a", step=1)
    ledger.add(lens="a", step=1, kl=0.5)
    ledger.add(lens="b", step=2, kl=0.25)
    for reader in (ledger, Ledger(ledger.path, ledger.keys)):
        assert reader.has(lens="a", step=1)
        assert reader.has(lens="b", step=2)
        assert reader.has(step=2)
        assert not reader.has(lens="a", step=2)
        assert not reader.has(lens="c")
        assert not reader.has(lens="b", step=1)
    assert ledger.rows()["kl"].tolist() == [0.5, 0.25]
    assert [p.name for p in ledger.path.parent.iterdir()] == ["table.csv"], "no partial file stays behind"


def test_a_row_with_the_same_keys_takes_the_place_of_the_old_one(tmp_path):
    ledger = Ledger(tmp_path / "table.csv", ("lens", "step"))
    ledger.add(lens="a", step=1, kl=0.5)
    ledger.add(lens="b", step=1, kl=0.75)
    ledger.add(lens="a", step=1, kl=0.25)
    rows = ledger.rows().sort_values("lens")
    assert rows["lens"].tolist() == ["a", "b"]
    assert rows["kl"].tolist() == [0.25, 0.75]


def test_a_layers_number_is_found_and_replaced_beside_the_shared_lens(tmp_path):
    # With a word in it, the column comes back from the file as words.
    ledger = Ledger(tmp_path / "table.csv", ("lens", "step"))
    for lens in (5, 20, "shared"):
        ledger.add(lens=lens, step=0, kl=1.0)
    assert all(ledger.has(lens=lens, step=0) for lens in (5, 20, "shared"))
    ledger.add(lens=5, step=0, kl=0.5)
    assert len(ledger.rows()) == 3
    assert ledger.rows().set_index("lens")["kl"].to_dict() == {"20": 1.0, "shared": 1.0, "5": 0.5}


@pytest.mark.parametrize("others", [(), (1 / 3,), (27.0,)])
@pytest.mark.parametrize("scale", [1.0, 3.0, 3.0**-1, 3.0**-2])
def test_a_rate_is_found_again_and_replaced_whatever_digits_the_file_keeps_of_it(tmp_path, scale, others):
    ledger = Ledger(tmp_path / "table.csv", ("optimizer", "lr_scale"))
    others = tuple(other for other in others if other != scale)
    for other in others:
        ledger.add(optimizer="sgd", lr_scale=other, kl=2.0)
    ledger.add(optimizer="sgd", lr_scale=scale, kl=1.0)
    assert ledger.has(optimizer="sgd", lr_scale=scale)
    assert not ledger.has(optimizer="adam", lr_scale=scale)
    assert not ledger.has(optimizer="sgd", lr_scale=2 * scale)
    ledger.add(optimizer="sgd", lr_scale=scale, kl=0.5)
    rows = ledger.rows()
    assert len(rows) == 1 + len(others)
    # As the sweeps look a trial up.
    assert rows[(rows["optimizer"] == "sgd") & (rows["lr_scale"] == scale)]["kl"].tolist() == [0.5]


def test_rows_may_say_more_than_the_ones_before(tmp_path):
    ledger = Ledger(tmp_path / "table.csv", ("lens",))
    ledger.add(lens="a", kl=1.0)
    ledger.add(lens="done")
    ledger.add(lens="b", kl=2.0, seconds=3.5)
    rows = ledger.rows().set_index("lens")
    assert rows.loc["b", "seconds"] == 3.5
    assert pd.isna(rows.loc["done", "kl"])
    assert rows.loc["a", "kl"] == 1.0


# The machine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rate_of_the_machine_is_a_positive_number_of_operations_per_second(dtype):
    rate = matmul_rate(dtype, size=64)
    assert 1e6 < rate < 1e15


# What is compared


def task_of(readout):
    return Task("source", "text", SimpleNamespace(readout=readout, device=torch.device("cpu")), {}, "checksum")


def divergence(readout, final, x):
    log_p, log_q = readout(final).double().log_softmax(-1), readout(x).double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).detach().numpy()


@pytest.mark.parametrize("where", [1, "shared"])
def test_sums_by_document_are_those_of_the_divergence_by_definition(where):
    readout, layers, n = read_out(D, V, dtype=torch.float64), 3, 50
    random = torch.Generator().manual_seed(2)
    states = torch.randn(layers + 1, n, D, generator=random, dtype=torch.float64)
    captured = capture_of(readout, states)
    maps = AffineMaps(torch.randn(1, D, D, generator=random).double(), torch.randn(1, D, generator=random).double())
    sums = task_of(readout).kl_by_document(maps, where, captured)
    kls = np.stack(
        [divergence(readout, states[-1], states[k] @ maps.matrix[0].T + maps.offset[0]) for k in range(layers)]
    )
    if where == 1:
        per_token, expected = kls[1], kls[1].mean()
        assert (sums["tokens"] == pd.Series(captured.document).value_counts().sort_index().to_numpy()).all()
        by_document = pd.Series(per_token).groupby(captured.document).sum()
        np.testing.assert_allclose(sums["kl"], by_document, rtol=1e-9)
    else:
        # 50 tokens do not divide by three layers, and each layer counts the same all the same.
        expected = np.mean([kls[k, k::layers].mean() for k in range(layers)])
    assert sums["tokens"].sum() == pytest.approx(n)
    assert sums["document"].is_unique
    assert sums["kl"].sum() / n == pytest.approx(expected, rel=1e-9)
    assert task_of(readout).kl(maps, where, captured) == pytest.approx(expected, rel=1e-9)


def documents_of(kl, tokens=None):
    tokens = np.full(len(kl), 4.0) if tokens is None else tokens
    return pd.DataFrame({"document": np.arange(len(kl)), "kl": np.asarray(kl) * tokens, "tokens": tokens})


def test_a_difference_is_paired():
    random = np.random.default_rng(0)
    noise = random.normal(3.0, 2.0, 200)
    # What documents have in common does not widen the interval, and the order of rows does not matter.
    shifted = documents_of(noise - 0.25).sample(frac=1, random_state=1)
    assert paired_difference(shifted, documents_of(noise)) == pytest.approx((-0.25, -0.25, -0.25))
    other = noise - 0.25 + random.normal(0, 0.5, 200)
    mean, low, high = paired_difference(documents_of(other), documents_of(noise))
    half_width = 1.96 * np.std(other - noise, ddof=1) / 200**0.5
    assert mean == pytest.approx((other - noise).mean())
    assert (mean - low, high - mean) == (pytest.approx(half_width, rel=0.1), pytest.approx(half_width, rel=0.1))


def test_a_difference_of_other_documents_is_refused():
    with pytest.raises(LensbenchError, match="same documents"):
        paired_difference(documents_of([1.0, 2.0]), documents_of([1.0, 2.0, 3.0]))
    with pytest.raises(LensbenchError, match="same documents"):
        paired_difference(documents_of([1.0, 2.0]), documents_of([1.0, 2.0], np.array([4.0, 5.0])))


def test_documents_of_a_lens_take_the_place_of_its_old_ones(tmp_path):
    path = tmp_path / "new" / "documents.parquet"
    keep_documents(path, documents_of([1.0, 2.0]), lens=5, budget=10)
    keep_documents(path, documents_of([3.0, 4.0]), lens="shared", budget=10)
    keep_documents(path, documents_of([5.0, 6.0]), lens=5, budget=20)
    keep_documents(path, documents_of([7.0, 8.0]), lens=5, budget=10)
    table = pd.read_parquet(path)
    found = {key: list(rows["kl"]) for key, rows in table.groupby(["lens", "budget"])}
    assert found == {("5", "10"): [28.0, 32.0], ("shared", "10"): [12.0, 16.0], ("5", "20"): [20.0, 24.0]}


def both_sides():
    """A recipe of 1000 s that ends at 1.0 on eval and 2.0 on dev, and budgets whose eval and dev disagree."""
    recipe = pd.DataFrame([
        {"lens": "5", "step": step, "tokens": step * 1024, "optimizer": "adam", "lr_scale": 9.0, "eval_kl": 1.0,
         "dev_kl": 2.0, "model_seconds": 4.0 * step, "lens_seconds": 0.0, "model_gflop": 8.0 * step, "lens_gflop": 0.0}
        for step in (0, 250)
    ])  # fmt: skip
    ours = pd.DataFrame(
        [(1024, 2.0, 0.9, 2.4), (2048, 4.0, 1.2, 2.2), (4096, 9.0, 1.1, 1.9), (8192, 50.0, 0.5, 1.5)],
        columns=["budget", "seconds", "eval_kl", "dev_kl"],
    ).assign(lens="5", stage="refined", gflop=20.0)
    documents = pd.concat(
        [documents_of(np.full(6, row.eval_kl)).assign(lens="5", stage="refined", budget=str(row.budget))
         for row in ours.itertuples()]
    )  # fmt: skip
    return recipe, ours, documents_of(np.ones(6)).assign(lens="5", step="250"), documents


def test_budgets_are_chosen_on_dev_and_equality_holds_on_eval_too():
    found = ratios(*both_sides()).set_index("stage")
    row = found.loc["refined"]
    # Within 10 of 1000 seconds dev likes 4096 tokens best, eval 1024. Equal on eval from 1024, on dev from 4096: on both,
    # from 8192.
    assert (row["within_tokens"], row["within_kl"], row["equal_tokens"]) == (4096, 1.1, 8192)
    assert row["within_times_faster"] == pytest.approx(1000 / 9)
    assert row["within_times_fewer_flops"] == pytest.approx(2000 / 20)
    assert row["within_less_recipe"] == pytest.approx(0.1)
    assert row["within_less_recipe_ci_low"] == pytest.approx(0.1)
    assert pd.isna(found.loc["closed", "within_kl"])
    assert pd.isna(found.loc["closed", "equal_kl"])


def test_no_budget_within_the_share_leaves_its_columns_empty():
    recipe, ours, ends, documents = both_sides()
    found = ratios(recipe, ours[ours["budget"] > 4096], ends, documents).set_index("stage")
    assert pd.isna(found.loc["refined", "within_kl"])
    assert found.loc["refined", "equal_times_faster"] == pytest.approx(20)


# From end to end


def tiny_model(folder):
    """A ``save_pretrained`` folder: two layers, 40 words."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(39)} | {"[UNK]": 39}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def tiny_texts(folder):
    random = np.random.default_rng(0)
    folder.mkdir()
    for n in range(160):
        (folder / f"{n}.txt").write_text(" ".join(f"w{k}" for k in random.zipf(1.3, 90) % 39))


def fit_tiny(folder, parts, out="out"):
    """The parts of the fitting benchmark on the model and texts that lie in ``folder``, at layer 1."""
    fitting.main(
        f"path:{folder / 'model'}", text=f"file:{folder / 'texts'}", out=folder / out, layers="1", parts=parts,
        device="cpu", threads=1, length=34,
    )  # fmt: skip


@pytest.mark.slow
def test_the_fitting_benchmark_runs_resumes_and_draws(tmp_path, monkeypatch):
    tiny_model(tmp_path / "model")
    tiny_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "SWEEP_TOKENS", 1000)
    monkeypatch.setattr(published, "STEPS", 100)
    monkeypatch.setattr(our_side, "CLOSED_BUDGETS", (1024, 32768))
    monkeypatch.setattr(our_side, "REFINED_BUDGETS", (2048, 6144, 65536))
    fit_tiny(tmp_path, "sweep")
    # The run is broken off after its first steps and goes on from there.
    checkpoints = iter(published.CHECKPOINTS)
    real = torch.save

    def broken_off(content, path):
        real(content, path)
        if next(checkpoints) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken_off)
    with pytest.raises(KeyboardInterrupt):
        fit_tiny(tmp_path, "recipe")
    monkeypatch.setattr(torch, "save", real)
    fit_tiny(tmp_path, "recipe,ours,everything,table")
    out = tmp_path / "out"
    (out / "whole").mkdir()
    shutil.copy(out / "sweep.csv", out / "whole" / "sweep.csv")
    for state in (tmp_path / "runs").rglob("recipe-*.pt"):
        state.unlink()
    fit_tiny(tmp_path, "recipe", "out/whole")
    before = (out / "recipe.csv").read_bytes()
    fit_tiny(tmp_path, "recipe")
    assert (out / "recipe.csv").read_bytes() == before, "a finished part is not run again"
    kls = ["lens", "step", "eval_kl", "dev_kl"]
    resumed, whole = pd.read_csv(out / "recipe.csv"), pd.read_csv(out / "whole" / "recipe.csv")
    # The text is too short for all steps: the schedule ends with it, and so do the checkpoints.
    assert resumed["step"].max() not in published.CHECKPOINTS
    pd.testing.assert_frame_equal(resumed[kls], whole[kls])
    assert (resumed.groupby("lens")["eval_kl"].last() < resumed.groupby("lens")["eval_kl"].first()).all()

    fitted = pd.read_csv(out / "fitting.csv")
    assert set(zip(fitted["lens"], fitted["stage"], strict=True)) == {
        (lens, stage) for lens in ("1", "shared") for stage in ("closed", "refined")
    }
    budgets = pd.read_csv(out / "ours.csv")
    # Budgets beyond the text are left out.
    assert budgets["budget"].max() == 6144
    refined = budgets[budgets["stage"] == "refined"]
    assert (refined["gflop"] > 0).all()
    assert refined["seconds"].gt(0).all()
    every = pd.read_csv(out / "everything.csv")
    layers = every[(every["stage"] == "refined") & (every["lens"] != "shared")]
    np.testing.assert_allclose(layers["tuned_lens_kl"], layers["eval_kl"], atol=1e-4)
    for name in ("kl-by-seconds.png", "kl-by-tokens.png", "fitting.json", "everything-seconds.csv"):
        assert (out / name).stat().st_size > 0


@pytest.mark.slow
def test_the_converged_recipe_stands_beside_ours_on_the_same_tokens(tmp_path, monkeypatch):
    tiny_model(tmp_path / "model")
    tiny_texts(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(published, "STEPS", 50)
    monkeypatch.setattr(published, "CONVERGED", FitRecipe(refine_tokens=2048, refine_passes=2))
    fit_tiny(tmp_path, "converged")
    table = pd.read_csv(tmp_path / "out" / "converged.csv")
    recipe = table[table["side"] == "recipe"]
    assert recipe["step"].max() == 50
    assert recipe["tokens"].max() == 512 * 50
    assert recipe["eval_kl"].iloc[-1] < recipe["eval_kl"].iloc[0]
    assert set(table["side"]) == {"closed", "refined", "recipe"}
    assert table["pool_tokens"].nunique() == 1


@pytest.mark.slow
def test_jacobian_lenses_are_counted_in_forward_passes_and_timed_next_to_tuned_ones(tmp_path):
    tiny_model(tmp_path / "model")
    tiny_texts(tmp_path / "texts")
    jacobian.main(
        f"path:{tmp_path / 'model'}", text=f"file:{tmp_path / 'texts'}", out=tmp_path / "out", prompts=8, length=34,
        probes=3, exact=2, trained=1, precision=0.1, device="cpu", threads=1,
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "jacobian.csv").set_index("method")
    passes = table["passes_per_prompt"]
    assert passes["Jacobian lenses, exact"] == 1 + 16
    assert passes["Jacobian lenses, random"] == 1 + 3
    assert passes["Jacobian lenses, random with control"] == 1 + 3 + PILOT_PROMPTS * PILOT_PROBES / 8
    assert passes["tuned lenses, closed form"] > 1
    assert (table["passes_by_closed"] * passes.iloc[0]).to_numpy() == pytest.approx(passes, rel=1e-2)
    of_jacobians = table.loc[[name for name in table.index if "Jacobian" in name]]
    assert (of_jacobians["error_worst"] >= of_jacobians["error_median"]).all()
    assert (
        of_jacobians["prompts_to_precision"] >= of_jacobians["prompts"] * (of_jacobians["error_worst"] / 0.1) ** 2 - 1
    ).all()
    assert (table["seconds"] > 0).all()
    assert table["estimated"].to_dict()["tuned lenses, training"]
    assert (tmp_path / "out" / "jacobian.json").is_file()


@pytest.mark.parametrize(
    ("module", "options", "line"),
    [
        (fitting, {"threads": 0}, "--threads is 0: at least 1"),
        (fitting, {"layers": "5,x"}, "--layers is '5,x'"),
        (fitting, {"layers": ""}, "--layers is ''"),
        (fitting, {"parts": "sweeep"}, "there is no part 'sweeep'; there are sweep, recipe"),
        (fitting, {"parts": "package"}, "needs --tuned-lens"),
        (fitting, {"parts": "table"}, "lacks sweep.csv: run the part sweep first"),
        (transfer, {"layers": "0,x"}, "--layers is '0,x'"),
        (transfer, {"threads": -1}, "--threads is -1"),
        (transfer, {}, "unknown model 'nowhere'"),
        (jacobian, {"exact": 1}, "--exact is 1: an error needs two prompts"),
        (jacobian, {}, "unknown model 'nowhere'"),
    ],
)
def test_bad_options_are_answered_in_one_line(tmp_path, module, options, line, capsys):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    arguments = ["--model", "nowhere", "--out", str(tmp_path / "out")]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    answer = CliRunner().invoke(app, arguments)
    printed = answer.output + capsys.readouterr().out
    assert answer.exit_code == 2
    assert line in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_steps_that_are_timed_again_give_the_whole_run_their_pace_and_leave_its_losses():
    rows = [(lens, step, 3.0 / (1 + step), 7.0 * step, 5.0 * step) for step in (0, 100) for lens in ("5", "shared")]
    recipe = pd.DataFrame(rows, columns=["lens", "step", "eval_kl", "model_seconds", "lens_seconds"])
    again = pd.DataFrame(
        [("5", 10, 9.0, 20.0, 30.0), ("shared", 10, 9.0, 20.0, 40.0), ("5", 0, 9.0, 0.0, 0.0)], columns=recipe.columns
    )
    found = timed_again(recipe, again).set_index(["lens", "step"])
    assert found["model_seconds"].tolist() == [0.0, 0.0, 200.0, 200.0]
    assert found["lens_seconds"].tolist() == [0.0, 0.0, 300.0, 400.0]
    assert found["eval_kl"].tolist() == recipe["eval_kl"].tolist()
