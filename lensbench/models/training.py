"""One plain training loop for every model trained here: Muon and AdamW, warm-up and cosine decay, clipping, checkpoints.

Matrices between hidden states are moved by Muon (orthogonalised momentum, scaled to AdamW's step size), embeddings,
convolutions, gains and other vectors by AdamW, both at one learning rate. At the few million tokens that fit on a laptop
Muon is worth a factor in tokens; it is the same for every family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lensbench.data.recipe import TrainingRecipe
from lensbench.errors import LensbenchError
from lensbench.runtime.memory import is_out_of_memory, release_memory, too_large
from lensbench.runtime.ranks import ALONE, Ranks
from lensbench.runtime.sealed import Damaged, load_sealed, save_sealed
from lensbench.streams.parts import find_readout
from lensbench.streams.readout import ReadOut


@dataclass(frozen=True)
class StepReport:
    """What the loop tells its caller after a step; the loss is the batch's, in nats/token."""

    step: int
    steps: int
    loss: float
    tokens: int


def batch_of(stream: np.ndarray, recipe: TrainingRecipe, seed: int, step: int) -> Tensor:
    """Token ids [batch, length] of a step: a function of seed and step alone, so that a resumed run sees the same."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(stream) - recipe.length + 1, recipe.batch)
    return torch.from_numpy(stream[starts[:, None] + np.arange(recipe.length)].astype(np.int64))


class SinglePrecisionMuon(torch.optim.Muon):
    """torch's Muon with the orthogonalisation in the parameters' own precision, equal shapes in one batch.

    torch's own is made in bfloat16, matrix by matrix: without hardware for it a third of a step of the models here.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            params: list[Tensor] = []
            gradients: list[Tensor] = []
            kept: list[Tensor] = []
            self._init_group(group, params, gradients, kept)
            alike: dict[tuple[int, int], list[int]] = {}
            for k, p in enumerate(params):
                kept[k].lerp_(gradients[k], 1 - momentum)
                alike.setdefault((p.shape[0], p.shape[1]), []).append(k)
            for shape, members in alike.items():
                moved = torch.stack([kept[k] for k in members])
                if group["nesterov"]:
                    moved = torch.stack([gradients[k] for k in members]).lerp(moved, momentum)
                update = orthogonalised(moved, group["ns_coefficients"], group["ns_steps"], group["eps"])
                scale = 0.2 * max(shape) ** 0.5  # the size of AdamW's steps (arXiv 2502.16982, equation 4)
                for k, change in zip(members, update, strict=True):
                    params[k].mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate * scale)
        return loss


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """``U f(S) V^T`` of each of ``[K, m, n]`` by Newton-Schulz steps, f about 1 (0.7 to 1.2) where S is not tiny."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def optimizers_of(model: torch.nn.Module, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embeddings (also as a tied head) and all vectors."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    # GPT-2 keeps its matrices in a class of its own.
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)} - embeddings
    hidden = [p for p in model.parameters() if id(p) in linear]
    # Not matrices, but as many numbers: kernels of images' convolutions decay as matrices do.
    kernels = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    taken = linear | {id(p) for p in kernels}
    others = [p for p in model.parameters() if id(p) not in taken]
    rate = recipe.learning_rate
    groups = [{"params": others, "weight_decay": 0.0}, {"params": kernels, "weight_decay": recipe.weight_decay}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, recipe.beta2))
    if not hidden:
        return [adamw]
    return [SinglePrecisionMuon(hidden, lr=rate, weight_decay=recipe.weight_decay), adamw]


def save_checkpoint(folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write ``checkpoint.safetensors`` in one atomic move: parameters, the optimizers' moments and the step."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_sealed(tensors, folder / "checkpoint.safetensors", {"step": str(step)})


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], ranks: Ranks = ALONE
) -> int:
    """Restore parameters and moments; the number of finished steps (0 where there is no checkpoint).

    Of several processes the first one reads and tells the others. Raises :class:`LensbenchError` for a file that is
    damaged (its checksum tells) or belongs to another model.
    """
    path = folder / "checkpoint.safetensors"

    def read() -> tuple[dict[str, Tensor], int] | None:
        if not path.exists():
            return None
        try:
            tensors, facts = load_sealed(path)
            return tensors, int(facts["step"])
        except (Damaged, KeyError, ValueError) as error:
            raise unusable(path, error) from error

    found = ranks.agreed(read)
    if found is None:
        return 0
    tensors, step = found
    try:
        shapes = {name.removeprefix("model."): t.shape for name, t in tensors.items() if name.startswith("model.")}
        if shapes != {name: p.shape for name, p in model.named_parameters()}:
            raise ValueError("it holds parameters of other names or shapes")
        owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
                prefix = f"optimizer.{name}."
                moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                muon = isinstance(owner[id(p)], torch.optim.Muon)
                if set(moments) != ({"momentum_buffer"} if muon else {"step", "exp_avg", "exp_avg_sq"}):
                    raise ValueError(f"the moments of {name} are not complete")
                # AdamW counts its steps on the CPU wherever the parameters are.
                owner[id(p)].state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise unusable(path, error) from error
    return step


def unusable(path: Path, error: Exception) -> LensbenchError:
    return LensbenchError(f"checkpoint {path} is damaged or of another model ({error}); delete it to train anew")


Batch = Tensor | tuple[Tensor, Tensor]
"""Token ids [B, T], or images [B, C, H, W] with their classes [B]"""


def loss_of(model: PreTrainedModel, batch: Batch, readout: ReadOut | None, weight: float) -> tuple[Tensor, Tensor]:
    """What is minimised, and the last layer's part of it: next-token cross-entropy, or that of the class, nats.

    With a ``weight`` (of language models alone) the first adds ``weight`` times the mean cross-entropy of the model's own
    norm and head at h_1..h_{L-1}; h_0 is left out: a tied embedding cannot be its own bigram table.
    """
    if isinstance(batch, tuple):
        images, classes = batch
        loss = F.cross_entropy(model(pixel_values=images).logits.float(), classes)
        return loss, loss
    ids = batch
    output = model(ids, output_hidden_states=readout is not None)

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    last = cross_entropy(output.logits)
    if readout is None:
        return last, last
    inner = [cross_entropy(readout(h)) for h in output.hidden_states[1:-1]]
    return last + weight * torch.stack(inner).mean(), last


def rows_of(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Some sequences, or images, of a batch."""
    if isinstance(batch, tuple):
        return batch[0][rows].to(device), batch[1][rows].to(device)
    return batch[rows].to(device)


