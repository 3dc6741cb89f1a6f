"""Reading a residual stream: every architecture's own logits, states, gains; captures and rotations by slow references."""

import copy
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lensbench.data.tokens import TokenizedDocument
from lensbench.data.windows import Windows, sample_windows
from lensbench.errors import LensbenchError
from lensbench.models import build
from lensbench.models.predictive_coding import PredictionNorm
from lensbench.runtime.mapped import mapped
from lensbench.streams.capture import Capture, capture, room_for
from lensbench.streams.parts import find_readout
from lensbench.streams.readout import ReadOut
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream

V, D, L = 60, 16, 3
SIZES = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1}


def part(model, path):
    return model.get_submodule(path)


# name -> (model, path of its final norm, path of its blocks), each checked by eye in transformers
ARCHITECTURES = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), "model.norm", "model.layers"),
    "mistral": (
        lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=4)),
        "model.norm",
        "model.layers",
    ),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)), "model.norm", "model.layers"),
    "gemma": (
        lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=8)),
        "model.norm",
        "model.layers",
    ),
    "phi": (
        lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES)), "model.final_layernorm", "model.layers",
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=2, n_positions=64)
        ),
        "transformer.ln_f",
        "transformer.h",
    ),
    "gpt_neox": (
        lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
        "gpt_neox.final_layer_norm",
        "gpt_neox.layers",
    ),
    "opt": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=2, ffn_dim=24,
                max_position_embeddings=64, word_embed_proj_dim=D,
            )
        ),
        "model.decoder.final_layer_norm",
        "model.decoder.layers",
    ),
    "pc": (
        lambda: build("predictive-coding", parameters=12_000, vocab_size=V, d_model=D, layers=L, heads=2, context=64),
        "norm",
        None,
    ),
}  # fmt: skip


def random_model(name, seed=0):
    """No parameter left at zero or one: gains, biases and logits that matter."""
    torch.manual_seed(seed)
    return randomised(ARCHITECTURES[name][0]())


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.numel() > 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def ids_of(batch=2, length=9, seed=4):
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))


# Every architecture


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_last_state_reads_out_to_the_logits_of_the_model(name):
    model, ids = random_model(name), ids_of()
    stream = ResidualStream(model)
    with torch.no_grad():
        states, logits = stream.forward(ids)
        own = model(ids).logits
        torch.testing.assert_close(logits, own, rtol=0, atol=1e-6)
        torch.testing.assert_close(stream.readout(states[-1]), own, rtol=1e-5, atol=1e-5)
        assert (stream.readout(states[0]) - own).abs().max() > 0.1
    assert own.std() > 0.3, "logits too small to tell anything"
    width = 3 * D if name == "pc" else D
    assert states.shape == (L + 1, 2, 9, width)
    assert (stream.layers, stream.d_model, stream.vocab_size) == (L, width, V)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_readout_is_the_models_own_norm_and_head_uncopied(name):
    model = random_model(name)
    readout = find_readout(model)
    assert readout.final_norm is part(model, ARCHITECTURES[name][1])
    assert readout.unembedding is model.get_output_embeddings()
    assert readout.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert (readout.bias is not None) == (name == "phi")


@pytest.mark.parametrize("name", [name for name, (_, _, blocks) in ARCHITECTURES.items() if blocks])
def test_the_states_are_what_each_block_takes_and_hands_on(name):
    model, ids = random_model(name), ids_of()
    stream, taken, handed = ResidualStream(model), [], []

    def watch(_, args, kwargs, output):
        taken.append(args[0] if args else kwargs["hidden_states"])
        handed.append(output[0] if isinstance(output, tuple) else output)

    for block in part(model, ARCHITECTURES[name][2]):
        block.register_forward_hook(watch, with_kwargs=True)
    states, _ = stream.forward(ids)
    assert len(taken) == L
    for layer in range(L):
        assert torch.equal(states[layer], taken[layer])
        assert torch.equal(states[layer + 1], handed[layer])


