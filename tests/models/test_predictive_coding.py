"""The predictive-coding LM against its written-out equations: loops, float64, autograd, transformers' own loss."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.predictive_coding import VARIANTS, D, H, L, T, V, any_model, array, rms, tiny, tokens
from scipy.special import erf
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from lensbench.models.predictive_coding import PredictiveCodingConfig, PredictiveCodingForCausalLM

# The equations of the module's docstring, slowly


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def causal_convolution(weight, rows, t):
    """Depthwise: present, one and two tokens back; zeros before the first token."""
    return sum(weight[lag] * rows[t - lag] for lag in range(3) if t - lag >= 0)


def slow_update(layer, f, eps):
    """sum over i < n of what the docstring says; ``eps[i]`` is the error of the prediction made at i."""
    q, v = array(layer.query_key.weight), array(layer.value_output.weight)
    eta, beta = np.exp(array(layer.log_eta)), np.exp(array(layer.log_beta))
    gamma = 1 / (1 + np.exp(-array(layer.decay_logit)))
    size = D // H
    change = np.zeros((len(f), D))
    for n in range(len(f)):
        for h in range(H):
            rows = slice(h * size, (h + 1) * size)
            c_n = q[rows] @ f[n]
            c_n = c_n / np.linalg.norm(c_n)
            for i in range(n):
                c_i = q[rows] @ f[i]
                c_i = c_i / np.linalg.norm(c_i)
                k = np.exp(beta[h] * (c_i @ c_n - 1))
                change[n] += v[rows].T @ (eta[h] * gamma[h] ** (n - 1 - i) * k * (v[rows] @ eps[i]))
    return change


def slow_logits(model, ids):
    """One sequence through the whole model, position by position."""
    table, gain = array(model.embed_tokens.weight), array(model.norm.weight)
    scale = np.sqrt(np.mean(table**2))
    e = [rms(table[x]) for x in ids]
    up, down = array(model.first_up.weight), array(model.first_down.weight)
    z = np.stack([down @ gelu(up @ row) for row in e])
    conv = array(model.conv_e.weight)
    u = np.stack([causal_convolution(conv, e, t) for t in range(len(ids))])
    for layer in model.layers:
        ru, rz = [rms(row) for row in u], [rms(row) for row in z]
        cu, cz = array(layer.conv_u.weight), array(layer.conv_z.weight)
        seen = [np.concatenate([causal_convolution(cu, ru, t), causal_convolution(cz, rz, t)]) for t in range(len(ids))]
        u = u + np.stack([array(layer.down.weight) @ gelu(array(layer.up.weight) @ row) for row in seen])
        eps = []
        for i in range(len(ids) - 1):
            prediction = table.T @ softmax(table @ (gain * rms(z[i]))) if model.config.error == "softmax" else 0.0
            eps.append((table[ids[i + 1]] - prediction) / scale)
        z = z + slow_update(layer, [rms(row) for row in u], eps)
    return np.stack([table @ (gain * rms(row)) for row in z])


@pytest.mark.parametrize("error", VARIANTS)
def test_the_whole_model_equals_its_equations_written_as_loops(error):
    model, ids = tiny(error), tokens(batch=1)
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    np.testing.assert_allclose(logits, slow_logits(model, ids[0].tolist()), rtol=0, atol=1e-8)


def test_each_update_equals_the_double_sum_over_heads_and_earlier_errors():
    model, ids = tiny(), tokens(batch=1)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    for number, layer in enumerate(model.layers):
        u = out.hidden_states[number + 1][0, :, D : 2 * D].numpy()
        eps = out.errors[number][0, 1:].numpy()
        expected = slow_update(layer, [rms(row) for row in u], eps)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(out.updates[number][0].numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["log_eta", "log_beta", "decay_logit"])
def test_eta_beta_and_decay_of_one_head_change_the_update_as_the_sum_says(name):
    model = tiny()
    layer = model.layers[0]
    g = torch.Generator().manual_seed(3)
    u = torch.randn(1, T, D, generator=g, dtype=torch.float64)
    error = torch.randn(1, T, D, generator=g, dtype=torch.float64)
    error[:, 0] = 0  # token 0 reveals nothing
    f = [rms(row) for row in u[0].numpy()]
    with torch.no_grad():
        before = layer.update(u, error)[0].numpy()
        getattr(layer, name)[1] += 1.3
        after = layer.update(u, error)[0].numpy()
    assert np.abs(after - before).max() > 1e-6
    np.testing.assert_allclose(after, slow_update(layer, f, error[0, 1:].numpy()), rtol=0, atol=1e-10)


def test_the_kernel_is_zero_wherever_the_error_is_not_yet_revealed():
    layer = tiny().layers[0]
    with torch.no_grad():
        kernel = layer.kernel(torch.randn(1, T, D, dtype=torch.float64))[0]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert kernel[:, future].abs().max() == 0
    assert kernel[:, ~future].min() > 0


# The error


def test_error_is_minus_the_gradient_of_the_cross_entropy_of_the_prediction_one_token_earlier():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    table = model.embed_tokens.weight.detach()
    scale = table.square().mean().sqrt()
    for z, error in zip(out.predictions[:-1], out.errors, strict=True):
        assert torch.equal(error[:, 0], torch.zeros_like(error[:, 0]))
        for b in range(len(ids)):
            for s in range(1, T):
                latent = z[b, s - 1] / z[b, s - 1].square().mean().sqrt() * model.norm.weight.detach()
                latent = latent.requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(table @ latent, ids[b, s]), latent)
                torch.testing.assert_close(error[b, s], -gradient / scale, rtol=0, atol=1e-10)


def test_the_error_trains_the_latent_and_the_gain_but_not_the_embedding():
    model = tiny()
    z = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    model.error(z, tokens()).square().sum().backward()
    assert model.embed_tokens.weight.grad is None
    assert z.grad.abs().max() > 0
    assert model.norm.weight.grad.abs().max() > 0


def test_the_control_without_error_differs_by_the_subtracted_prediction_alone():
    ids = tokens()
    model, control = tiny("softmax"), tiny("none")
    assert model.state_dict().keys() == control.state_dict().keys()
    control.load_state_dict(model.state_dict())
    with torch.no_grad():
        a, b = model(ids, output_hidden_states=True), control(ids, output_hidden_states=True)
        assert torch.equal(a.hidden_states[0], b.hidden_states[0])
        table = model.embed_tokens.weight
        scale = table.square().mean().sqrt()
        p = (table @ (a.predictions[0] * a.predictions[0].square().mean(-1, keepdim=True).rsqrt()
                      * model.norm.weight).transpose(1, 2)).softmax(1)  # fmt: skip
        mean_embedding = torch.einsum("bvt,vd->btd", p, table)
        torch.testing.assert_close(
            b.errors[0][:, 1:] - a.errors[0][:, 1:], mean_embedding[:, :-1] / scale, rtol=0, atol=1e-10
        )
        for error in b.errors:
            torch.testing.assert_close(error[:, 1:], table[ids[:, 1:]] / scale, rtol=0, atol=1e-10)
            assert error[:, 0].abs().max() == 0


# The strict form: z, and the places


@pytest.mark.parametrize("error", VARIANTS)
def test_z_moves_by_nothing_but_the_updates(error):
    model, ids = tiny(error), tokens()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        for before, after, update in zip(out.predictions[:-1], out.predictions[1:], out.updates, strict=True):
            torch.testing.assert_close(after, before + update, rtol=0, atol=1e-14)
            assert update[:, 1:].abs().amax(-1).min() > 0
            assert update[:, 0].abs().max() == 0, "no error is known at the first token"
        for layer in model.layers:
            layer.value_output.weight.zero_()
        still = model(ids, output_hidden_states=True)
    for z in still.predictions:
        assert torch.equal(z, still.predictions[0])


def test_the_first_prediction_depends_on_its_own_token_alone():
    model, ids = tiny(), tokens()
    shuffled = ids.clone()
    shuffled[:, :5] = ids[:, :5].flip(1)
    shuffled[:, 6:] = ids[:, 6:].flip(1)
    with torch.no_grad():
        a = model(ids, output_hidden_states=True).predictions[0]
        b = model(shuffled, output_hidden_states=True).predictions[0]
    torch.testing.assert_close(a[:, 5], b[:, 5], rtol=0, atol=1e-14)


def test_the_state_is_z_u_e_at_every_layer_and_has_the_stated_shapes():
    model, ids = tiny(), tokens(batch=3)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, T, 3 * D)] * (L + 1)
    assert [tuple(h.shape) for h in out.predictions] == [(3, T, D)] * (L + 1)
    assert [tuple(h.shape) for h in out.errors] == [(3, T, D)] * L
    assert [tuple(h.shape) for h in out.updates] == [(3, T, D)] * L
    embedded = model.embed_tokens.weight.detach()[ids]
    e = embedded / embedded.square().mean(-1, keepdim=True).sqrt()
    for state, z in zip(out.hidden_states, out.predictions, strict=True):
        assert torch.equal(state[..., :D], z)
        torch.testing.assert_close(state[..., 2 * D :], e, rtol=0, atol=1e-10)
    us = [h[..., D : 2 * D] for h in out.hidden_states]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(us))


def test_without_the_request_no_states_are_returned():
    out = tiny()(tokens())
    assert out.hidden_states is None
    assert out.predictions is None
    assert out.errors is None
    assert out.updates is None


def test_norm_and_head_are_blind_outside_z():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        state = out.hidden_states[-1].clone()
        state[..., D:] = 1e3 * torch.randn_like(state[..., D:])
        assert torch.equal(model.lm_head(model.norm(state)), out.logits)
        z = out.predictions[-1]
        expected = z / z.square().mean(-1, keepdim=True).sqrt() * model.norm.weight @ model.embed_tokens.weight.T
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-9)


# Causality and padding


@pytest.mark.parametrize("name", [*VARIANTS, "gpt", "gpt2"])
def test_no_logit_depends_on_a_later_token(name):
    model, ids = any_model(name), tokens(batch=2)
    with torch.no_grad():
        reference = model(ids, output_hidden_states=True)
        for t in range(1, T):
            changed = ids.clone()
            changed[:, t:] = (ids[:, t:] + 1 + torch.arange(T - t)) % V
            out = model(changed, output_hidden_states=True)
            torch.testing.assert_close(out.logits[:, :t], reference.logits[:, :t], rtol=0, atol=1e-5)
            for a, b in zip(out.hidden_states, reference.hidden_states, strict=True):
                torch.testing.assert_close(a[:, :t], b[:, :t], rtol=0, atol=1e-5)
            assert (out.logits[:, t] - reference.logits[:, t]).abs().max() > 1e-3
            torch.testing.assert_close(model(ids[:, :t]).logits, reference.logits[:, :t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_the_logits_of_real_tokens_unchanged(error, side):
    model = tiny(error)
    lengths = [T, 6, 1, 9]
    ids, mask = tokens(batch=4, seed=5), torch.zeros(4, T, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, T - n :] = 1 if side == "left" else 0
        mask[row, :n] = 1 if side == "right" else mask[row, :n]
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        other = torch.where(mask.bool(), ids, (ids + 7) % V)
        assert torch.equal(model(other, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
        for row in range(4):
            real = mask[row].bool()
            alone = model(ids[row, real][None]).logits[0]
            torch.testing.assert_close(padded[row, real], alone, rtol=0, atol=1e-10)


def test_a_mask_of_ones_changes_nothing():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


# Loss and gradients


@pytest.mark.parametrize("ignored", [False, True])
def test_labels_give_the_shifted_cross_entropy_of_transformers(ignored):
    model, ids = tiny(), tokens(batch=3)
    labels = ids.clone()
    if ignored:
        labels[0, :4] = -100
        labels[2] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    expected = ForCausalLMLoss(out.logits, labels, V)
    torch.testing.assert_close(out.loss, expected)
    total, count = 0.0, 0
    for b in range(3):
        for t in range(T - 1):
            if labels[b, t + 1] != -100:
                total -= out.logits[b, t].double().log_softmax(-1)[labels[b, t + 1]].item()
                count += 1
    assert out.loss.item() == pytest.approx(total / count, rel=1e-6)
    assert model(ids).loss is None


@pytest.mark.parametrize("error", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_every_parameter_gets_a_finite_gradient_from_the_loss(error, padded):
    model, ids = tiny(error, dtype=torch.float32, initializer_range=0.02, rms_norm_eps=1e-6), tokens(batch=3)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4], mask[1, 7:] = 0, 0
    model(ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_agree_with_finite_differences_in_eta_beta_and_decay():
    model, ids = tiny(), tokens()
    model(ids, labels=ids).loss.backward()
    for name in ("log_eta", "log_beta", "decay_logit"):
        parameter = getattr(model.layers[1], name)
        with torch.no_grad():
            losses = []
            for step in (1e-4, -2e-4):
                parameter[2] += step
                # The loss is formed in float32; do it in float64 to see small differences.
                logits = model(ids).logits
                losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
            parameter[2] += 1e-4
        assert parameter.grad[2].item() == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-6)


# The transformers side


@pytest.mark.parametrize("error", VARIANTS)
def test_a_saved_model_loads_through_the_auto_classes_with_identical_weights_and_logits(error, tmp_path):
    model, ids = tiny(error, dtype=torch.float32, initial_eta=0.3, initial_beta=2.0), tokens()
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.bin"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PredictiveCodingConfig)
    assert (config.error, config.initial_eta, config.initial_beta) == (error, 0.3, 2.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, PredictiveCodingForCausalLM)
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_embedding_and_head_are_one_tensor_before_and_after_loading_and_in_the_file(tmp_path):
    from safetensors import safe_open

    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.lm_head.weight is m.embed_tokens.weight
        assert m.get_output_embeddings().weight.data_ptr() == m.get_input_embeddings().weight.data_ptr()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tables = [k for k in file.keys() if tuple(file.get_slice(k).get_shape()) == (V, D)]  # noqa: SIM118
    assert len(tables) == 1


def test_a_config_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        PredictiveCodingConfig(hidden_size=16, num_attention_heads=3)
    with pytest.raises(ValueError, match="error"):
        PredictiveCodingConfig(error="cheap")


@pytest.mark.parametrize("error", VARIANTS)
def test_greedy_generation_agrees_with_the_argmax_of_full_forwards(error):
    model, prompt = tiny(error), tokens(batch=2, length=4)
    model.generation_config.eos_token_id = None
    made = model.generate(prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
    assert made.shape == (2, 10)
    ids = prompt
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, ids)


def test_left_padded_generation_equals_generation_without_padding():
    model = tiny()
    model.generation_config.eos_token_id = None
    long, short = tokens(batch=1, length=6), tokens(batch=1, length=3, seed=9)
    batch = torch.cat([long, F.pad(short, (3, 0))])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    made = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0)
    for row, prompt in ((0, long), (1, short)):
        alone = model.generate(prompt, do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert torch.equal(made[row, -5:], alone[0, -5:])


def test_return_dict_false_gives_a_tuple_of_loss_and_logits():
    model, ids = tiny(), tokens()
    with torch.no_grad():
        loss, logits = model(ids, labels=ids, return_dict=False)
        named = model(ids, labels=ids)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
