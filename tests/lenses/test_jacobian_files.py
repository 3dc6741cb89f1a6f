"""Files of Jacobian lenses: those of others, read by a few lines of their own, and ours, in the same format."""

import numpy as np
import pytest
import torch
from helpers.architectures import small_model
from helpers.jacobians import windows_of_ids

from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianFacts, JacobianSource
from lensbench.lenses.jacobian_files import jacobian_path, read_jacobian, write_jacobian
from lensbench.lenses.jacobian_kinds import linear
from lensbench.lenses.recipe import JacobianRecipe
from lensbench.streams.stream import ResidualStream

D, L = 32, 3


def published(path, layers=(0, 1), d=D, dtype=torch.float16, seed=0, **more):
    """A file as others write it; theirs has a matrix of the output of each block but the last."""
    generator = torch.Generator().manual_seed(seed)
    j = {k: (torch.eye(d) + 0.3 * torch.randn(d, d, generator=generator)).to(dtype) for k in layers}
    content = {"J": j, "n_prompts": 7, "source_layers": list(layers), "d_model": d, **more}
    torch.save(content, path)
    return content


def test_a_published_file_gives_the_read_out_of_an_independent_reading(tmp_path):
    content = published(tmp_path / "lens.pt")
    model = small_model("gpt2")
    ids = torch.randint(128, (1, 12), generator=torch.Generator().manual_seed(1))
    # As its users read it: J of the output of block l, the model's own norm and head.
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    stream = ResidualStream(model)
    found = read_jacobian(str(tmp_path / "lens.pt"))
    assert (found.layers, found.prompts, found.dtype) == ([1, 2], 7, "float16")
    states, _ = stream.forward(ids)
    for block, j in content["J"].items():
        with torch.no_grad():
            read = model.lm_head(model.transformer.ln_f(out.hidden_states[block + 1] @ j.float().T))
        own = stream.readout(linear(found.matrices[block + 1][None]).read(0, states[block + 1]))
        assert torch.allclose(own, read, atol=1e-5), block


def test_a_checkpoint_of_a_fit_gives_the_mean_over_its_prompts(tmp_path):
    content = published(tmp_path / "lens.pt", dtype=torch.float32)
    sums = {k: 4 * j for k, j in content["J"].items()}
    torch.save(
        {"jacobian_sum": sums, "n_done": 4, "next_idx": 4, "target_layer": 2, "skip_first": 16}, tmp_path / "c.pt"
    )
    whole, partial = (read_jacobian(f"path:{tmp_path / name}") for name in ("lens.pt", "c.pt"))
    assert partial.prompts == 4
    assert partial.metadata["target_layer"] == 2
    for layer in whole.layers:
        assert torch.equal(partial.matrices[layer], whole.matrices[layer])


def test_a_file_of_ours_keeps_the_read_out_to_float16_and_has_the_published_keys(tmp_path):
    model = small_model("llama")
    stream = ResidualStream(model)
    ids = torch.randint(128, (3, 12), generator=torch.Generator().manual_seed(1))
    recipe = JacobianRecipe(method="exact", prompts=2, skip_first=2)
    found = JacobianSource(stream, windows_of_ids(ids), recipe).estimate("later")
    write_jacobian(tmp_path / "lens.pt", found.mean, found.facts, model="hub:owner/name@abc")
    content = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert sorted(content["J"]) == content["source_layers"] == [0, 1]
    assert (content["n_prompts"], content["d_model"]) == (2, D)
    assert {j.dtype for j in content["J"].values()} == {torch.float16}
    assert content["metadata"]["model_name"] == "owner/name"
    assert content["metadata"]["model_revision"] == "abc"
    assert content["metadata"]["target_layer"] == L - 1
    assert content["metadata"]["relative_error"] == found.facts.relative_error
    again = read_jacobian(str(tmp_path / "lens.pt"))
    assert again.check(L, D, "hub:owner/name@abc") == ""
    assert again.layers == [0, 1, 2]
    states, _ = stream.forward(ids)
    for layer, matrix in again.matrices.items():
        exact, read = (stream.readout(states[layer] @ j.float().T).log_softmax(-1) for j in (found.mean[layer], matrix))
        assert (exact - read).abs().max() < 0.02
        scale = found.mean[layer].abs().max()
        assert (matrix - found.mean[layer]).abs().max() <= 2**-11 * scale


@pytest.mark.parametrize(
    ("change", "layers", "d", "model", "said"),
    [
        ({}, L, 16, "hub:a/b", "its width is 32, the model's 16"),
        ({}, 2, D, "hub:a/b", "the last of the model's 2 blocks"),
        ({"metadata": {"target_layer": 1}}, L, D, "hub:a/b", "output of block 1, not of the last one, 2"),
        ({"metadata": {"model_name": "x/gpt2"}}, L, D, "hub:a/b", "it names x/gpt2, this one is a/b"),
    ],
)
def test_a_lens_of_another_model_is_refused_in_one_line(tmp_path, change, layers, d, model, said):
    published(tmp_path / "lens.pt", **change)
    with pytest.raises(LensbenchError, match=said):
        read_jacobian(str(tmp_path / "lens.pt")).check(layers, d, model)


def test_names_are_compared_without_their_owner_and_only_of_the_hub(tmp_path):
    published(tmp_path / "lens.pt", metadata={"model_name": "gpt2"})
    found = read_jacobian(str(tmp_path / "lens.pt"))
    for model in ("hub:openai-community/gpt2@main", "hub:GPT2", "path:/somewhere", "package:other"):
        found.check(L, D, model)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("place", [{}, "metadata"])