def test_the_states_of_llama_are_the_embedding_plus_the_outputs_of_attention_and_mlp_run_by_hand():
    model, ids = random_model("llama"), ids_of()
    states, logits = ResidualStream(model).forward(ids)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    h = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(h, torch.arange(9)[None])
    for layer, block in enumerate(model.model.layers):
        torch.testing.assert_close(states[layer], h, rtol=0, atol=1e-5)
        h = h + block.self_attn(block.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)[0]
        h = h + block.mlp(block.post_attention_layernorm(h))
    torch.testing.assert_close(states[L], h, rtol=0, atol=1e-5)
    scaled = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.model.norm.weight
    torch.testing.assert_close(logits, scaled @ model.lm_head.weight.T, rtol=0, atol=1e-4)


def test_both_views_of_predictive_coding_read_out_the_same_logits():
    model, ids = random_model("pc"), ids_of()
    whole, z = ResidualStream(model, "state"), ResidualStream(model, "prediction")
    (states, logits), (predictions, same) = whole.forward(ids), z.forward(ids)
    assert (whole.d_model, z.d_model) == (3 * D, D)
    assert torch.equal(logits, same)
    assert torch.equal(predictions, states[..., :D])
    for layer in range(L + 1):
        assert torch.equal(z.readout(predictions[layer]), whole.readout(states[layer]))
    own = model(ids, output_hidden_states=True).predictions
    assert torch.equal(predictions, torch.stack(own))


def test_a_gpt_has_but_one_view():
    model, ids = random_model("llama"), ids_of()
    state, prediction = (ResidualStream(model, view).forward(ids)[0] for view in ("state", "prediction"))
    assert torch.equal(state, prediction)


# What stands behind the head


def gemma2(cap):
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=cap))


# name -> (model, scale and soft cap of its logits)
BEHIND = {
    "llama": (ARCHITECTURES["llama"][0], 1.0, None),
    "gemma2 capped at 2": (lambda: gemma2(2.0), 1.0, 2.0),
    "gemma2 capped at 30": (lambda: gemma2(30.0), 1.0, 30.0),
    "gemma2 without a cap": (lambda: gemma2(None), 1.0, None),
    "cohere": (
        lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GROUPED, logit_scale=0.0625)), 0.0625, None,
    ),
    "cohere with larger logits": (
        lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**GROUPED, logit_scale=3.0)), 3.0, None,
    ),
    "granite": (
        lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**GROUPED, logits_scaling=8.0)), 1 / 8, None,
    ),
}  # fmt: skip


def bent_model(name, seed=0):
    torch.manual_seed(seed)
    return randomised(BEHIND[name][0]())


@pytest.mark.parametrize("name", list(BEHIND))
def test_scaled_and_soft_capped_logits_are_read_right(name):
    model, ids = bent_model(name), ids_of()
    stream = ResidualStream(model)
    _, scale, cap = BEHIND[name]
    assert stream.readout.softcap == cap
    assert stream.readout.linear == (cap is None)
    assert stream.readout.scale == pytest.approx(scale, rel=1e-6)
    if name == "llama":
        assert stream.readout.scale == 1
    states, logits = stream.forward(ids)
    with torch.no_grad():
        own = model(ids).logits
        again = stream.readout(states[-1])
    assert torch.equal(logits, own)
    assert (again - own).abs().max() <= 1e-5 * own.abs().max()
    # What stands there shows: norm and head alone give something else.
    alone = model.lm_head(stream.readout.final_norm(states[-1]))
    if cap is None:
        torch.testing.assert_close(own, scale * alone, rtol=1e-5, atol=1e-6)
    else:
        assert own.abs().max() < cap
        torch.testing.assert_close(own, cap * (alone / cap).tanh(), rtol=1e-5, atol=1e-5)
        assert cap > 10 or (alone - own).abs().max() > 0.5


