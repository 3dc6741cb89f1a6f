"""Ridge solutions without eigenvectors, in float64 and refined from float32, and where their matrices lie."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fitting import random_capture

from lensbench.errors import LensbenchError
from lensbench.lenses import room
from lensbench.lenses.algebra import ACCURATE, ridge_unit, right_divided
from lensbench.lenses.fit import fit
from lensbench.lenses.maps import AffineMaps, TurnedMap
from lensbench.lenses.moments import CPU, Moments, RotatedMoments
from lensbench.lenses.planning import FitContext, matrices
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.ridge import RidgePath
from lensbench.lenses.room import FILE, MatrixFile, spilling
from lensbench.runtime.sealed import write_tensors
from lensbench.runtime.stages import Pieces
from lensbench.streams.rotated import RotatedView

RECIPE = FitRecipe(
    ridges=(0.01, 0.1, 1.0), pads=(0.0, 0.4), layers=3, rotations=2, pair_rotations=1, refits=2, refine_passes=1,
    refine_tokens=64, refine_vocabulary=16,
)  # fmt: skip


def covariance(d: int, decades: float, seed: int = 0) -> np.ndarray:
    """A covariance whose eigenvalues fall evenly over so many decades, in a random basis."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return (basis * 10 ** np.linspace(0, -decades, d)) @ basis.T


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("decades", [0, 3, 5])
def test_solutions_are_those_of_numpy_whether_factors_are_float64_or_float32(mixed, decades):
    matrix, numerator = covariance(40, decades), np.random.default_rng(1).normal(size=(40, 40))
    found = right_divided(torch.from_numpy(numerator), torch.from_numpy(matrix), mixed=mixed).numpy()
    expected = numerator @ np.linalg.inv(matrix)
    np.testing.assert_allclose(found, expected, rtol=0, atol=10**decades * 1e-9)
    residual = np.linalg.norm(found @ matrix - numerator, axis=1)
    scale = np.linalg.norm(matrix, 2) * np.linalg.norm(found, axis=1) + np.linalg.norm(numerator, axis=1)
    assert (residual / scale).max() < ACCURATE


def test_what_float32_cannot_factor_or_refine_is_solved_in_float64():
    matrix, numerator = covariance(40, 11), np.random.default_rng(1).normal(size=(40, 40))
    exact, mixed = (
        right_divided(torch.from_numpy(numerator), torch.from_numpy(matrix), mixed=m) for m in (False, True)
    )
    assert torch.equal(exact, mixed)


def test_a_matrix_that_rounding_leaves_without_a_factor_is_still_solved():
    """Rank 3 of 12, and a ridge below the rounding error: the readings of states that occur are right."""
    states = np.random.default_rng(0).normal(size=(500, 3)) @ np.random.default_rng(1).normal(size=(3, 12))
    target = states @ np.random.default_rng(2).normal(size=(12, 12))
    matrix, cross = states.T @ states / 500, target.T @ states / 500
    shifted = torch.from_numpy(matrix - 1e-15 * np.eye(12))
    assert int(torch.linalg.cholesky_ex(shifted)[1])
    solution = right_divided(torch.from_numpy(cross), shifted).numpy()
    np.testing.assert_allclose(states @ solution.T, target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("null", [0, 7])
def test_the_unit_is_the_median_eigenvalue_of_what_is_not_null(null):
    values = np.r_[np.zeros(null), 10.0 ** np.arange(-3, 4)]
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(len(values), len(values))))[0]
    assert ridge_unit(torch.from_numpy((basis * values) @ basis.T), CPU) == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("prior", ["zero", "identity"])
