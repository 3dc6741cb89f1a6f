"""Lenses go to tuned-lens and come from it: files, hub, hashes, and its trajectories for every lens and model."""

import contextlib
import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.architectures import CONTEXT, D, L, V, small_model
from helpers.commands import refused
from helpers.pretrained import run, save_model, write_suite
from helpers.suites import write_texts
from tokenizers import Tokenizer
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from tuned_lens.nn.lenses import LogitLens, TunedLens
from tuned_lens.nn.unembed import Unembed
from tuned_lens.plotting import PredictionTrajectory

from lensbench.data import corpus, sample_windows, tokenize
from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.per_layer import MATRIX_LENSES
from lensbench.lenses.refined import OWN_REFINED, SHARED_REFINED
from lensbench.lenses.shared import SHARED_BIAS_LENS
from lensbench.lenses.trajectory import prediction_trajectory
from lensbench.lenses.tuned import SharedLens, load_tuned_lens, maps_of, tuned_lens
from lensbench.run import suite as run_module
from lensbench.streams.stream import ResidualStream

SIZE = 290
NAMES = ("gpt2", "llama")
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "mamba": "backbone.layers", "gemma2": "model.layers"}
NORMS = {"gpt2": "transformer.ln_f", "llama": "model.norm", "mamba": "backbone.norm_f", "gemma2": "model.norm"}


