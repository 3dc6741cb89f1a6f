"""All lenses of a model in one go, from a loaded model: every layer, the shared lens, every leave-one-out lens."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tuned_lens.nn.lenses import TunedLens

from benchmarks.speed.task import Ledger, Task, now, peak_memory
from lensbench.lenses.closed import fit_each, fit_shared
from lensbench.lenses.maps import AffineMaps
from lensbench.lenses.moments import Moments
from lensbench.lenses.recipe import FitRecipe
from lensbench.lenses.refine import refine
from lensbench.lenses.search import DevSearch, pad_direction
from lensbench.lenses.tuned import save_tuned_lens, tuned_lens
from lensbench.streams.capture import Capture, capture

FIT_TOKENS = 32_768
DEV_TOKENS = 512
RECIPE = FitRecipe(
    ridges=(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0),
    pads=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    pooled_dev_tokens=1024,
    refine_tokens=FIT_TOKENS,
    refine_passes=1,
)


def run(task: Task, held_out: dict[str, Capture], folder: Path, say: Callable[[str], None]) -> None:
    """``everything.csv`` (a row per lens) and ``everything-seconds.csv`` (a row per phase).

    The refined per-layer lenses are saved in tuned-lens's format, loaded by its own class and their KL measured again
    through its ``forward`` and ``log_softmax``: ``tuned_lens_kl``.
    """
    ledger = Ledger(folder / "everything.csv", ("lens", "stage"))
    phases = Ledger(folder / "everything-seconds.csv", ("phase",))
    if phases.has(phase="total"):
        return
    readout, layers = task.stream.readout, list(range(task.stream.layers))
    # The peak is the process's: what it was before tells whether the one below is this part's own.
    phases.add(phase="before", seconds=0.0, peak_gib=peak_memory())
    begin = last = now(task.device)

    def phase(name: str) -> None:
        nonlocal last
        here = now(task.device)
        phases.add(phase=name, seconds=here - last, peak_gib=peak_memory())
        say(f"everything: {name} in {here - last:.0f} s, {peak_memory():.1f} GiB at most so far")
        last = here

    windows = task.whole_windows(FIT_TOKENS // (task.length - 2))
    fit = capture(task.stream, windows, batch=2, memory_gib=RECIPE.memory_gib)
    dev = capture(task.stream, task.windows("dev", 32, DEV_TOKENS // 32, seed=7), batch=4)
    phase("states and read-out statistics")
    moments = Moments.of(fit)
    phase("second moments")
    search = DevSearch(readout, dev, RECIPE, pad_direction(readout, fit.states[-1]))
    own = fit_each(search, moments, "zero")
    phase("closed forms, every layer")
    shared = fit_shared(search, moments, layers)
    loo = [fit_shared(search, moments, [k for k in layers if k != j]) for j in layers]
    phase("closed forms, shared and every leave-one-out")
    refined = refine(
        search,
        fit,
        Moments.stack([moments, moments.pooled(layers)]),
        AffineMaps.stack([own.maps, shared.maps]),
        [*own.ridges, *shared.ridges],
        [*([j] for j in layers), layers],
    )
    phase("refinement, every layer and shared")
    phases.add(phase="total", seconds=last - begin, peak_gib=peak_memory())

    held = held_out["eval"]
    final = AffineMaps.stack([r.maps for r in refined])
    maps = AffineMaps(final.matrix[:-1].float(), final.offset[:-1].float())
    scratch = Path("runs/speed/tuned-lens")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    save_tuned_lens(tuned_lens(readout, maps, model_name=task.source), scratch)
    loaded = TunedLens.from_unembed_and_pretrained(readout, str(scratch))
    for j in layers:
        ledger.add(
            lens=j, stage="closed", eval_kl=task.kl(own.maps[[j]], j, held), ridge=own.ridges[j], pad=own.pads[j],
            logit_lens_kl=task.kl(AffineMaps.identity(task.stream.d_model), j, held),
        )  # fmt: skip
        ledger.add(
            lens=j, stage="refined", eval_kl=task.kl(final[[j]], j, held), ended=refined[j].ended,
            tuned_lens_kl=forward_kl(loaded, readout, held, j),
        )  # fmt: skip
        ledger.add(
            lens=f"without {j}", stage="closed", eval_kl=task.kl(loo[j].maps, j, held), ridge=loo[j].ridges[0],
            pad=loo[j].pads[0],
        )  # fmt: skip
    ledger.add(
        lens="shared", stage="closed", eval_kl=task.kl(shared.maps, "shared", held), ridge=shared.ridges[0],
        pad=shared.pads[0],
    )  # fmt: skip
    ledger.add(lens="shared", stage="refined", eval_kl=task.kl(final[[-1]], "shared", held), ended=refined[-1].ended)
    say(f"everything: {last - begin:.0f} s in all; measured on eval in {time.perf_counter() - last:.0f} s more")


@torch.no_grad()
def forward_kl(lens: TunedLens, readout: torch.nn.Module, captured: Capture, layer: int) -> float:
    """KL by definition, through tuned-lens's own forward pass."""
    total = 0.0
    for rows in torch.arange(len(captured)).split(256):
        log_p = readout(captured.states[-1][rows]).log_softmax(-1)
        log_q = lens(captured.states[layer][rows], idx=layer).log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return total / len(captured)