@pytest.mark.parametrize("name", ["gemma2 capped at 2", "cohere", "granite"])
def test_the_pieces_of_a_read_out_agree_with_the_whole(name):
    stream = ResidualStream(bent_model(name))
    readout, states = stream.readout, stream.forward(ids_of())[0]
    n = readout.final_norm(states[1])
    whole = readout(states[1])
    torch.testing.assert_close(readout.logits(n), whole)
    linear = nn.functional.linear(n, readout.weight, readout.bias)
    torch.testing.assert_close(readout.cap_(linear.clone()), whole)
    # Never copied into the model: its own head is as it was.
    torch.testing.assert_close(readout.weight, readout.unembedding.weight * readout.scale)
    assert readout.unembedding.weight.data_ptr() == stream.model.lm_head.weight.data_ptr()


def test_a_scale_is_folded_into_the_bias_of_the_head_too():
    torch.manual_seed(0)
    head = nn.Linear(D, V)
    readout, h = ReadOut(nn.RMSNorm(D), head, scale=0.25), torch.randn(7, D)
    torch.testing.assert_close(readout(h), head(readout.final_norm(h)) / 4)
    torch.testing.assert_close(readout.bias, head.bias / 4)
    readout.double()
    assert readout.weight.dtype == readout.bias.dtype == torch.float64
    torch.testing.assert_close(readout(h.double()), head(readout.final_norm(h.double())) / 4)