def random_lens(lens: TunedLens, seed: int = 0) -> TunedLens:
    """The same lens with translators that do something, and something else at every layer."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in lens.layer_translators.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return lens


def random_maps(count: int, seed: int = 0, one_matrix: bool = False) -> AffineMaps:
    g = torch.Generator().manual_seed(seed)
    matrix = torch.eye(D) + 0.3 * torch.randn(1 if one_matrix else count, D, D, generator=g)
    return AffineMaps(matrix.expand(count, D, D).contiguous(), 0.3 * torch.randn(count, D, generator=g))


def states_by_hand(model: PreTrainedModel, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every block and then the norm of a model are given ``[T, d]``, and the logits ``[T, V]``."""
    given = []

    def take(_, args, kwargs):
        given.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    kind = model.config.model_type
    parts = [*model.get_submodule(BLOCKS[kind]), model.get_submodule(NORMS[kind])]
    hooks = [part.register_forward_pre_hook(take, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return given, logits


def read_by_hand(model: PreTrainedModel, h: torch.Tensor) -> torch.Tensor:
    """Logits of a state, by the modules of each model class."""
    with torch.no_grad():
        logits = model.lm_head(model.get_submodule(NORMS[model.config.model_type])(h))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


# Lenses of a run, in plain tuned-lens


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """A folder with two saved models and the run of a suite that fitted lenses to them."""
    root = tmp_path_factory.mktemp("exchange")
    texts = write_texts(root / "texts", documents=120)
    for name in NAMES:
        save_model(root / name, name, texts, SIZE)
    suite = write_suite(root / "suite.toml", texts, **{n: {"source": f"path:{root / n}"} for n in NAMES})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "draw_side_by_side", lambda *_: [])
        result = run("run", suite, "--out", root / "run")
    assert result.exit_code == 0, result.output
    return root


@pytest.mark.run
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("folder", "lens"), [("tuned", OWN_REFINED), ("tuned_headline", MATRIX_LENSES.within(0.02))])
def test_lenses_of_a_run_decode_the_same_in_plain_tuned_lens(fitted, name, folder, lens):
    stage = fitted / "run" / "stages" / f"fit-{name}-seed0"
    model = AutoModelForCausalLM.from_pretrained(fitted / name).eval()
    theirs = TunedLens.from_model_and_pretrained(model, str(stage / folder))
    assert type(theirs.unembed) is Unembed
    assert len(theirs) == L
    config = json.loads((stage / folder / "config.json").read_text())
    assert config["unembed_hash"] == Unembed(model).unembedding_hash()
    assert config["base_model_name_or_path"] == f"path:{name}"
    ours = Fit.load(stage)[lens].maps
    assert (ours.matrix - torch.eye(D)).abs().amax((1, 2)).min() > 0.01
    states, _ = states_by_hand(model, torch.arange(20) + 30)
    for layer, h in enumerate(states[:-1]):
        x = (h.double() @ ours.matrix[layer].double().T + ours.offset[layer].double()).float()
        expected = read_by_hand(model, x)
        torch.testing.assert_close(theirs(h, layer), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.run
@pytest.mark.parametrize("name", NAMES)
def test_a_lens_of_a_run_comes_back_by_load_tuned_lens(fitted, name):
    stage = fitted / "run" / "stages" / f"fit-{name}-seed0"
    stream = ResidualStream(AutoModelForCausalLM.from_pretrained(fitted / name))
    ours = Fit.load(stage).headline.maps
    loaded = maps_of(load_tuned_lens(stream.readout, f"path:{stage / 'tuned_headline'}"))
    # float32 B - I + I is not B to the last digit.
    torch.testing.assert_close(loaded.matrix, ours.matrix, rtol=0, atol=1e-6)
    assert torch.equal(loaded.offset, ours.offset)


# Lenses of tuned-lens, here


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt", "bloom"])
def test_a_lens_that_tuned_lens_saved_is_loaded_as_it_was(tmp_path, name):
    model = small_model(name)
    lens = random_lens(TunedLens.from_model(model))
    lens.save(tmp_path / "lens")
    loaded = load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")
    maps = maps_of(loaded)
    h = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    for layer in range(L):
        x = h.double() @ maps.matrix[layer].double().T + maps.offset[layer].double()
        with torch.no_grad():
            expected = lens.transform_hidden(h, layer)
        torch.testing.assert_close(x.float(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded(h, layer), lens(h, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.run
@pytest.mark.parametrize("name", NAMES)
def test_a_suite_measures_a_lens_of_tuned_lens(fitted, tmp_path, monkeypatch, name):
    """The whole headline matrix against a loop over windows with tuned-lens's own class and transformers."""
    monkeypatch.setattr(run_module, "draw_side_by_side", lambda *_: [])
    model = AutoModelForCausalLM.from_pretrained(fitted / name).eval()
    lens = random_lens(TunedLens.from_model(model))
    lens.save(tmp_path / "lens")
    keys = {"source": f"path:{fitted / name}", "lens": f"path:{tmp_path / 'lens'}"}
    suite = write_suite(tmp_path / "suite.toml", fitted / "texts", m=keys)
    result = run("run", suite, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    transfer = pd.read_csv(tmp_path / "run" / "transfer.csv")
    assert set(transfer["stage"]) == {"loaded"}
    assert transfer["tolerance"].isna().all()
    assert transfer["ridge"].isna().all()

    windows = sample_windows(
        tokenize(
            AutoTokenizer.from_pretrained(fitted / name), corpus.load_corpus(f"file:{fitted / 'texts'}").splits["eval"]
        ),
        n_sequences=60,
        length=32,
        positions=8,
        seed=3,
        max_share=0.2,
    )
    assert windows.valid.all()
    kl, ce = np.zeros((2, L + 1, L + 1))
    for ids, positions in zip(torch.from_numpy(windows.ids), torch.from_numpy(windows.positions), strict=True):
        states, logits = states_by_hand(model, ids)
        log_p = logits[positions].double().log_softmax(-1)
        for j, h in enumerate(states):
            for i in range(L + 1):
                with torch.no_grad():
                    read = lens(h, i) if i < L else lens.unembed(h)
                log_q = read[positions].double().log_softmax(-1)
                kl[i, j] += (log_p.exp() * (log_p - log_q)).sum().item()
                ce[i, j] -= log_q.gather(-1, ids[positions + 1][:, None]).sum().item()
    count = windows.valid.sum()
    found = transfer.pivot(index="lens_layer", columns="stream_layer", values=["kl", "ce"])
    for column, expected in (("kl", kl), ("ce", ce)):
        np.testing.assert_allclose(found[column].to_numpy(), expected / count, rtol=1e-4, atol=1e-4)
    assert np.diag(kl / count)[:L].min() > 0.1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["suite"]["models"][0]["lens"] == "path:lens"

    # Another lens under the same name replaces no results, and elsewhere it is another fit; the same one is not.
    before = (tmp_path / "run" / "transfer.csv").read_bytes()
    assert "done in" not in run("run", suite, "--out", tmp_path / "run").stderr
    random_lens(lens, seed=1).save(tmp_path / "lens")
    refused(run("run", suite, "--out", tmp_path / "run"), "is another one now", "give --out another folder")
    assert (tmp_path / "run" / "transfer.csv").read_bytes() == before
    assert "fit-m-seed0: done in" in run("run", suite, "--out", tmp_path / "other").stderr
    assert (tmp_path / "other" / "transfer.csv").read_bytes() != before


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one resource; the calls that it gets, and the lens that it holds."""
    lens, asked = random_lens(TunedLens.from_model(small_model("gpt2"))), []
    lens.save(tmp_path / "hub")

    def download(*, filename, **options):
        asked.append((options["subfolder"], options["repo_id"], options["repo_type"], options["revision"], filename))
        return str(tmp_path / "hub" / filename)

    monkeypatch.setattr("tuned_lens.load_artifacts.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    return lens, asked


@pytest.mark.parametrize(
    ("source", "resource", "revision"),
    [
        ("hub:gpt2", "gpt2", None),
        ("hub:EleutherAI/pythia-70m-deduped", "EleutherAI/pythia-70m-deduped", None),
        ("hub:facebook/opt-125m@v1.2", "facebook/opt-125m", "v1.2"),
        ("hub:gpt2@refs/pr/3", "gpt2", "refs/pr/3"),
    ],
)
def test_name_and_revision_of_a_lens_go_to_the_hub_as_given(hub, source, resource, revision):
    lens, asked = hub
    loaded = load_tuned_lens(ResidualStream(small_model("gpt2")).readout, source)
    space = (f"lens/{resource}", "AlignmentResearch/tuned-lens", "space", revision)
    assert sorted(asked) == [(*space, "config.json"), (*space, "params.pt")]
    for ours, theirs in zip(loaded, lens, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)


def test_a_folder_that_is_called_like_a_resource_of_the_hub_is_not_taken_for_it(hub, tmp_path):
    lens, asked = hub
    other = random_lens(TunedLens.from_model(small_model("gpt2")), seed=1)
    other.save(tmp_path / "EleutherAI" / "it")
    loaded = load_tuned_lens(ResidualStream(small_model("gpt2")).readout, "hub:EleutherAI/it")
    assert asked
    assert torch.equal(loaded[0].weight, lens[0].weight)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(**_):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files.")

    monkeypatch.setattr("tuned_lens.load_artifacts.hf_hub_download", unreachable)
    with pytest.raises(LensbenchError) as found:
        load_tuned_lens(ResidualStream(small_model("gpt2")).readout, "hub:no/where@v1")
    line = str(found.value)
    assert line.startswith("hub:no/where@v1")
    assert "connect" in line
    assert "\n" not in line


@pytest.mark.parametrize("source", ["", "gpt2", "hub:", "path:", "file:lens", "package:lens"])
def test_what_names_no_lens_is_refused_with_what_does(source):
    with pytest.raises(LensbenchError, match=r"path:FOLDER or hub:RESOURCE") as found:
        load_tuned_lens(ResidualStream(small_model("gpt2")).readout, source)
    assert repr(source) in str(found.value)


# Hashes


def on_a_border() -> PreTrainedModel:
    """tuned-lens hashes one decimal of the unembedding's corners; here half precision changes one of them."""
    model = small_model("gpt_neox")
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([0.34999, 0.6501])
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lens_of_the_same_model_in_half_precision_is_accepted(tmp_path, dtype):
    model = on_a_border()
    half = copy.deepcopy(model).to(dtype)
    assert Unembed(half).unembedding_hash() != Unembed(model).unembedding_hash()
    lens = random_lens(TunedLens.from_model(half))
    lens.save(tmp_path / "lens")
    loaded = load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")
    maps = maps_of(loaded)
    assert maps.matrix.dtype == torch.float32
    for layer, translator in enumerate(lens):
        assert torch.equal(maps.matrix[layer], translator.weight.float() + torch.eye(D))


def test_a_lens_of_another_unembedding_is_refused(tmp_path):
    model, other = on_a_border(), on_a_border()
    with torch.no_grad():
        other.lm_head.weight[0, 0] = 0.75
    for stored in (other, copy.deepcopy(other).half(), small_model("gpt_neox", seed=1)):
        TunedLens.from_model(stored).save(tmp_path / "lens")
        with pytest.raises(LensbenchError, match="another model"):
            load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")


# Lenses that are damaged, or not made in good faith


class Writes:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_code_in_a_lens_is_refused_and_not_run(tmp_path, kind):
    model = small_model("gpt2")
    lens = TunedLens.from_model(model)
    lens.save(tmp_path / "lens")
    marker, state = tmp_path / "marker", {**lens.layer_translators.state_dict(), "extra": Writes(tmp_path / "marker")}
    if kind == "zip":
        torch.save(state, tmp_path / "lens" / "params.pt")
    else:
        (tmp_path / "lens" / "params.pt").write_bytes(pickle.dumps({"0.weight": Writes(marker)}, protocol=2))
    with pytest.raises(LensbenchError) as found:
        load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")
    assert not marker.exists()
    assert "\n" not in str(found.value)
    # The file does run when it is read without care: what is refused here is no dud.
    with contextlib.suppress(RuntimeError):
        torch.load(tmp_path / "lens" / "params.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", None])
def test_damaged_weights_of_a_lens_are_said_in_words(tmp_path, content):
    model = small_model("gpt2")
    TunedLens.from_model(model).save(tmp_path / "lens")
    weights = tmp_path / "lens" / "params.pt"
    weights.write_bytes(weights.read_bytes()[:-200] if content is None else content)
    with pytest.raises(LensbenchError, match=r"its weights \(params.pt\) are damaged") as refused:
        load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")
    assert "Errno" not in str(refused.value)


@pytest.mark.parametrize("change", [{"d_model": D + 1}, {"num_hidden_layers": L + 1}, {"num_hidden_layers": L - 1}])
def test_a_config_that_is_not_of_its_weights_is_refused(tmp_path, change):
    model = small_model("gpt2")
    TunedLens.from_model(model).save(tmp_path / "lens")
    path = tmp_path / "lens" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LensbenchError, match="cannot be loaded"):
        load_tuned_lens(ResidualStream(model).readout, f"path:{tmp_path / 'lens'}")


def test_a_lens_of_another_width_is_refused_without_a_hash_too(tmp_path):
    lens = TunedLens.from_model(small_model("gpt2", n_embd=16))
    lens.config.unembed_hash = None
    lens.save(tmp_path / "lens")
    with pytest.raises(LensbenchError):
        load_tuned_lens(ResidualStream(small_model("gpt2")).readout, f"path:{tmp_path / 'lens'}")


# Trajectories

TRAJECTORIES = ("gpt2", "llama", "mamba", "gemma2")
LENSES = ("logit", "tuned", "shared", "shared_bias")


def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{n}": n for n in range(V)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(token_models.WordLevel(vocabulary, unk_token="w0")))


def lens_of(kind: str, stream: ResidualStream):
    """A lens, and the map that it should apply at each layer."""
    if kind == "logit":
        return LogitLens(stream.readout), AffineMaps(torch.eye(D).expand(L, D, D), torch.zeros(L, D))
    if kind == "tuned":
        return tuned_lens(stream.readout, random_maps(L), model_name="x"), random_maps(L)
    maps = random_maps(L if kind == "shared_bias" else 1, one_matrix=True)
    applied = AffineMaps(maps.matrix[:1].expand(L, D, D), maps.offset.expand(L, D))
    return SharedLens.from_maps(stream.readout, maps), applied


@pytest.fixture(scope="module", params=TRAJECTORIES)
def model(request) -> PreTrainedModel:
    changes = {"final_logit_softcapping": 2.0} if request.param == "gemma2" else {}
    model = small_model(request.param, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


@pytest.mark.parametrize("kind", LENSES)
def test_a_trajectory_is_what_a_lens_reads_from_the_input_of_every_block(model, kind):
    stream, ids = ResidualStream(model), torch.randint(V, (CONTEXT // 2,), generator=torch.Generator().manual_seed(0))
    lens, maps = lens_of(kind, stream)
    got = prediction_trajectory(lens, stream, ids, words())
    states, logits = states_by_hand(model, ids)
    assert got.log_probs.shape == (L + 1, len(ids), V)
    own = logits.double().log_softmax(-1)
    rows = []
    for layer, h in enumerate(states[:-1]):
        x = h.double() @ maps.matrix[layer].double().T + maps.offset[layer].double()
        rows.append(read_by_hand(model, x.float()).double().log_softmax(-1))
    expected = torch.stack([*rows, own]).numpy()
    np.testing.assert_allclose(got.log_probs, expected, rtol=0, atol=2e-5)
    assert np.abs(expected[:-1] - expected[-1]).max((1, 2)).min() > 0.05

    p = np.exp(expected)
    assert (got.input_ids == ids.numpy()).all()
    assert got.num_layers == L
    np.testing.assert_allclose(got.entropy().stats, -(p * expected).sum(-1), atol=1e-4)
    np.testing.assert_allclose(got.forward_kl().stats, (p[-1] * (expected[-1] - expected)).sum(-1), atol=1e-4)
    targets = np.append(ids[1:].numpy(), expected[-1, -1].argmax())
    chosen = expected[:, np.arange(len(ids)), targets]
    np.testing.assert_allclose(got.cross_entropy().stats, -chosen, atol=1e-4)
    ranks = 1 + (got.log_probs > got.log_probs[:, np.arange(len(ids)), targets][:, :, None]).sum(-1)
    np.testing.assert_array_equal(got.rank().stats, ranks)
    assert got.rank().stats[-1, -1] == 1
    assert list(got.entropy().sequence_labels) == [f"w{i}" for i in ids.tolist()]


def test_targets_of_a_trajectory_may_be_given(model):
    stream, ids = ResidualStream(model), torch.arange(10)
    targets = torch.arange(10) + 20
    got = prediction_trajectory(LogitLens(stream.readout), stream, ids, words(), targets)
    own = states_by_hand(model, ids)[1].log_softmax(-1)
    expected = -own[torch.arange(10), targets].numpy()
    np.testing.assert_allclose(got.cross_entropy().stats[-1], expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LENSES)
def test_tuned_lens_makes_the_same_trajectory_where_it_knows_the_model(name, kind):
    model = small_model(name)
    stream, ids = ResidualStream(model), torch.arange(20) + 7
    lens, _ = lens_of(kind, stream)
    ours = prediction_trajectory(lens, stream, ids, words())
    theirs = PredictionTrajectory.from_lens_and_model(
        lens, model, ids.tolist(), tokenizer=words(), targets=ours.targets.tolist()
    )
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-5)
    for statistic in ("entropy", "forward_kl", "cross_entropy"):
        np.testing.assert_allclose(
            getattr(ours, statistic)().stats, getattr(theirs, statistic)().stats, rtol=0, atol=1e-4
        )


@pytest.mark.run
def test_a_trajectory_of_a_shared_lens_that_a_run_fitted(fitted):
    """From the folder of a run, for the model of the folder, in the tokens of its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(fitted / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(fitted / "llama")
    stream = ResidualStream(model)
    stage = fitted / "run" / "stages" / "fit-llama-seed0"
    ids = torch.tensor(tokenizer((fitted / "texts" / "000.txt").read_text())["input_ids"][:32])
    states, _ = states_by_hand(model, ids)
    for folder, lens in (("shared", SHARED_REFINED), ("shared_bias", SHARED_BIAS_LENS)):
        got = prediction_trajectory(SharedLens.load(stream.readout, stage / folder), stream, ids, tokenizer)
        maps = Fit.load(stage)[lens].maps
        assert len(maps) == (L if folder == "shared_bias" else 1)
        for layer, h in enumerate(states[:-1]):
            at = layer if len(maps) == L else 0
            x = h.double() @ maps.matrix[at].double().T + maps.offset[at].double()
            expected = read_by_hand(model, x.float()).log_softmax(-1)
            np.testing.assert_allclose(got.log_probs[layer], expected.numpy(), rtol=0, atol=1e-4)


def test_the_end_of_a_trajectory_is_that_of_the_whole_one(model):
    stream, ids = ResidualStream(model), torch.arange(10)
    lens, _ = lens_of("shared", stream)
    whole = prediction_trajectory(lens, stream, ids, words())
    end = prediction_trajectory(lens, stream, ids, words(), last=3)
    assert end.log_probs.shape[1] == 3
    np.testing.assert_allclose(end.log_probs, whole.log_probs[:, -3:], atol=1e-5)
    np.testing.assert_array_equal(end.input_ids, whole.input_ids[-3:])
    np.testing.assert_array_equal(end.targets, whole.targets[-3:])
    more = prediction_trajectory(lens, stream, ids, words(), last=99)
    np.testing.assert_allclose(more.log_probs, whole.log_probs, atol=1e-5)


def test_a_lens_that_holds_no_numbers_is_refused(tmp_path):
    stream = ResidualStream(small_model("llama"))
    maps = random_maps(L)
    maps.offset[1, 3] = float("nan")
    tuned_lens(stream.readout, maps, model_name="it").save(tmp_path / "tuned")
    with pytest.raises(LensbenchError, match=r"NaN or infinite values in 1\.bias"):
        load_tuned_lens(stream.readout, f"path:{tmp_path / 'tuned'}")
    SharedLens.from_maps(stream.readout, maps[[1]]).save(tmp_path / "shared")
    with pytest.raises(LensbenchError, match=r"NaN or infinite values in translator\.bias"):
        SharedLens.load(stream.readout, tmp_path / "shared")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_shared_lens_of_the_same_model_in_half_precision_is_accepted(tmp_path, dtype):
    model = small_model("llama")
    half = ResidualStream(copy.deepcopy(model).to(dtype))
    SharedLens.from_maps(half.readout, random_maps(1)).save(tmp_path / "shared")
    SharedLens.load(ResidualStream(model).readout, tmp_path / "shared")
    other = small_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(LensbenchError, match="another model"):
        SharedLens.load(ResidualStream(other).readout, tmp_path / "shared")
