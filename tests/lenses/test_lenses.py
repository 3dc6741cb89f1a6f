"""Lenses on disk and in tuned-lens's own hands."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tuned_lens.nn.lenses import LogitLens, TunedLens
from tuned_lens.nn.unembed import Unembed

from lensbench.errors import LensbenchError
from lensbench.lenses.fit import Fit, FitSummary
from lensbench.lenses.lens import FittedLens, LensId, LensRecord
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.tuned import SharedLens, save_tuned_lens, tuned_lens
from lensbench.models import build
from lensbench.streams.parts import find_readout
from lensbench.streams.rotated import RotatedView
from lensbench.streams.stream import ResidualStream

V, D, L = 60, 16, 3
FAMILIES = ("gpt", "gpt2", "predictive-coding")


def model_of(family, seed=0):
    model = build(family, parameters=12_000, vocab_size=V, d_model=D, layers=L, heads=2, context=32, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.numel() == D:
                parameter.add_(0.3 * torch.randn(D))
        model.get_input_embeddings().weight.mul_(20)
    return model.eval()


def maps_of(count, d=D, seed=0, one_matrix=False):
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(1 if one_matrix else count, d, d, generator=g).expand(count, d, d)
    return AffineMaps(matrix.contiguous(), torch.randn(count, d, generator=g))


def by_hand(maps, index, h):
    """B h + c in float64."""
    b, c = maps.matrix[index].double().numpy(), maps.offset[index].double().numpy()
    return np.stack([b @ row + c for row in h.double().numpy()])


@pytest.fixture(params=FAMILIES)
def stream(request):
    return ResidualStream(model_of(request.param))


# tuned-lens's own format


def test_a_tuned_lens_loads_with_tuned_lens_itself_and_decodes_identically(stream, tmp_path):
    maps = maps_of(L, stream.d_model)
    lens = tuned_lens(stream.readout, maps, model_name="suite/model")
    save_tuned_lens(lens, tmp_path / "tuned")
    loaded = TunedLens.from_unembed_and_pretrained(stream.readout, str(tmp_path / "tuned"))
    assert (len(loaded), loaded.config.d_model, loaded.config.base_model_name_or_path) == (
        L,
        stream.d_model,
        "suite/model",
    )
    h = torch.randn(5, stream.d_model)
    for layer in range(L):
        np.testing.assert_allclose(
            loaded.transform_hidden(h, layer).detach().numpy(), by_hand(maps, layer, h), rtol=0, atol=1e-4
        )
        assert torch.equal(loaded(h, layer), lens(h, layer))
        assert (loaded(h, layer) - stream.readout(h)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_a_tuned_lens_decodes_the_same_through_tuned_lens_own_unembedding(family, tmp_path):
    model = model_of(family)
    stream = ResidualStream(model)
    maps = maps_of(L)
    save_tuned_lens(tuned_lens(stream.readout, maps, model_name="x"), tmp_path / "tuned")
    theirs = TunedLens.from_model_and_pretrained(model, str(tmp_path / "tuned"))
    assert type(theirs.unembed) is Unembed
    states, _ = stream.forward(torch.arange(12)[None])
    ours = tuned_lens(stream.readout, maps, model_name="x")
    for layer in range(L):
        torch.testing.assert_close(theirs(states[layer], layer), ours(states[layer], layer), rtol=0, atol=1e-6)
    torch.testing.assert_close(LogitLens(Unembed(model))(states[1], 1), stream.readout(states[1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt", "gpt2"])
def test_the_unembedding_hash_is_the_one_tuned_lens_computes(family, tmp_path):
    model = model_of(family)
    theirs = Unembed(model).unembedding_hash()
    readout = find_readout(model)
    assert readout.unembedding_hash() == theirs
    assert find_readout(model_of(family, seed=1)).unembedding_hash() != theirs
    save_tuned_lens(tuned_lens(readout, maps_of(L), model_name="x"), tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["unembed_hash"] == theirs
    SharedLens(readout, D).save(tmp_path / "shared")
    assert json.loads((tmp_path / "shared" / "config.json").read_text())["unembed_hash"] == theirs


def test_saving_a_tuned_lens_again_replaces_the_whole_folder(tmp_path):
    readout = find_readout(model_of("gpt"))
    folder = tmp_path / "tuned"
    save_tuned_lens(tuned_lens(readout, maps_of(L, seed=0), model_name="x"), folder)
    (folder / "stale").write_text("")
    (tmp_path / "tuned.partial").mkdir()
    (tmp_path / "tuned.partial" / "stale").write_text("")
    save_tuned_lens(tuned_lens(readout, maps_of(L, seed=1), model_name="x"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "params.pt"]
    assert [p.name for p in tmp_path.iterdir()] == ["tuned"]
    h = torch.randn(4, D)
    loaded = TunedLens.from_unembed_and_pretrained(readout, str(folder))
    np.testing.assert_allclose(
        loaded.transform_hidden(h, 2).detach().numpy(), by_hand(maps_of(L, seed=1), 2, h), rtol=0, atol=1e-4
    )


# Shared lenses


@pytest.mark.parametrize("biases", [False, True])
def test_a_shared_lens_maps_a_state_to_b_h_plus_c_and_decodes_that(stream, biases):
    maps = maps_of(L if biases else 1, stream.d_model, one_matrix=True)
    lens = SharedLens.from_maps(stream.readout, maps)
    h = torch.randn(5, stream.d_model)
    for layer in range(L):
        expected = by_hand(maps, layer if biases else 0, h)
        np.testing.assert_allclose(lens.transform_hidden(h, layer).detach().numpy(), expected, rtol=0, atol=1e-4)
        decoded = stream.readout(torch.from_numpy(expected).float())
        torch.testing.assert_close(lens(h, layer), decoded, rtol=1e-3, atol=1e-3)
    batched = torch.randn(2, 3, stream.d_model)
    assert lens(batched, 0).shape == (2, 3, V)


def test_a_new_shared_lens_is_the_logit_lens(stream):
    h = torch.randn(5, stream.d_model)
    for layers in (None, L):
        assert torch.equal(SharedLens(stream.readout, stream.d_model, layers)(h, 1), stream.readout(h))
    assert torch.equal(
        SharedLens.from_maps(stream.readout, AffineMaps.identity(stream.d_model))(h, 0), stream.readout(h)
    )


@pytest.mark.parametrize("biases", [False, True])
def test_a_shared_lens_comes_back_from_disk_bit_by_bit(stream, biases, tmp_path):
    lens = SharedLens.from_maps(stream.readout, maps_of(L if biases else 1, stream.d_model, one_matrix=True))
    lens.save(tmp_path / "shared")
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == ["config.json", "params.safetensors"]
    loaded = SharedLens.load(stream.readout, tmp_path / "shared")
    assert (loaded.layer_bias is not None) == biases
    h = torch.randn(5, stream.d_model)
    for layer in range(L):
        assert torch.equal(loaded(h, layer), lens(h, layer))
    # A lens does not carry the model's weights around.
    saved = load_file(tmp_path / "shared" / "params.safetensors")
    assert sum(t.numel() for t in saved.values()) == stream.d_model**2 + stream.d_model * (L if biases else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_lens_of_another_model_is_refused(family, tmp_path):
    SharedLens(find_readout(model_of(family)), D).save(tmp_path)
    with pytest.raises(LensbenchError, match="another model"):
        SharedLens.load(find_readout(model_of(family, seed=1)), tmp_path)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(path, key):
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)


DAMAGES = {
    "truncated weights": lambda f: (f / "params.safetensors").write_bytes(
        (f / "params.safetensors").read_bytes()[:-99]
    ),
    "empty weights": lambda f: (f / "params.safetensors").write_bytes(b""),
    "no weights": lambda f: (f / "params.safetensors").unlink(),
    "no matrix": lambda f: without(f / "params.safetensors", "translator.weight"),
    "no bias": lambda f: without(f / "params.safetensors", "layer_bias"),
    "config says no layer biases": lambda f: edit(f / "config.json", lambda c: c.update(layer_biases=None)),
    "config says other width": lambda f: edit(f / "config.json", lambda c: c.update(d_model=D + 1)),
    "config without width": lambda f: edit(f / "config.json", lambda c: c.pop("d_model")),
    "config without hash": lambda f: edit(f / "config.json", lambda c: c.pop("unembed_hash")),
    "truncated config": lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:-9]),
    "config without end": lambda f: (f / "config.json").write_text("[" * 200_000),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "binary config": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    "no config": lambda f: (f / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_shared_lens_is_refused_by_name(damage, tmp_path):
    readout = find_readout(model_of("gpt"))
    folder = tmp_path / "shared"
    SharedLens.from_maps(readout, maps_of(L, one_matrix=True)).save(folder)
    DAMAGES[damage](folder)
    with pytest.raises(LensbenchError, match="shared"):
        SharedLens.load(readout, folder)


# All lenses of a fit


def fit_of(**maps):
    """A fit of such maps, each read at as many layers as there are; nothing of it was fitted."""
    lenses = {}
    for kind, own in maps.items():
        lens = LensId(kind, "zero", "closed")
        reads = [[layer] for layer in range(len(own))] if len(own) > 1 else [list(range(L))]
        lenses[lens] = FittedLens(LensRecord(lens=lens, reads=reads, ridge=[0.1] * len(own)), own)
    summary = FitSummary(
        headline=next(iter(lenses)), records={k: v.record for k, v in lenses.items()}, depth=L, fit_tokens=1,
        dev_tokens=1, rotated_rank=2, rotations=1, pair_rotations=1, refits=0, layers=[0], dev_constant_kl=1.0,
        constant=[0.5, 0.5],
    )  # fmt: skip
    return Fit(lenses, [RotatedView(torch.eye(D).repeat(L, 1, 1), 2)], summary)


def check_round_trip(fit, folder):
    fit.save(folder)
    loaded = Fit.load(folder)
    assert loaded.summary == fit.summary
    assert loaded.lenses.keys() == fit.lenses.keys()
    for lens, fitted in fit.lenses.items():
        assert torch.equal(loaded[lens].maps.matrix, fitted.maps.matrix)
        assert torch.equal(loaded[lens].maps.offset, fitted.maps.offset)
        assert loaded[lens].record == fitted.record
    assert torch.equal(loaded.views[0].maps, fit.views[0].maps)
    assert sorted(p.name for p in folder.iterdir()) == ["fit.json", "maps.safetensors"]


def test_a_saved_fit_comes_back_bit_by_bit(tmp_path):
    turned = AffineMaps(maps_of(2, seed=5).matrix.transpose(1, 2), maps_of(2, seed=6).offset)
    check_round_trip(fit_of(own=maps_of(L, seed=3), shared=maps_of(1, seed=4), turned=turned), tmp_path)


def test_maps_that_are_parts_of_each_other_can_be_saved_together(tmp_path):
    own = maps_of(L)
    check_round_trip(fit_of(own=own, first=own[:1], same=own), tmp_path)


@pytest.mark.parametrize("part", ["matrix", "offset"])
def test_maps_that_lack_a_part_are_refused_by_name(part, tmp_path):
    fit_of(own=maps_of(L), shared=maps_of(1)).save(tmp_path)
    without(tmp_path / "maps.safetensors", f"own-zero-closed.{part}")
    with pytest.raises(LensbenchError, match=r"maps\.safetensors"):
        Fit.load(tmp_path)


@pytest.mark.parametrize("name", ["maps.safetensors", "fit.json"])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_damaged_files_of_a_fit_are_refused_by_name(content, name, tmp_path):
    path = tmp_path / name
    fit_of(own=maps_of(L)).save(tmp_path)
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(LensbenchError, match=re.escape(name)):
        Fit.load(tmp_path)
    path.unlink()
    with pytest.raises(LensbenchError, match=re.escape(name)):
        Fit.load(tmp_path)


def test_a_summary_that_names_no_lens_is_refused_by_name(tmp_path):
    fit_of(own=maps_of(L)).save(tmp_path)
    path = tmp_path / "fit.json"
    path.write_text(path.read_text().replace("own-zero-closed", "own-zero"))
    with pytest.raises(LensbenchError, match=r"fit\.json is damaged"):
        Fit.load(tmp_path)


def test_stacking_and_choosing_maps_keeps_each_with_its_offset():
    a, b = maps_of(2, seed=0), maps_of(3, seed=1)
    both = AffineMaps.stack([a, b])
    assert len(both) == 5
    assert torch.equal(both[[3, 0]].matrix, torch.stack([b.matrix[1], a.matrix[0]]))
    assert torch.equal(both[[3, 0]].offset, torch.stack([b.offset[1], a.offset[0]]))
    assert both.to(torch.zeros(1, dtype=torch.float64)).matrix.dtype == torch.float64