def test_solutions_are_those_of_the_normal_equations(prior):
    _, captured = random_capture()
    states = captured.states.numpy().astype(np.float64)
    h, goal = (x - x.mean(0) for x in (states[1], states[-1]))
    matrix, cross = h.T @ h / len(h), goal.T @ h / len(h)
    ridge = 0.3 * np.sort(np.linalg.eigvalsh(matrix))[(len(matrix) - 1) // 2]
    numerator = cross + ridge * np.eye(len(matrix)) * (prior == "identity")
    expected = numerator @ np.linalg.inv(matrix + ridge * np.eye(len(matrix)))
    found = RidgePath(Moments.of(captured).layer([1]), prior).solve(0.3)
    np.testing.assert_allclose(found.matrix[0].numpy(), expected, rtol=1e-8, atol=1e-10)
    offset = states[-1].mean(0) - expected @ states[1].mean(0)
    np.testing.assert_allclose(found.offset[0].numpy(), offset, rtol=1e-8, atol=1e-10)


def test_moments_of_a_view_pool_to_those_of_its_rotated_states_kept_or_not(tmp_path):
    _, captured = random_capture()
    moments = Moments.of(captured)
    view = RotatedView.random(moments.covariance, seed=3, variance=0.9)
    turned = (view.maps @ captured.states[:-1].double().mT).mT.numpy()
    both = np.concatenate([turned[0], turned[2]])
    expected = np.cov(both.T, bias=True)
    lazy, kept = (RotatedMoments(moments, view) for _ in range(2))
    kept.know([0, 2], MatrixFile(tmp_path / FILE, 4 * expected.size))
    for rotated in (lazy, kept, moments.rotated(view)):
        np.testing.assert_allclose(rotated.pooled([0, 2]).covariance[0].numpy(), expected, rtol=1e-6, atol=1e-8)
    assert lazy.layer([2]).unit(0) == moments.unit(2)  # a rotation leaves eigenvalues


@pytest.mark.parametrize("tokens", [3, 200])
def test_a_turned_map_reads_plain_states_as_the_map_reads_rotated_ones(tokens):
    _, captured = random_capture()
    view = RotatedView.random(Moments.of(captured).covariance, seed=3, variance=1.0)
    d = captured.states.shape[-1]
    maps = AffineMaps(torch.randn(1, d, d, dtype=torch.float64), torch.randn(1, d, dtype=torch.float64))
    h = captured.states[1][:tokens].double()
    expected = h.numpy() @ view.maps[1].numpy().T @ maps.matrix[0].numpy().T + maps.offset[0].numpy()
    np.testing.assert_allclose(TurnedMap(maps, view, [0, 1]).read(1, h).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_a_fit_in_files_is_the_fit_in_memory_and_its_file_has_the_stated_size(tmp_path):
    readout, captured = random_capture(vocab=30, dtype=torch.float32)
    kept = fit(
        FitContext.of(readout, captured, captured, RECIPE, seed=0, pieces=Pieces(tmp_path / "pieces", mapped=True))
    )
    plain = fit(FitContext.of(readout, captured, captured, RECIPE, seed=0))
    d = captured.states.shape[-1]
    assert (tmp_path / "pieces" / FILE).stat().st_size == 8 * d * d * matrices(RECIPE, captured.layers)
    assert set(kept.lenses) == set(plain.lenses)
    for lens, one in kept.lenses.items():
        assert torch.equal(one.maps.matrix, plain[lens].maps.matrix), lens
        assert torch.equal(one.maps.offset, plain[lens].maps.offset), lens
    for folder, fitted in ((tmp_path / "a", kept), (tmp_path / "b", plain)):
        folder.mkdir()
        fitted.save(folder)
    assert (tmp_path / "a" / "maps.safetensors").read_bytes() == (tmp_path / "b" / "maps.safetensors").read_bytes()


def test_tensors_are_written_one_by_one_as_safetensors_writes_them(tmp_path):
    tensors = {"b.matrix": torch.randn(3, 4, 4), "a": torch.randn(5), "b": torch.zeros(0, 2), "ü": torch.randn(2, 3)}
    write_tensors({**tensors, "a": tensors["a"].double()}, tmp_path / "one.safetensors")
    save_file(tensors, tmp_path / "other.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    assert all(torch.equal(v, tensors[k]) for k, v in load_file(tmp_path / "one.safetensors").items())


def test_large_arrays_lie_in_files_that_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = []
    monkeypatch.setattr(room, "MatrixFile", lambda *how: made.append(how) or MatrixFile(*how))
    small, large = spilling(1.0)((2, 3)), spilling(1e-9)((2, 3))
    large[:] = torch.arange(6.0).view(2, 3)
    assert len(made) == 1
    assert not list(tmp_path.iterdir())
    assert small.shape == large.shape == (2, 3)
    assert large.sum() == 15


def test_a_file_that_finds_no_room_on_disk_is_refused_in_a_line(tmp_path):
    with pytest.raises(
        LensbenchError,
        match=r"the disk is full: moments and maps take [0-9.]+ GiB, and .* free; take a larger disk",
    ):
        MatrixFile(tmp_path / FILE, 10**15)
