"""The training loop: resuming, checkpoints that cannot be trusted, the schedule, the batches, who moves which parameter."""

import math
import re

import numpy as np
import pytest
import torch
from helpers.training import CPU, SHAPE, STREAM, model_of, recipe
from safetensors.torch import load_file, save_file

from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.models import FAMILIES
from lensbench.models.training import SinglePrecisionMuon, batch_of, optimizers_of, orthogonalised, train

TEXT = [name for name, family in FAMILIES.items() if not family.images]


def run(folder, model=None, setup=None, report=None, seed=0, stream=STREAM):
    model = model_of() if model is None else model
    setup = recipe() if setup is None else setup
    return train(model, stream, setup, seed=seed, checkpoints=folder, device=CPU, report=report)


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def report(progress):
        if progress.step == step:
            raise Interrupted

    return report


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Resuming


@pytest.mark.parametrize("family", TEXT)
def test_an_interrupted_and_resumed_run_ends_with_bit_identical_weights(family, tmp_path):
    undisturbed = run(tmp_path / "a", model_of(family))
    assert not same_weights(undisturbed, model_of(family))
    for step in (5, 7):  # after the first and after the second checkpoint
        with pytest.raises(Interrupted):
            run(tmp_path / "b", model_of(family), report=interrupt_at(step))
    assert (tmp_path / "b" / "checkpoint.safetensors").exists()
    seen = []
    # What the model held before must not matter, nor the state of the global generator.
    torch.manual_seed(99)
    resumed = run(tmp_path / "b", model_of(family, seed=8), report=seen.append)
    assert seen[0].step == 7
    assert seen[-1].step == 10
    assert same_weights(undisturbed, resumed)
    assert not resumed.training


def test_a_run_interrupted_before_its_first_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "b", report=interrupt_at(2))
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))


def test_an_unfinished_checkpoint_beside_a_whole_one_does_no_harm(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "b", report=interrupt_at(7))
    (tmp_path / "b" / "checkpoint.safetensors.partial").write_bytes(b"half a fi")
    assert same_weights(run(tmp_path / "a"), run(tmp_path / "b"))


# Checkpoints that must not be used


@pytest.fixture
def checkpoint(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, report=interrupt_at(7))
    return tmp_path / "checkpoint.safetensors"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:5])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"\xff" * 4096)


def drop_metadata(path):
    save_file(load_file(path), path)


def drop_a_weight(path):
    rewrite(path, lambda tensors: tensors.pop(next(k for k in tensors if k.startswith("model."))))


def drop_a_moment(path):
    rewrite(path, lambda tensors: tensors.pop(next(k for k in tensors if k.endswith("momentum_buffer"))))


def garble_the_step(path):
    save_file(load_file(path), path, metadata={"step": "six"})


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"step": "6"})


@pytest.mark.parametrize(
    "damage", [truncate, cut_header, empty, garble, drop_metadata, drop_a_weight, drop_a_moment, garble_the_step]
)
def test_a_damaged_checkpoint_is_refused_by_name(damage, checkpoint):
    damage(checkpoint)
    with pytest.raises(LensbenchError, match=re.escape(str(checkpoint))):
        run(checkpoint.parent)