def test_logits_bent_in_a_way_that_is_not_known_are_refused():
    class Bent(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.1 * output.logits**2
            return output

    torch.manual_seed(0)
    with pytest.raises(LensbenchError, match="Bent does not give its own logits"):
        ResidualStream(randomised(Bent(transformers.LlamaConfig(**SIZES))))


# Chosen positions alone


CHOSEN = [(0, 0), (0, 8), (1, 3), (1, 4), (2, 8), (0, 2)]


@pytest.mark.parametrize(
    ("name", "view"),
    [("llama", "state"), ("gpt2", "state"), ("gemma2 capped at 2", "state"), ("cohere", "state"), ("pc", "state"),
     ("llama", "prediction"), ("pc", "prediction")],
)  # fmt: skip
def test_chosen_positions_have_the_states_and_logits_of_the_whole_pass(name, view):
    model = (bent_model if name not in ARCHITECTURES else random_model)(name)
    stream, ids = ResidualStream(model, view), ids_of(batch=3)
    rows, columns = torch.tensor(CHOSEN).T
    states, logits = stream.forward(ids)
    some, of_them = stream.at(ids, rows, columns)
    assert some.shape == (L + 1, len(CHOSEN), stream.d_model)
    assert of_them.shape == (len(CHOSEN), V)
    for n, (row, column) in enumerate(CHOSEN):
        assert torch.equal(some[:, n], states[:, row, column])
        torch.testing.assert_close(of_them[n], logits[row, column], rtol=1e-5, atol=1e-5)
    # Nothing stays hooked: the next whole pass is whole.
    again, whole = stream.forward(ids)
    assert torch.equal(again, states)
    assert torch.equal(whole, logits)


def test_one_position_and_the_same_one_twice():
    stream, ids = ResidualStream(random_model("llama")), ids_of()
    states, logits = stream.forward(ids)
    for at in ([(1, 5)], [(1, 5), (1, 5)]):
        rows, columns = torch.tensor(at).T
        some, of_them = stream.at(ids, rows, columns)
        for n in range(len(at)):
            assert torch.equal(some[:, n], states[:, 1, 5])
            torch.testing.assert_close(of_them[n], logits[1, 5], rtol=1e-5, atol=1e-5)


def test_a_pass_that_fails_leaves_nothing_hooked():
    stream, ids = ResidualStream(random_model("llama")), ids_of()
    logits = stream.forward(ids)[1]
    with pytest.raises(IndexError):
        stream.at(ids, torch.tensor([0]), torch.tensor([99]))
    assert torch.equal(stream.forward(ids)[1], logits)


# What is refused


def test_a_head_with_a_layer_of_its_own_is_refused_rather_than_taken_for_the_stream():
    torch.manual_seed(0)
    model = randomised(transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, is_decoder=True)))
    try:
        states, _ = ResidualStream(model).forward(ids_of())
    except LensbenchError:
        return
    with torch.no_grad():
        last = model(ids_of(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states[-1], last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(bad):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = bad
    with pytest.raises(LensbenchError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        ResidualStream(model)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=V, d_model=D, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(LensbenchError, match="T5ForConditionalGeneration"):
        ResidualStream(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(LensbenchError, match="LlamaModel"):
        ResidualStream(transformers.LlamaModel(transformers.LlamaConfig(**SIZES)))


def test_an_unknown_view_is_refused():
    with pytest.raises(LensbenchError, match="'state' and 'prediction'"):
        ResidualStream(random_model("llama"), "all")


# The gain


def gemma_norm(d):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return GemmaRMSNorm(d)


NORMS = {
    "rms": (lambda: nn.RMSNorm(D, eps=1e-6), lambda n: n.weight.diag()),
    "gemma": (lambda: gemma_norm(D), lambda n: (1 + n.weight).diag()),
    "layer": (lambda: nn.LayerNorm(D), lambda n: n.weight.diag() @ (torch.eye(D) - 1 / D)),
    "layer without gain": (lambda: nn.LayerNorm(D, elementwise_affine=False), lambda n: torch.eye(D) - 1 / D),
    "prediction": (lambda: PredictionNorm(D, 1e-6), lambda n: torch.cat([n.weight.diag(), torch.zeros(D, 2 * D)], 1)),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_the_gain_is_the_matrix_behind_the_norm_up_to_one_constant(name):
    torch.manual_seed(0)
    make, analytic = NORMS[name]
    norm = make()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        expected = analytic(norm)
        d = expected.shape[1]
        gain = ReadOut(norm, nn.Linear(D, V, bias=False)).gain(d)
        assert gain.shape == (D, d)
        constant = (gain * expected).sum() / expected.square().sum()
        assert constant > 0
        torch.testing.assert_close(gain, constant * expected, rtol=0, atol=1e-4 * gain.abs().max().item())
        if name == "prediction":
            assert gain[:, D:].abs().max() == 0
        # The docstring's equation: what is left after dividing is one positive number per state.
        x = torch.randn(50, d)
        left, right = norm(x) - norm(torch.zeros(d)), x @ gain.T
        scale = (right * left).sum(-1) / left.square().sum(-1)
        assert (scale > 0).all()
        torch.testing.assert_close(right / scale[:, None], left, rtol=0, atol=1e-3)


def test_a_norm_that_is_no_scaled_matrix_has_no_gain():
    readout = ReadOut(nn.Sequential(nn.RMSNorm(D), nn.Tanh()), nn.Linear(D, V))
    assert readout.gain(D) is None


# Captures


def windows_by_hand(seed=0):
    """Three windows of two documents: one full, one short, one with a single scored position."""
    rng = np.random.default_rng(seed)
    ids, lengths = np.zeros((3, 12), dtype=np.int64), np.array([12, 7, 3])
    for row, n in enumerate(lengths):
        ids[row, :n] = rng.integers(1, V, n)
    positions = np.array([[1, 4, 8, 10], [1, 3, 5, 5], [1, 1, 1, 1]])
    valid = np.array([[True] * 4, [True, True, True, False], [True, False, False, False]])
    size = np.where(valid, rng.integers(1, 9, valid.shape), 0).astype(np.int32)
    return Windows(
        ids, lengths, positions, valid, np.array([1, 0, 1]), ("a", "b"), np.array([0, 0, 2]), size,
    )  # fmt: skip


SCORED = [(0, 1), (0, 4), (0, 8), (0, 10), (1, 1), (1, 3), (1, 5), (2, 1)]


def slow_tokens(model, windows):
    """For each scored position its states and distribution from the unpadded window alone, in float64."""
    double = copy.deepcopy(model).double()
    norm = next(m for n, m in double.named_modules() if n in ("norm", "model.final_layernorm", "model.norm"))
    rows = []
    for row, at in SCORED:
        ids = torch.from_numpy(windows.ids[row, : windows.lengths[row]])[None]
        seen = []
        hook = norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            out = double(ids, output_hidden_states=True)
        hook.remove()
        states = torch.stack([*out.hidden_states[:-1], seen[-1]])[:, 0, at].numpy()
        logits = out.logits[0, at].numpy()
        log_p = logits - logits.max()
        log_p = log_p - np.log(np.exp(log_p).sum())
        rows.append((states, np.exp(log_p), log_p, int(ids[0, at + 1])))
    head = double.get_output_embeddings()
    weight = head.weight.detach().numpy()
    bias = np.zeros(V) if head.bias is None else head.bias.detach().numpy()
    return rows, weight, bias


@pytest.mark.parametrize("name", ["pc", "phi", "llama"])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_every_field_of_a_capture_equals_a_float64_computation_token_by_token(name, batch):
    model, windows = random_model(name), windows_by_hand()
    rows, weight, bias = slow_tokens(model, windows)
    constant = np.random.default_rng(1).dirichlet(np.ones(V))
    reports = []
    got = capture(
        ResidualStream(model), windows, constant=torch.from_numpy(constant), batch=batch,
        report=lambda *done: reports.append(done),
    )  # fmt: skip
    assert len(got) == len(SCORED)
    assert got.layers == L
    near = {"rtol": 2e-5, "atol": 2e-5}
    for n, (states, p, log_p, target) in enumerate(rows):
        np.testing.assert_allclose(got.states[:, n].numpy(), states, rtol=1e-4, atol=1e-4)
        expected = sum(p[v] * weight[v] for v in range(V))
        np.testing.assert_allclose(got.expected[n].numpy(), expected, **near)
        entropy_term = sum(p[v] * log_p[v] - p[v] * bias[v] for v in range(V))
        np.testing.assert_allclose(got.entropy_term[n].item(), entropy_term, **near)
        assert got.targets[n].item() == target
        np.testing.assert_allclose(got.model_ce[n].item(), -log_p[target], **near)
        kl = sum(p[v] * (log_p[v] - np.log(constant[v])) for v in range(V))
        np.testing.assert_allclose(got.constant_kl[n].item(), kl, **near)
    np.testing.assert_allclose(got.mean_p.numpy(), np.mean([p for _, p, _, _ in rows], axis=0), rtol=1e-4, atol=1e-6)
    assert got.window.tolist() == [row for row, _ in SCORED]
    assert got.document.tolist() == [1, 1, 1, 1, 0, 0, 0, 1]
    assert got.target_bytes.tolist() == windows.next_bytes[windows.valid].tolist()
    assert got.target_bytes.min() > 0
    assert reports[-1] == (3, 3)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})


@pytest.mark.parametrize("name", ["gemma2 capped at 2", "cohere", "granite"])
def test_the_terms_of_a_capture_of_bent_logits_are_those_of_the_definition(name):
    model, windows = bent_model(name), windows_by_hand()
    # Soft-capped logits are not linear in the normed state, but sum p log p has no need for that.
    rows, weight, _ = slow_tokens(model, windows)
    stream = ResidualStream(model)
    got = capture(stream, windows)
    near = {"rtol": 2e-5, "atol": 2e-5}
    for n, (states, p, log_p, target) in enumerate(rows):
        np.testing.assert_allclose(got.entropy_term[n].item(), sum(p[v] * log_p[v] for v in range(V)), **near)
        np.testing.assert_allclose(got.model_ce[n].item(), -log_p[target], **near)
        np.testing.assert_allclose(got.states[:, n].numpy(), states, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got.expected[n].numpy(), stream.readout.scale * p @ weight, **near)
    np.testing.assert_allclose(got.mean_p.numpy(), np.mean([p for _, p, _, _ in rows], axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pc", "phi"])
def test_the_kept_terms_give_the_divergence_of_any_normed_state(name):
    model, windows = random_model(name), windows_by_hand()
    rows, weight, bias = slow_tokens(model, windows)
    got = capture(ResidualStream(model), windows)
    for n, (_, p, log_p, _) in enumerate(rows):
        x = np.random.default_rng(n).normal(size=D)
        logits = weight @ x + bias
        log_q = logits - np.log(np.exp(logits).sum())
        kept = got.entropy_term[n].item() - got.expected[n].double().numpy() @ x + np.log(np.exp(logits).sum())
        assert kept == pytest.approx(np.sum(p * (log_p - log_q)), rel=1e-4, abs=1e-4)


def test_without_a_constant_the_mean_divergence_is_that_from_the_tokens_own_mean():
    model, windows = random_model("phi"), windows_by_hand()
    rows, _, _ = slow_tokens(model, windows)
    got = capture(ResidualStream(model), windows)
    mean = np.mean([p for _, p, _, _ in rows], axis=0)
    expected = np.mean([np.sum(p * (log_p - np.log(mean))) for _, p, log_p, _ in rows])
    assert got.constant_kl.double().mean().item() == pytest.approx(expected, rel=1e-4)
    # A constant given is the same thing, token by token.
    again = capture(ResidualStream(model), windows, constant=got.mean_p)
    assert again.constant_kl.double().mean().item() == pytest.approx(expected, rel=1e-4)
    assert again.constant_kl.min() >= -1e-5


def test_a_token_that_the_model_never_predicts_leaves_the_constant_divergence_finite():
    model, windows = random_model("phi"), windows_by_hand()
    with torch.no_grad():
        model.lm_head.bias[7] = -1e4
    stream = ResidualStream(model)
    first = capture(stream, windows)
    assert first.mean_p[7] == 0
    again = capture(stream, windows, constant=first.mean_p)
    for got in (first, again):
        assert torch.isfinite(got.constant_kl).all()
        assert torch.isfinite(got.entropy_term).all()
    assert again.constant_kl.mean().item() == pytest.approx(first.constant_kl.mean().item(), rel=1e-4)


def test_take_keeps_the_chosen_tokens_of_every_field():
    got = capture(ResidualStream(random_model("pc")), windows_by_hand())
    for chosen in (torch.tensor([6, 1, 2]), torch.tensor([0, 1, 1, 0, 0, 0, 1, 0]).bool()):
        some, at = got.take(chosen), chosen if chosen.dtype != torch.bool else chosen.nonzero()[:, 0]
        assert len(some) == 3
        for new, n in enumerate(at.tolist()):
            assert torch.equal(some.states[:, new], got.states[:, n])
            for field in ("expected", "entropy_term", "targets", "model_ce", "constant_kl"):
                assert torch.equal(getattr(some, field)[new], getattr(got, field)[n])
            for field in ("window", "document", "target_bytes"):
                assert getattr(some, field)[new] == getattr(got, field)[n]
        assert torch.equal(some.mean_p, got.mean_p)


# Rotated views


def layered_states(layers=4, n=400, d=12, seed=0):
    """States with means, a spectrum that falls, and different axes at each layer."""
    rng = np.random.default_rng(seed)
    states = []
    for _ in range(layers):
        axes = np.linalg.qr(rng.normal(size=(d, d)) + 2 * np.eye(d))[0]
        states.append(rng.normal(size=(n, d)) * 0.5 ** np.arange(d) @ axes + 3 * rng.normal(size=d))
    return np.stack(states)


def covariances_of(states):
    return torch.from_numpy(np.stack([np.cov(x.T, bias=True) for x in states]))


def pooled_axes(states):
    """Principal axes and variances of all layers' centred states together, by SVD."""
    centred = np.concatenate([x - x.mean(0) for x in states])
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    return values**2, axes


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 0.9999])
def test_the_rank_is_the_least_that_holds_the_stated_share_of_the_pooled_variance(variance):
    states = layered_states()
    power, _ = pooled_axes(states)
    view = RotatedView.random(covariances_of(states), seed=0, variance=variance)
    assert power[: view.rank].sum() >= variance * power.sum()
    assert power[: view.rank - 1].sum() < variance * power.sum()


def test_the_whole_variance_takes_the_whole_space_and_one_direction_takes_one():
    eye = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    assert RotatedView.random(eye, seed=0, variance=1.0).rank == 6
    line = torch.zeros(3, 6, 6, dtype=torch.float64)
    line[:, 2, 2] = 5.0
    view = RotatedView.random(line, seed=0)
    assert view.rank == 1
    assert view.maps.abs().sub(torch.eye(6, dtype=torch.float64)).abs().max() < 1e-12


def test_the_maps_are_orthogonal_and_the_identity_outside_the_principal_subspace():
    states = layered_states()
    view = RotatedView.random(covariances_of(states), seed=1)
    _, axes = pooled_axes(states)
    inside, outside = axes[: view.rank], axes[view.rank :]
    assert 1 < view.rank < 12
    assert view.maps.shape == (4, 12, 12)
    assert view.maps.dtype == torch.float64
    for m in view.maps.numpy():
        np.testing.assert_allclose(m @ m.T, np.eye(12), rtol=0, atol=1e-10)
        np.testing.assert_allclose(m @ outside.T, outside.T, rtol=0, atol=1e-9)
        # The subspace is mapped to itself, and really turned.
        np.testing.assert_allclose(outside @ m @ inside.T, 0, rtol=0, atol=1e-9)
        assert np.linalg.norm(inside @ m @ inside.T - np.eye(view.rank)) > 0.5
    for a in range(4):
        for b in range(a):
            assert (view.maps[a] - view.maps[b]).norm() > 0.5


def test_the_rotations_are_spread_evenly():
    maps = torch.cat([RotatedView.random(torch.eye(3).double().expand(50, 3, 3), seed=s).maps for s in range(20)])
    # Haar: entries of mean 0 and variance 1/3, uncorrelated with each other.
    entries = maps.flatten(1)
    assert entries.mean(0).abs().max() < 4 * (1 / 3 / 1000) ** 0.5
    covariance = entries.T @ entries / len(entries)
    assert (covariance - torch.eye(9) / 3).abs().max() < 0.06


def test_a_view_depends_on_its_seed_alone():
    covariances = covariances_of(layered_states())
    torch.manual_seed(0)
    a = RotatedView.random(covariances, seed=3)
    torch.manual_seed(1)
    b, c = RotatedView.random(covariances, seed=3), RotatedView.random(covariances, seed=4)
    assert torch.equal(a.maps, b.maps)
    assert a.rank == b.rank == c.rank
    assert (a.maps - c.maps).norm(dim=(1, 2)).min() > 0.1


def test_a_view_rotates_the_states_below_the_last_layer_and_nothing_else():
    got = capture(ResidualStream(random_model("llama")), windows_by_hand())
    covariances = covariances_of(got.states[:-1].double().numpy())
    view = RotatedView.random(covariances, seed=0)
    before = got.states.clone()
    seen = view.apply(got)
    assert torch.equal(got.states, before), "the capture itself must stay as it is"
    assert torch.equal(seen.states[-1], got.states[-1])
    for layer in range(L):
        for n in range(len(got)):
            expected = view.maps[layer].numpy() @ got.states[layer, n].double().numpy()
            np.testing.assert_allclose(seen.states[layer, n].numpy(), expected, rtol=1e-4, atol=1e-5)
    for field in Capture.__dataclass_fields__:
        if field != "states":
            assert getattr(seen, field) is getattr(got, field)


def test_states_beyond_the_memory_setting_lie_in_a_file_and_are_the_same(tmp_path, monkeypatch):
    """The file has no name left by the time it is used, so nothing has to be cleared up after a crash."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    torch.manual_seed(0)
    stream = ResidualStream(randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))))
    documents = [TokenizedDocument("a", np.arange(200, dtype=np.int32) % V, np.ones(200, np.int32))]
    windows = sample_windows(documents, n_sequences=4, length=40, positions=8, seed=0)
    opened = []
    monkeypatch.setattr(
        sys.modules["lensbench.streams.capture"], "mapped", lambda *how: opened.append(how) or mapped(*how)
    )
    in_memory, in_file = capture(stream, windows), capture(stream, windows, memory_gib=1e-6)
    ((_, shape, dtype),) = opened
    assert (shape, dtype) == (in_memory.states.shape, np.float32)
    torch.testing.assert_close(in_file.states, in_memory.states, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


def test_some_tokens_of_a_capture_lie_in_a_file_beyond_the_memory_setting_and_are_the_same():
    stream = ResidualStream(randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))))
    documents = [TokenizedDocument("a", np.arange(200, dtype=np.int32) % V, np.ones(200, np.int32))]
    whole = capture(stream, sample_windows(documents, n_sequences=4, length=40, positions=8, seed=0))
    some = torch.arange(len(whole)) % 3 > 0
    in_memory, in_file = whole.take(some), whole.take(some, memory_gib=1e-9)
    torch.testing.assert_close(in_file.states, in_memory.states, rtol=0, atol=0)
    assert in_file.states.shape[1] == int(some.sum())


def test_states_that_fit_nowhere_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(LensbenchError, match="memory_gib"):
        room_for((2, 10**12, 10**3), torch.device("cpu"), 1.0)


def test_captured_kl_is_exact_with_a_large_vocabulary_and_large_logits():
    """The terms that every KL is made of, against float64: errors of the normalisation grow with log Z."""
    torch.manual_seed(0)
    sizes = {**GROUPED, "vocab_size": 50_000}
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    with torch.no_grad():
        model.lm_head.weight[:, 0] += 30 / model.lm_head.weight.shape[1] ** 0.5
        model.model.norm.weight[0] = 4.0
    stream = ResidualStream(model)
    documents = [TokenizedDocument("a", np.arange(400, dtype=np.int32), np.ones(400, np.int32))]
    captured = capture(stream, sample_windows(documents, n_sequences=8, length=40, positions=16, seed=0))
    n = stream.readout.final_norm(captured.states[-1]).double()
    logits = n @ stream.readout.weight.double().T
    log_p = logits.log_softmax(-1)
    assert (logits.logsumexp(-1).abs() > 12).any()
    expected = log_p.exp() @ stream.readout.weight.double()
    entropy = (log_p.exp() * log_p).sum(-1)
    log_z = logits.logsumexp(-1)
    # KL of p from itself: 0, but for what the captured terms are off by.
    kl = captured.entropy_term.double() - (captured.expected.double() * n).sum(-1) + log_z
    assert kl.mean().abs() < 1e-5
    assert kl.abs().max() < 1e-4
    torch.testing.assert_close(captured.entropy_term.double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(captured.expected.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("where", "told"), [("layers", "the state after layer 2"), ("lm_head", "the model's logits")])
def test_what_overflows_is_refused_with_its_place(where, told):
    """As float16 models do on some text; a sum over tokens would pass over what is not a number."""
    model, windows = random_model("llama"), windows_by_hand()
    stream = ResidualStream(model)
    capture(stream, windows)
    module = model.model.layers[1] if where == "layers" else model.lm_head

    def overflow(_, __, output):
        output = output.clone()
        output[-1, ..., 0] = float("inf")
        return output

    module.register_forward_hook(overflow)
    with pytest.raises(LensbenchError, match=f"{told} overflowed .*give the model a dtype of larger range"):
        capture(stream, windows)