def backward(
    model: PreTrainedModel, batch: Batch, readout: ReadOut | None, recipe: TrainingRecipe, of: int, micro: int
) -> tuple[Tensor, Tensor, int]:
    """Gradients of a batch that is part of one of ``of`` sequences, in pieces of ``micro`` sequences.

    The part's share of what is minimised and of the last layer's loss (:func:`loss_of`), and the largest piece that fits.
    """
    count = len(batch[0] if isinstance(batch, tuple) else batch)
    while True:
        model.zero_grad(set_to_none=True)
        shortage: BaseException | None = None
        try:
            total: Tensor | None = None
            for start in range(0, count, micro):
                piece = rows_of(batch, slice(start, start + micro), model.device)
                share = len(piece[0] if isinstance(piece, tuple) else piece) / of
                both = loss_of(model, piece, readout, recipe.deep_supervision)
                (both[0] * share).backward()
                shares = torch.stack([loss.detach() * share for loss in both])
                total = shares if total is None else total + shares
            assert total is not None
            return total[0], total[1], micro
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # The next try is outside: the traceback holds the tensors of this one.
            shortage = error.with_traceback(None)
        if micro == 1:
            raise too_large("a training step", shortage)
        micro = (min(micro, count) + 1) // 2
        release_memory()


def share_gradients(model: PreTrainedModel, ranks: Ranks) -> None:
    """Each parameter's gradient becomes the sum over processes, all in one exchange."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p, part in zip(parameters, ranks.sum(flat).split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@torch.no_grad()
def what_is_not_finite(model: PreTrainedModel, batch: Batch, recipe: TrainingRecipe) -> tuple[str, str]:
    """Where a step's numbers stopped being finite, and the likely cause, for whoever trains."""
    lower = f"a lower learning_rate than {recipe.learning_rate:g} would be the first thing to try"
    if isinstance(batch, tuple) and not bool(torch.isfinite(batch[0]).all()):
        return "the images hold NaN or infinity", "look at the data"
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            return f"the weights {name} are not finite", f"the step before was too large: {lower}"
    given = {"pixel_values": batch[0]} if isinstance(batch, tuple) else {"input_ids": batch}
    output = model(**given, output_hidden_states=True)
    largest = 0.0
    for layer, h in enumerate(output.hidden_states):
        if not bool(torch.isfinite(h).all()):
            grown = f"states grew to {largest:.2g} in front of it" if layer else "the embedding's own values did"
            return f"the state behind layer {layer} overflowed", f"{grown}: training diverges, {lower}"
        largest = float(h.abs().max())
    if not bool(torch.isfinite(output.logits).all()):
        return "the logits overflowed", f"the last state's values go up to {largest:.2g}: training diverges, {lower}"
    broken = [
        name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    if broken:  # gradients come from the last layer down: the last of them in the model's order was first
        return f"the gradient of {broken[-1]} is not finite", f"states go up to {largest:.2g}: {lower}"
    return (
        "states and logits are finite, their loss or its gradient is not",
        f"losses this large mean divergence: {lower}",
    )


def train(
    model: PreTrainedModel,
    stream: np.ndarray | Callable[[int], Batch],
    recipe: TrainingRecipe,
    *,
    seed: int,
    checkpoints: Path,
    device: torch.device,
    report: Callable[[StepReport], None] | None = None,
    ranks: Ranks = ALONE,
) -> PreTrainedModel:
    """Train ``model`` on ``stream`` and return it in evaluation mode.

    ``stream``: token ids [n], documents joined, that windows are drawn from; or what gives a step's batch.
    Resumes from the last checkpoint in ``checkpoints``; a resumed run ends with the same weights as an undisturbed one.
    A batch that does not fit into memory is gone through in halves (and halves of these), its gradient being their mean;
    of several processes each takes its own sequences of every batch, and gradients are added up.
    Raises :class:`LensbenchError` where the stream is shorter than a sequence, where one sequence does not fit into memory,
    and where the loss is no longer finite, with the step, the layer and the likely cause.
    """
    if not callable(stream) and len(stream) < recipe.length:
        raise LensbenchError(
            f"the train split has {len(stream)} tokens, fewer than one sequence of {recipe.length}; give a longer text"
        )
    torch.nn.Module.to(model, device).train()
    readout = find_readout(model) if recipe.deep_supervision else None
    model.requires_grad_(True)  # finding the read-out froze norm and head, which is what lenses need
    optimizers = optimizers_of(model, recipe)
    start = load_checkpoint(checkpoints, model, optimizers, ranks)
    own = ranks.share(recipe.batch)
    micro = own.stop - own.start
    for step in range(start, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        batch = stream(step) if callable(stream) else batch_of(stream, recipe, seed, step)
        mine = rows_of(batch, own, device)
        loss, last, micro = backward(model, mine, readout, recipe, recipe.batch, micro)
        if ranks.size > 1:
            loss, last = ranks.sum(torch.stack([loss, last]))
            share_gradients(model, ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            where, cause = what_is_not_finite(model, mine, recipe)
            raise LensbenchError(
                f"the training loss is {loss.item():g} at step {step + 1} of {recipe.steps}, the norm of its gradient "
                f"{norm.item():g}: {where}; {cause} (last good checkpoint kept)"
            )
        if ranks.first and step > start and step % recipe.checkpoint_every == 0:
            # Only now is it known that the last step's weights give a finite loss and gradient.
            save_checkpoint(checkpoints, model, optimizers, step)
        for optimizer in optimizers:
            optimizer.step()
        if report is not None:
            report(StepReport(step + 1, recipe.steps, last.item(), (step + 1 - start) * recipe.batch * recipe.length))
    return model.eval()