@pytest.mark.parametrize(
    ("owner", "reader"),
    [
        ({}, {"family": "gpt2"}),
        ({}, {"family": "predictive-coding"}),
        ({}, {"vocab_size": 40}),
        ({}, {"parameters": 14_000}),
        ({}, {"layers": 1, "parameters": 8_000}),
        ({"layers": 3, "parameters": 17_000}, {"layers": 2, "parameters": 12_000, "same_width": True}),
        ({"family": "predictive-coding", "heads": 1}, {"family": "predictive-coding", "heads": 4}),
    ],
    ids=["gpt2", "pc", "vocabulary", "width", "fewer layers", "more layers", "heads"],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(owner, reader, tmp_path):
    from lensbench.models import gpt

    same_width = reader.pop("same_width", False)
    writer = gpt.llama(**{**SHAPE, **{k: v for k, v in owner.items() if k in SHAPE}}, width=24) if same_width else None
    with pytest.raises(Interrupted):
        run(tmp_path, writer or model_of(**owner), report=interrupt_at(4))
    other = gpt.llama(**SHAPE, width=24) if same_width else model_of(**reader)
    with pytest.raises(LensbenchError, match="checkpoint"):
        run(tmp_path, other)


# A loss that is no number


def test_a_poisoned_weight_is_reported_with_its_step(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(LensbenchError, match=r"loss is nan at step 1 of 10"):
        run(tmp_path, model)


@pytest.mark.parametrize("family", TEXT)
def test_a_huge_learning_rate_is_reported_with_its_step_and_named(family, tmp_path):
    with pytest.raises(LensbenchError, match=r"step \d+ of 10.*learning_rate"):
        run(tmp_path, model_of(family), recipe(learning_rate=1e30))


def test_the_checkpoint_kept_after_a_diverged_run_is_one_that_can_go_on(tmp_path):
    with pytest.raises(LensbenchError, match="last good checkpoint kept"):
        run(tmp_path, setup=recipe(learning_rate=1e30, checkpoint_every=1))
    run(tmp_path, setup=recipe(learning_rate=1e-3, checkpoint_every=1))


def test_a_run_whose_last_step_diverges_does_not_pass_for_a_trained_model(tmp_path):
    model = model_of()
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)  # overflows while the loss is finite
    with pytest.raises(LensbenchError, match="step 1 of 1"):
        run(tmp_path, model, recipe(steps=1))


# The schedule


@pytest.mark.parametrize(
    ("steps", "warmup"), [(200, 0.05), (200, 0.0), (1000, 0.033), (130, 0.05), (16, 0.05), (3, 0.1)]
)
def test_the_rate_rises_to_the_peak_never_above_it_and_falls_along_a_cosine(steps, warmup):
    setup = recipe(steps, warmup=warmup, learning_rate=0.02, final_rate=0.1)
    assert setup.steps == steps
    rates = [setup.rate(step) for step in range(steps)]
    assert max(rates) <= 0.02 * (1 + 1e-12)
    assert min(rates) > 0
    top = int(np.argmax(rates))
    assert rates[top] == pytest.approx(0.02, rel=0.01) or steps < 20
    assert abs(top - warmup * steps) <= 1.5
    assert (np.diff(rates[: top + 1]) >= 0).all()
    assert (np.diff(rates[top:]) <= 0).all()
    if steps >= 200:
        assert rates[-1] == pytest.approx(0.1 * 0.02, rel=0.01)
        # Half-way down in time is half-way between peak and end.
        assert rates[round((warmup * steps + steps) / 2)] == pytest.approx((0.02 + 0.002) / 2, rel=0.02)
    if warmup * steps > 10:
        n = int(warmup * steps)
        np.testing.assert_allclose(np.diff(rates[:n], 2), 0, atol=1e-9)
        assert rates[0] == pytest.approx(0.02 / (warmup * steps), rel=0.05)


@pytest.mark.parametrize(("warmup", "expected"), [(0.0, 0.01), (0.5, 0.01 / 5)])
def test_the_optimizer_moves_by_the_rate_of_the_step(warmup, expected, tmp_path):
    model = model_of("gpt2")
    before = model.transformer.ln_f.bias.detach().clone()
    with pytest.raises(Interrupted):
        run(tmp_path, model, recipe(learning_rate=0.01, warmup=warmup), report=interrupt_at(1))
    # AdamW's first step is rate * g / |g|.
    assert (model.transformer.ln_f.bias - before).abs().max().item() == pytest.approx(expected, rel=1e-3)


def test_the_number_of_steps_is_that_of_the_tokens():
    assert TrainingRecipe(tokens=100_000, length=128, batch=8).steps == round(100_000 / 1024)
    assert TrainingRecipe(tokens=1).steps == 1


# Learning and data


@pytest.mark.parametrize("family", TEXT)
def test_the_loss_falls_on_a_repetitive_stream(family, tmp_path):
    losses = []
    stream = np.tile(np.arange(7), 100)
    run(tmp_path, model_of(family), recipe(30), report=lambda r: losses.append(r.loss), stream=stream)
    assert losses[0] == pytest.approx(math.log(50), abs=0.7), "an untrained model knows nothing"
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_batches_depend_on_seed_and_step_alone():
    setup = recipe()
    torch.manual_seed(0)
    first = batch_of(STREAM, setup, 3, 5)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    batch_of(STREAM, setup, 3, 4)
    assert torch.equal(first, batch_of(STREAM, setup, 3, 5))
    assert not torch.equal(first, batch_of(STREAM, setup, 3, 6))
    assert not torch.equal(first, batch_of(STREAM, setup, 4, 5))
    assert not torch.equal(batch_of(STREAM, setup, 0, 1), batch_of(STREAM, setup, 1, 0))


def test_batches_are_stretches_of_the_stream_and_reach_its_first_and_last_token():
    stream, setup = np.arange(20), recipe()
    starts = set()
    for step in range(60):
        ids = batch_of(stream, setup, 0, step)
        assert ids.shape == (4, 16)
        assert ids.dtype == torch.long
        assert (ids.diff(dim=1) == 1).all()
        starts |= set(ids[:, 0].tolist())
    assert starts == set(range(5))


def test_a_stream_shorter_than_a_sequence_is_refused(tmp_path):
    for length in (0, 1, 15):
        with pytest.raises(LensbenchError, match=f"{length} tokens.*16"):
            run(tmp_path, stream=STREAM[:length])


def test_a_stream_of_exactly_one_sequence_trains(tmp_path):
    run(tmp_path, setup=recipe(1), stream=STREAM[:16])


# Who moves what


@pytest.mark.parametrize("family", TEXT)
def test_every_parameter_belongs_to_exactly_one_optimizer(family):
    model = model_of(family)
    ids = [id(p) for o in optimizers_of(model, recipe()) for g in o.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("family", TEXT)
def test_muon_moves_the_matrices_between_hidden_states_and_nothing_else(family):
    model = model_of(family)
    moved = {
        id(p)
        for o in optimizers_of(model, recipe())
        if isinstance(o, torch.optim.Muon)
        for g in o.param_groups
        for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        # Vectors, tables of tokens and positions, and depthwise convolutions map no hidden state to another.
        table = any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head", "conv_", "convolution"))
        assert (id(parameter) in moved) == (parameter.ndim == 2 and not table), name


def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_sizes():
    """Against the SVD, tall and wide ones, in one batch."""
    from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C

    for shape in ((3, 12, 7), (2, 5, 20)):
        matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = orthogonalised(matrices, (DEFAULT_A, DEFAULT_B, DEFAULT_C), 5, 1e-7)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        sizes = u.transpose(1, 2) @ found @ vh.transpose(1, 2)
        assert (sizes - torch.diag_embed(sizes.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
        assert sizes.diagonal(dim1=1, dim2=2).min() > 0.5
        assert sizes.diagonal(dim1=1, dim2=2).max() < 1.5


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torchs_muon_but_for_its_precision(nesterov):
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 8), (8, 8), (16, 8), (8, 24))
    start = [torch.randn(*s, generator=generator) for s in shapes]
    moved = []
    for kind, how in ((SinglePrecisionMuon, {}), (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"})):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(params, lr=0.05, weight_decay=0.1, nesterov=nesterov, **how)
        steps = torch.Generator().manual_seed(2)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(*p.shape, generator=steps)
            optimizer.step()
        moved.append([p.detach() - q for p, q in zip(params, start, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert torch.linalg.norm(ours - theirs) < 0.05 * torch.linalg.norm(theirs)  # bfloat16 has three digits


# Checkpoints that are kept


def kept_weights(folder, setup, report=None):
    """Weights by tokens as they are kept, over as many attempts as it takes, and those at the end."""
    kept, model = {}, model_of()

    def keep(tokens):
        kept[tokens] = {k: v.clone() for k, v in model.state_dict().items()}

    try:
        train(model, STREAM, setup, seed=0, checkpoints=folder, device=CPU, report=report, keep=keep)
    except Interrupted:
        rest = kept_weights(folder, setup)
        return {**kept, **rest[0]}, rest[1]
    return kept, model


def test_a_checkpoint_is_the_model_behind_as_many_steps_and_the_end_is_the_same_without(tmp_path):
    setup = recipe(checkpoints=(0, 4 * 64, 6 * 64))
    kept, end = kept_weights(tmp_path / "a", setup)
    assert same_weights(end, run(tmp_path / "b", setup=recipe()))
    assert list(kept) == [0, 256, 384]
    assert all(torch.equal(v, model_of().state_dict()[k]) for k, v in kept[0].items())
    for tokens in (256, 384):  # an independent loop that stops there: what a callback after that step sees
        seen, model = {}, model_of()

        def look(at, seen=seen, model=model, tokens=tokens):
            if at.step * 64 == tokens:
                seen.update({k: v.clone() for k, v in model.state_dict().items()})

        run(tmp_path / f"c{tokens}", model, report=look)
        assert seen.keys() == kept[tokens].keys()
        assert all(torch.equal(seen[k], v) for k, v in kept[tokens].items())


@pytest.mark.parametrize("step", [2, 5, 6, 7])
def test_an_interrupted_training_keeps_the_same_checkpoints(step, tmp_path):
    setup = recipe(checkpoints=(0, 4 * 64, 6 * 64))
    kept, end = kept_weights(tmp_path / "a", setup)
    again, resumed = kept_weights(tmp_path / "b", setup, interrupt_at(step))
    assert same_weights(end, resumed)
    assert set(again) == set(kept)
    assert all(torch.equal(v, again[tokens][k]) for tokens, found in kept.items() for k, v in found.items())