@pytest.mark.parametrize(
    ("revision", "model", "commit", "said"),
    [
        (None, "hub:a/b", COMMIT, "does not say which revision"),
        (COMMIT, "hub:a/b", COMMIT, ""),
        (COMMIT[:8], "hub:a/b@main", COMMIT, ""),
        (COMMIT, f"hub:a/b@{COMMIT[:7]}", "", ""),
        ("step100", "hub:a/b@step100", COMMIT, ""),
        ("main", "hub:a/b", "", ""),
        (COMMIT, "hub:a/b", "", f"revision {COMMIT} of the model; which one is read here is unknown"),
        ("main", f"hub:a/b@{COMMIT}", COMMIT, "which one is read here is unknown"),
        ("main", "package:b", "", "which one is read here is unknown"),
    ],
)
def test_a_revision_of_the_model_is_checked_where_both_sides_know_one(tmp_path, place, revision, model, commit, said):
    recorded = {} if revision is None else {"model_revision": revision}
    published(tmp_path / "lens.pt", **({place: recorded} if place else recorded))
    found = read_jacobian(str(tmp_path / "lens.pt")).check(L, D, model, commit)
    assert said in found
    assert bool(found) == bool(said)


@pytest.mark.parametrize(
    ("revision", "model", "commit", "here"),
    [
        ("f" * 40, "hub:a/b", COMMIT, COMMIT),
        ("fffffff", f"hub:a/b@{COMMIT}", "", COMMIT),
        ("step100", "hub:a/b@step200", COMMIT, "step200"),
        ("step100", "hub:a/b", COMMIT, "main"),
    ],
)
def test_a_lens_of_another_revision_is_refused_in_one_line(tmp_path, revision, model, commit, here):
    published(tmp_path / "lens.pt", metadata={"model_revision": revision})
    with pytest.raises(
        LensbenchError, match=f"another revision of the model: {revision}, this one is {here}"
    ) as refused:
        read_jacobian(str(tmp_path / "lens.pt")).check(L, D, model, commit)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weights": 1}, "has neither"),
        ({"J": {}, "d_model": 4}, "no matrix"),
        ({"J": {0: torch.zeros(3, 4)}, "d_model": 3}, "not square"),
        ({"J": {0: torch.eye(3)}, "d_model": 4}, "it says d_model 4, its matrices are of width 3"),
        ({"J": {0: torch.full((2, 2), np.nan)}, "d_model": 2}, "NaN or infinite"),
        ({"jacobian_sum": {0: torch.eye(2)}, "n_done": 0}, "seen no prompt"),
        ({"J": {0: torch.eye(2)}, "d_model": 2, "metadata": {"estimator": "relevance"}}, "estimator 'relevance'"),
    ],
)
def test_a_file_that_is_no_jacobian_lens_is_refused_in_one_line(tmp_path, content, said):
    torch.save(content, tmp_path / "lens.pt")
    with pytest.raises(LensbenchError, match=said) as refused:
        read_jacobian(str(tmp_path / "lens.pt"))
    assert "\n" not in str(refused.value)


class Harmful:
    """What a file must not be able to run."""

    def __reduce__(self):
        return (print, ("run",))


def test_nothing_in_a_file_is_run(tmp_path, capsys):
    torch.save({"J": Harmful()}, tmp_path / "lens.pt")
    with pytest.raises(LensbenchError, match="cannot be loaded"):
        read_jacobian(str(tmp_path / "lens.pt"))
    assert "run" not in capsys.readouterr().out


def test_a_source_is_a_file_or_a_file_of_the_hub(tmp_path, monkeypatch):
    published(tmp_path / "lens.pt")
    asked = []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return str(tmp_path / "lens.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert jacobian_path("hub:owner/lenses/gpt2/x/lens.pt@v1") == tmp_path / "lens.pt"
    assert asked == [("owner/lenses", "gpt2/x/lens.pt", "v1")]
    assert jacobian_path("hub:EleutherAI/pythia") is None
    assert jacobian_path(f"path:{tmp_path}") is None
    for wrong in ("nowhere.pt", "hub:owner/lens.pt"):
        with pytest.raises(LensbenchError, match=wrong):
            jacobian_path(wrong)


def test_facts_say_how_it_was_estimated():
    facts = JacobianFacts(
        targets="later",
        method="exact",
        prompts=2,
        probes=0,
        positions=9,
        skip_first=16,
        skip_last=1,
        products=64,
        error=[],
    )
    assert JacobianFacts.model_validate_json(facts.model_dump_json()) == facts


@pytest.mark.parametrize(
    ("layers", "named", "said"),
    [
        ((-1, 0, 1), [-1, 0, 1], "layer -1: layers are outputs of blocks, numbered from 0"),
        ((0, 1), [1, 2], r"source_layers says \[1, 2\], its matrices are of layers \[0, 1\]"),
        ((0, 1), [0], r"source_layers says \[0\], its matrices are of layers \[0, 1\]"),
    ],
)
def test_layers_that_cannot_be_or_contradict_each_other_are_refused(tmp_path, layers, named, said):
    published(tmp_path / "lens.pt", layers, source_layers=named)
    with pytest.raises(LensbenchError, match=said):
        read_jacobian(str(tmp_path / "lens.pt"))
