"""Every variant of the predictive-coding LM: its update against loops, gradient steps by autograd, caches, transformers."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.predictive_coding import D, H, L, T, V, any_model, array, rms, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lensbench.models import predictive_coding as module
from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM

VARIANTS = {
    "strict": {},
    "no error": {"error": "none"},
    "cheap error": {"error": "linear"},
    "error as data": {"error_gradient": False},
    "linear kernel": {"kernel": "linear"},
    "linear kernel without decay": {"kernel": "linear", "decay": False},
    "delta rule": {"kernel": "linear", "delta_rule": True},
    "softmax kernel": {"kernel": "softmax"},
    "softmax kernel without decay": {"kernel": "softmax", "decay": False},
    "exp kernel without decay": {"decay": False},
    "relaxed": {"relaxed": True},
    "tied layers": {"tied_layers": True},
    "own keys": {"tie_query_key": False},
    "own output": {"tie_value_output": False, "kernel": "softmax"},
    "everything": {"relaxed": True, "tied_layers": True, "kernel": "linear", "error": "linear", "tie_query_key": False},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def model_of(variant, **changes):
    return tiny(**({"error": "softmax"} | VARIANTS[variant] | changes))


def random_inputs(length=T, seed=3):
    g = torch.Generator().manual_seed(seed)
    u, error = (torch.randn(2, length, D, generator=g, dtype=torch.float64) for _ in range(2))
    error[:, 0] = 0  # the first token reveals nothing
    return u, error


# The update, slowly


def slow_update(layer, u, error):
    """What the docstrings say, one query, head and error at a time; ``error[s]`` belongs to the features of s-1."""
    q, v = array(layer.query_key.weight), array(layer.value_output.weight)
    k = q if layer.key is None else array(layer.key.weight)
    out = v if layer.output is None else array(layer.output.weight)
    eta = np.exp(array(layer.log_eta))
    beta = None if layer.log_beta is None else np.exp(array(layer.log_beta))
    gamma = np.ones(H) if layer.decay_logit is None else 1 / (1 + np.exp(-array(layer.decay_logit)))
    size, change = D // H, np.zeros((len(u), D))
    f = [rms(row) for row in u]

    def unit(weight, row):
        return weight @ row / np.linalg.norm(weight @ row)

    for h in range(H):
        rows = slice(h * size, (h + 1) * size)
        memory = np.zeros((size, size))
        for n in range(len(u)):
            c_n = unit(q[rows], f[n])
            seen = range(1, n + 1) if layer.causal else range(1, len(u))
            if layer.delta_rule:
                if n:
                    c_i = unit(k[rows], f[n - 1])
                    memory = gamma[h] * memory
                    memory = memory + (1 - np.exp(-eta[h])) * np.outer(v[rows] @ error[n] - memory @ c_i, c_i)
                change[n] += out[rows].T @ (memory @ c_n)
                continue
            weights = {}
            for s in seen:
                similar = unit(k[rows], f[s - 1]) @ c_n
                aged = gamma[h] ** abs(n - s)
                if layer.kernel_name == "linear":
                    weights[s] = eta[h] * aged * similar
                elif layer.kernel_name == "exp":
                    weights[s] = eta[h] * aged * np.exp(beta[h] * (similar - 1))
                else:
                    weights[s] = aged * np.exp(beta[h] * similar)
            if layer.kernel_name == "softmax" and weights:
                total = sum(weights.values())
                weights = {s: eta[h] * w / total for s, w in weights.items()}
            change[n] += sum((w * (out[rows].T @ (v[rows] @ error[s])) for s, w in weights.items()), np.zeros(D))
    return change


@every_variant
@pytest.mark.parametrize("causal", [True, False])
def test_the_update_is_the_sum_that_the_docstring_says(variant, causal):
    if VARIANTS[variant].get("delta_rule") and not causal:
        pytest.skip("refused by the config")
    layer = model_of(variant, causal=causal).layers[0]
    u, error = random_inputs()
    with torch.no_grad():
        update = layer.update(u, error)
    for b in range(2):
        expected = slow_update(layer, u[b].numpy(), error[b].numpy())
        assert np.abs(expected[1:]).max() > 1e-2
        np.testing.assert_allclose(update[b].numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", ["linear kernel", "linear kernel without decay", "delta rule"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunks_of_the_linear_kernel_add_up_whatever_their_size_gradients_too(rule, length, monkeypatch):
    layer = model_of(rule).layers[0]
    u, error = random_inputs(length)
    found = []
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setitem(module.CHUNK, "cpu", chunk)
        layer.zero_grad()
        ours = u.clone().requires_grad_()
        update = layer.update(ours, error)
        update.square().sum().backward()
        found.append((update.detach(), ours.grad, layer.log_eta.grad.clone()))
    if rule != "delta rule":
        weights = layer.kernel(u).detach()
        value = layer.split(layer.value_output(error))
        quadratic = (weights @ value).transpose(1, 2).flatten(2) @ layer.value_output.weight
        torch.testing.assert_close(found[0][0], quadratic.detach(), rtol=0, atol=1e-12)
    for one, other in itertools.pairwise(found):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize(
    ("variant", "whole"), [("linear kernel", False), ("delta rule", False), ("softmax kernel", False), ("strict", True)]
)
def test_nothing_of_the_size_of_all_pairs_of_tokens_is_made_where_the_kernel_allows(variant, whole):
    model = model_of(variant, dtype=torch.float32, vocab_size=8, rms_norm_eps=1e-6)
    length = 1024
    ids = torch.randint(0, 8, (1, length))
    with Sizes() as seen:
        model(ids, labels=ids).loss.backward()
    pairs = H * length * length
    assert (seen.largest >= pairs // 4) == whole, f"{seen.largest} entries"
    assert seen.largest < pairs, "the exp kernel, too, takes some queries at a time"


def test_queries_of_the_exp_kernel_can_be_taken_a_few_at_a_time(monkeypatch):
    model, ids = tiny(), tokens(length=50)
    with torch.no_grad():
        whole = model(ids).logits
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
        torch.testing.assert_close(model(ids).logits, whole, rtol=0, atol=1e-12)


# Exactness: what a layer is


def gradient_of_cross_entropy(layer, table, latent, c, targets, decay, weight):
    """Minus the gradient, by autograd, with respect to the read-out W of each head at ``weight``: [H, d/H, d/H].

    The loss of the predictions 0..n-1 whose tokens 1..n are known, each the sooner forgotten the older it is.
    """
    weight = weight.clone().requires_grad_()
    v = layer.value_output.weight.detach().view(H, D // H, D)
    loss = 0.0
    for i, target in enumerate(targets):
        moved = torch.einsum("hvd,hvk,hk->hd", v, weight, c[:, i])
        for h in range(H):
            ce = F.cross_entropy(table @ (latent[i] + moved[h]), target)
            loss = loss + decay[h] ** (len(targets) - 1 - i) * ce / table.square().mean().sqrt()
    (gradient,) = torch.autograd.grad(loss, weight)
    return -gradient


@pytest.mark.parametrize("variant", ["linear kernel", "linear kernel without decay"])
def test_a_layer_given_its_errors_is_one_preconditioned_gradient_step_on_a_linear_readout(variant):
    """For every position: W moves by eta times minus the gradient of the cross-entropy so far, decay included."""
    model, ids = model_of(variant), tokens(batch=1)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    table = model.embed_tokens.weight.detach()
    for number, layer in enumerate(model.layers):
        u = out.hidden_states[number + 1][0, :, D : 2 * D]
        latent = model.norm(out.predictions[number])[0].detach()
        c, _ = layer.queries_and_keys(u[None])
        c = c[0].detach()
        eta, decay = layer.log_eta.detach().exp(), layer.log_decay.detach().exp()
        v = layer.value_output.weight.detach().view(H, D // H, D)
        for n in range(1, T):
            start = torch.zeros(H, D // H, D // H, dtype=torch.float64)
            w = eta[:, None, None] * gradient_of_cross_entropy(layer, table, latent, c, ids[0, 1 : n + 1], decay, start)
            step = torch.einsum("hvd,hvk,hk->d", v, w, c[:, n])
            assert step.abs().max() > 1e-3
            torch.testing.assert_close(out.updates[number][0, n], step, rtol=0, atol=1e-12)


def shared_features(**changes):
    """Linear kernel, one layer for all, whose MLP writes nothing: the same features in every layer."""
    model = tiny(kernel="linear", decay=False, tied_layers=True, **changes)
    with torch.no_grad():
        model.layers[0].down.weight.zero_()
        model.layers[0].log_eta.fill_(np.log(0.3))
    return model


def descent(model, ids, steps):
    """Explicit gradient descent on the read-outs W: latents z_n + sum_h V_h^T W_h c_n after every step.

    The gradient is autograd's of the cross-entropy of E (g rms(z)), the norm's Jacobian and gain dropped: they pass through.
    """
    layer, table = model.layers[0], model.embed_tokens.weight.detach()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        start = out.predictions[0][0]
        c = layer.queries_and_keys(out.hidden_states[0][..., D : 2 * D])[0][0]
    v = layer.value_output.weight.detach().view(H, D // H, D)
    w = torch.zeros(H, D // H, D // H, dtype=torch.float64, requires_grad=True)
    eta = layer.log_eta.detach().exp()
    found = [start]
    for _ in range(steps):
        z = start + torch.einsum("hvd,hvk,hnk->nd", v, w, c)
        latent = z + (model.norm(z) - z).detach()
        loss = F.cross_entropy(latent[:-1] @ table.T, ids[0, 1:], reduction="sum") / table.square().mean().sqrt()
        (gradient,) = torch.autograd.grad(loss, w)
        w = (w - eta[:, None, None] * gradient).detach().requires_grad_()
        found.append((start + torch.einsum("hvd,hvk,hnk->nd", v, w, c)).detach())
    return found


def test_layers_of_the_uniform_variant_with_shared_features_are_steps_of_gradient_descent():
    model, ids = shared_features(causal=False), tokens(batch=1)
    with torch.no_grad():
        layers = model(ids, output_hidden_states=True).predictions
    steps = descent(model, ids, L)
    for z, step in zip(layers, steps, strict=True):
        torch.testing.assert_close(z[0], step, rtol=0, atol=1e-12)
    assert (steps[-1] - steps[0]).abs().max() > 0.1


def test_causal_layers_are_one_step_at_the_last_token_and_leave_descent_from_the_second_on():
    """z_i was updated from its own shorter prefix: the gap that in-context descent with a causal mask has (2308.06912)."""
    causal, ids = shared_features(), tokens(batch=1)
    uniform = shared_features(causal=False)
    uniform.load_state_dict(causal.state_dict())
    gaps = []
    with torch.no_grad():
        ours = causal(ids, output_hidden_states=True).predictions
        for n in range(2, T):
            steps = uniform(ids[:, : n + 1], output_hidden_states=True).predictions
            torch.testing.assert_close(ours[1][0, n], steps[1][0, n], rtol=0, atol=1e-12)
            moved = (steps[-1][0, n] - steps[0][0, n]).norm()
            gaps.append(float((ours[-1][0, n] - steps[-1][0, n]).norm() / moved))
    assert min(gaps) > 1e-3


def test_the_uniform_variant_reads_a_token_otherwise_than_its_truncated_sequence_does():
    """It sees what it predicts: at an earlier token the two differ by far more than rounding; at the last they are one."""
    model, ids = shared_features(causal=False), tokens(batch=1)
    with torch.no_grad():
        whole = model(ids).logits
        for n in range(2, T - 1):
            cut = model(ids[:, : n + 1]).logits
            assert (cut[0, n] - whole[0, n]).abs().max() > 1e-2
        torch.testing.assert_close(model(ids[:, :T]).logits, whole, rtol=0, atol=1e-12)


def test_the_uniform_variant_has_neither_loss_nor_cache_nor_generation():
    model, ids = tiny(causal=False), tokens()
    for wrong in ({"labels": ids}, {"use_cache": True}):
        with pytest.raises(ValueError, match="sees the tokens that it predicts"):
            model(ids, **wrong)
    with pytest.raises(ValueError, match="sees the tokens that it predicts"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)


# Errors and places


def test_the_cheap_error_is_the_embedding_less_a_map_of_the_prediction_and_trains_the_map():
    model, ids = tiny("linear"), tokens()
    out = model(ids, output_hidden_states=True)
    table = model.embed_tokens.weight.detach()
    embedded = table[ids[:, 1:]]
    embedded = embedded / embedded.square().mean(-1, keepdim=True).sqrt()
    for number, layer in enumerate(model.layers):
        z = out.predictions[number][:, :-1]
        expected = embedded - z / z.square().mean(-1, keepdim=True).sqrt() @ layer.predicted.weight.T
        torch.testing.assert_close(out.errors[number][:, 1:], expected, rtol=0, atol=1e-9)
    out.logits.square().sum().backward()
    assert all(layer.predicted.weight.grad.abs().max() > 0 for layer in model.layers)


def test_an_error_as_data_is_the_same_error_that_nothing_is_trained_through():
    ours, data = tiny(), tiny(error_gradient=False)
    data.load_state_dict(ours.state_dict())
    z = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours.error(z, tokens()), data.error(z, tokens()), rtol=0, atol=1e-12)
    assert not data.error(z, tokens()).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()).logits, data(tokens()).logits, rtol=0, atol=1e-10)


def test_what_is_expected_does_not_depend_on_the_blocks_that_it_is_made_in(monkeypatch):
    table, latent = torch.randn(V, D, dtype=torch.float64), torch.randn(100, D, dtype=torch.float64)
    expected = (latent @ table.T).softmax(-1) @ table
    for entries in (1, 7 * V, 10**9):
        monkeypatch.setitem(module.ENTRIES_AT_ONCE, "cpu", entries)
        torch.testing.assert_close(module.expected_embedding(latent, table), expected, rtol=0, atol=1e-12)


@every_variant
def test_predictions_move_by_updates_and_in_the_relaxed_form_writes_and_read_out_to_the_logits(variant):
    model, ids = model_of(variant), tokens()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert (out.writes is None) == (not model.config.relaxed)
        writes = out.writes or [torch.zeros_like(x) for x in out.updates]
        for k in range(L):
            moved = out.predictions[k] + out.updates[k] + writes[k]
            torch.testing.assert_close(out.predictions[k + 1], moved, rtol=0, atol=1e-13)
            layer = model.layers[k % len(model.layers)]
            again = model.error(out.predictions[k], ids, layer)
            torch.testing.assert_close(out.errors[k], again, rtol=0, atol=1e-13)
        torch.testing.assert_close(model.read_out(out.predictions[-1]), out.logits, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.read_out(out.hidden_states[-1]), out.logits, rtol=0, atol=1e-12)


def test_tied_layers_are_one_tensor_and_equal_an_untied_model_with_copies_of_it():
    tied, loose = tiny(tied_layers=True), tiny()
    assert len(tied.layers) == 1
    assert len(loose.layers) == L
    own = {k: v for k, v in tied.state_dict().items() if not k.startswith("layers.")}
    copies = {f"layers.{n}.{k}": v for n in range(L) for k, v in tied.layers[0].state_dict().items()}
    loose.load_state_dict(own | copies)
    with torch.no_grad():
        torch.testing.assert_close(tied(tokens()).logits, loose(tokens()).logits, rtol=0, atol=1e-12)


# An ordinary citizen


@every_variant
def test_no_logit_depends_on_a_later_token(variant):
    model, ids = model_of(variant), tokens()
    with torch.no_grad():
        reference = model(ids).logits
        for t in range(1, T):
            changed = ids.clone()
            changed[:, t:] = (ids[:, t:] + 1 + torch.arange(T - t)) % V
            logits = model(changed).logits
            torch.testing.assert_close(logits[:, :t], reference[:, :t], rtol=0, atol=1e-12)
            assert (logits[:, t] - reference[:, t]).abs().max() > 1e-3


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_the_logits_of_real_tokens_unchanged(variant, side):
    model = model_of(variant)
    ids, mask = tokens(batch=3, seed=5), torch.zeros(3, T, dtype=torch.long)
    for row, n in enumerate((T, 6, 1)):
        mask[row, slice(T - n, T) if side == "left" else slice(0, n)] = 1
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        for row in range(3):
            alone = model(ids[row, mask[row].bool()][None]).logits[0]
            torch.testing.assert_close(padded[row, mask[row].bool()], alone, rtol=0, atol=1e-10)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_with_a_cache_are_those_without_however_the_tokens_are_cut(variant, dtype):
    model, ids = model_of(variant, dtype=dtype, rms_norm_eps=1e-6), tokens(length=90)
    with torch.no_grad():
        whole = model(ids).logits
        # One at a time at the beginning and around a chunk of the linear kernel.
        for cuts in ([1, 2, 3, 70], [40, 41], [89], [*range(1, 6), *range(61, 68)]):
            cache, parts = None, []
            for start, end in itertools.pairwise([0, *cuts, 90]):
                out = model(ids[:, start:end], cache=cache, use_cache=True)
                cache = out.cache
                parts.append(out.logits)
            assert cache.get_seq_length() == 90
            tolerance = 1e-5 * float(whole.abs().max()) if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("variant", "beams"), [*((v, 1) for v in VARIANTS), *((v, 3) for v in ("strict", "delta rule", "everything"))]
)
def test_generation_with_a_cache_is_generation_without_for_padded_prompts_too(variant, beams):
    model, prompt = model_of(variant), tokens(batch=3, length=9)
    mask = torch.ones_like(prompt)
    mask[0, :4], mask[2, :8] = 0, 0
    asked = {"do_sample": False, "max_new_tokens": 8, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(prompt, attention_mask=mask, **asked)
    assert torch.equal(cached, model.generate(prompt, attention_mask=mask, use_cache=False, **asked))
    alone = model.generate(prompt[:1, 4:], **asked)
    assert torch.equal(cached[:1, 9:], alone[:, 5:])


def test_the_state_of_the_linear_kernel_does_not_grow_and_the_others_keep_keys_and_values():
    for variant, grows in (("linear kernel", False), ("strict", True), ("softmax kernel", True)):
        model, sizes = model_of(variant), []
        for length in (10, 40):
            cache = model(tokens(length=length), use_cache=True).cache
            sizes.append(sum(x.numel() for memory in cache.layers for x in memory.values()))
        assert (sizes[1] > sizes[0]) == grows
        assert model(tokens()).cache is None


def test_assisted_generation_is_refused_as_for_every_recurrent_model():
    model, ids = any_model("softmax"), tokens(batch=1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=any_model("none"), max_new_tokens=3, pad_token_id=0)


@every_variant
def test_checkpointed_gradients_are_the_gradients(variant):
    model, ids = model_of(variant), tokens()
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.layers)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-12)


@every_variant
def test_every_parameter_is_trained_and_a_saved_model_is_the_model(variant, tmp_path):
    model, ids = model_of(variant, dtype=torch.float32, rms_norm_eps=1e-6), tokens(batch=3)
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, PredictiveCodingForCausalLM)
    assert {k: v for k, v in vars(loaded.config).items() if k in VARIANTS[variant]} == VARIANTS[variant]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("variant", ["strict", "linear kernel", "softmax kernel", "delta rule"])
def test_a_context_far_beyond_that_of_training_works_and_agrees_with_its_cache(variant):
    model, ids = model_of(variant, dtype=torch.float32, rms_norm_eps=1e-6), tokens(batch=1, length=1500)
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :1400], use_cache=True)
        rest = model(ids[:, 1400:], cache=out.cache).logits
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(rest, whole[:, 1400:], rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_a_weight_of_the_layers_losses_adds_the_mean_of_the_inner_read_outs():
    ids = tokens()
    plain, deep = tiny(), tiny(layer_loss_weight=0.3)
    deep.load_state_dict(plain.state_dict())
    with torch.no_grad():
        out = plain(ids, output_hidden_states=True)
        inner = [
            F.cross_entropy(plain.read_out(z)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            for z in out.predictions[1:-1]
        ]
        expected = plain(ids, labels=ids).loss + 0.3 * torch.stack(inner).mean()
        torch.testing.assert_close(deep(ids, labels=ids).loss, expected)


def train_with_trainer(folder, accumulate):
    torch.manual_seed(0)
    model = any_model("softmax")
    ids = tokens(batch=16, length=T)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate, max_steps=12,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=12,
        gradient_checkpointing=accumulate > 1, seed=0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_trainer_trains_it_and_accumulated_gradients_give_the_same_losses(tmp_path):
    model, losses = train_with_trainer(tmp_path / "whole", 1)
    _, accumulated = train_with_trainer(tmp_path / "parts", 4)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(accumulated, losses, rtol=0, atol=5e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-12").eval()
    with torch.no_grad():
        torch.testing.assert_close(saved(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "backend"),
    [("strict", "aot_eager"), ("delta rule", "inductor"), ("softmax kernel", "inductor"), ("everything", "aot_eager")],
)
def test_a_compiled_model_gives_the_same_logits_and_gradients(variant, backend):
    """Graphs of forward and backward pass of each; of two also the machine code, which takes longest."""
    model, ids = model_of(variant, dtype=torch.float32, rms_norm_eps=1e-6), tokens()
    compiled = torch.compile(model, backend=backend)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    out = compiled(ids, labels=ids)
    out.loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(out.logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kernel": "gauss"}, "kernel"),
        ({"error": "hinge"}, "error"),
        ({"delta_rule": True}, "delta_rule"),
        ({"delta_rule": True, "kernel": "linear", "causal": False}, "delta_rule"),
        ({"initial_decays": [0.5, 1.0]}, "initial_decays"),
        ({"initial_eta": 0.0}, "initial_eta"),
        ({"initial_beta": "big"}, "initial_beta"),
        ({"relaxed": "false"}, "relaxed must be true or false"),
        ({"decay": "no"}, "decay must be true or false"),
        ({"tied_layers": 3}, "tied_layers"),
        ({"layer_loss_weight": -1.0}, "layer_loss_weight"),
    ],
)
def test_a_variant_that_cannot_be_is_refused_with_its_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        PredictiveCodingConfig(**wrong)


@pytest.mark.parametrize("kernel", ["exp", "linear", "softmax"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible_to_the_uniform_variant_too(kernel, side):
    model, ids = tiny(kernel=kernel, causal=False), tokens(batch=1)
    pad = torch.full((1, 5), 3)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.ones_like(padded)
    mask[:, slice(0, 5) if side == "left" else slice(T, None)] = 0
    with torch.no_grad():
        found = model(padded, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(found, model(ids).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["strict", "linear kernel", "softmax kernel", "delta rule"])
def test_half_precision_stays_finite_with_padding_and_near_single_precision(variant):
    model, ids = model_of(variant, dtype=torch.float32, rms_norm_eps=1e-6, initializer_range=0.2), tokens(length=40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.2)):
            half = model_of(variant, dtype=torch.float32, rms_norm_eps=1e-6, initializer_range=0.2)
            half.load_state_dict(model.state_dict())
            logits = half.to(dtype)(ids, attention_mask=mask).logits.float()
            assert torch.isfinite(logits).all()
            real = mask.bool()
            assert (logits - whole)[real].abs().max() < tolerance * whole.abs().max()


def test_the_decay_of_the_softmax_kernel_survives_half_precision_early_in_a_long_context():
    layer = model_of("softmax kernel", dtype=torch.float32, rms_norm_eps=1e-6).layers[0]
    u, error = (x.float() for x in random_inputs(1024))
    with torch.no_grad():
        exact = layer.update(u, error)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer.update(u, error).float()
    early = slice(2, 64)
    assert (half - exact)[:, early].norm() < 0.05 * exact[:, early].norm()


def test_training_with_checkpointed_layers_keeps_no_cache():
    model, ids = tiny(), tokens()
    model.train()
    model.gradient_checkpointing_enable()
    assert model(ids, labels=ids, use_cache=True).cache is None
    with torch.no_grad():
        assert model(ids, use_cache=True).cache is not None


@pytest.mark.parametrize("name", ["position_ids", "past_key_values", "inputs_embeds"])
def test_what_the_model_cannot_honour_is_refused(name):
    with pytest.raises(ValueError, match=name):
        tiny()(tokens(), **{name: tokens()})
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        PredictiveCodingConfig(tie_word_embeddings=False)


def test_the_config_can_ask_for_states_and_the_vocabulary_can_grow():
    model, ids = any_model("softmax"), tokens()
    model.config.output_hidden_states = True
    assert len(model(ids).predictions) == L + 1
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(V + 3, mean_resizing=False)
        assert model.lm_head.weight is model.embed_tokens.weight
        after = model(ids, labels=ids)
    # Errors and their scale belong to the whole table: more entries change what later layers see, not the first read-out.
    assert after.logits.shape[-1] == V + 3
    assert torch.isfinite(after.loss)
    assert before.shape[-1] == V
