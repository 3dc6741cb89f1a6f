"""One training loop for all model families: Muon and AdamW, warm-up and cosine decay, clipping, checkpoints.

Muon (orthogonalised momentum, scaled to AdamW's step size) updates the matrices between hidden states; AdamW updates
embeddings, convolutions, gains and other vectors. Both use one learning rate. With the few million tokens that a laptop can
train on, Muon needs fewer tokens for the same loss; every family is trained the same way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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


def checkpoint_folder(training: Path, tokens: int) -> Path:
    """The model that a training kept behind so many tokens, within the folder of the training."""
    return training / f"at-{tokens}"


@dataclass(frozen=True)
class StepReport:
    """What :func:`train` reports after a step."""

    step: int
    """Steps so far, from 1"""
    steps: int
    loss: float
    """Of the step's batch at the last layer, nats/token"""
    tokens: int
    """Tokens read since this process began or resumed training"""


def batch_of(stream: NDArray[np.int32], recipe: TrainingRecipe, seed: int, step: int) -> Tensor:
    """Token ids [batch, length] of a step: a function of seed and step, so that a resumed training sees the same ones."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(stream) - recipe.length + 1, recipe.batch)
    return torch.from_numpy(stream[starts[:, None] + np.arange(recipe.length)].astype(np.int64))


class SinglePrecisionMuon(torch.optim.Muon):
    """Muon that orthogonalises in the precision of the parameters, all matrices of one shape in one batch.

    torch's Muon orthogonalises in bfloat16, one matrix at a time. Without hardware for bfloat16 that takes a third of a
    training step of small models.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters by their gradients; the loss of ``closure``, where given."""
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
    """``U f(S) V^T`` of each matrix ``U S V^T`` of ``[K, m, n]``, by Newton-Schulz steps.

    f(S) lies between 0.7 and 1.2 where S is not tiny.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def optimizers_of(model: torch.nn.Module, recipe: TrainingRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embeddings (tied heads included) and all vectors."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    # GPT-2 has its matrices in another class, Conv1D.
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)} - embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if id(p) in linear]
    # Kernels of image convolutions are not matrices, but as large: they have weight decay too.
    kernels = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.requires_grad]
    taken = linear | {id(p) for p in kernels}
    others = [p for p in trained if id(p) not in taken]
    rate = recipe.learning_rate
    groups = [{"params": others, "weight_decay": 0.0}, {"params": kernels, "weight_decay": recipe.weight_decay}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, recipe.beta2))
    if not hidden:
        return [adamw]
    return [SinglePrecisionMuon(hidden, lr=rate, weight_decay=recipe.weight_decay), adamw]


def save_checkpoint(folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """Write ``checkpoint.safetensors`` atomically: parameters, the optimizers' moments and the step."""
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
    """The number of finished steps, 0 without a checkpoint; restores parameters and moments.

    Of several processes the first reads the file and sends it to the others. Raises :class:`LensbenchError` for a file
    that is damaged (its checksum is wrong) or belongs to another model.
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
    """The error to raise for a checkpoint that cannot be used."""
    return LensbenchError(f"checkpoint {path} is damaged or of another model ({error}); delete it to train anew")


TrainingBatch = Tensor | tuple[Tensor, Tensor]
"""Token ids [B, T], or images [B, C, H, W] with their classes [B]"""


def loss_of(
    model: PreTrainedModel, batch: TrainingBatch, readout: ReadOut | None, weight: float
) -> tuple[Tensor, Tensor]:
    """The objective and the last layer's loss: cross-entropy of the next token, or of the class, nats.

    With a ``readout`` (language models only) the objective adds ``weight`` times the mean cross-entropy of the model's norm
    and head at h_1..h_{L-1}. h_0 is left out: a tied embedding cannot be its own bigram table.
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
    if readout is None or len(output.hidden_states) < 3:  # a looped model may draw a single loop
        return last, last
    inner = [cross_entropy(readout(h)) for h in output.hidden_states[1:-1]]
    return last + weight * torch.stack(inner).mean(), last


def rows_of(batch: TrainingBatch, rows: slice, device: torch.device) -> TrainingBatch:
    """Some sequences or images of a batch, on ``device``."""
    if isinstance(batch, tuple):
        return batch[0][rows].to(device), batch[1][rows].to(device)
    return batch[rows].to(device)


def draw_step(model: PreTrainedModel, seed: int, step: int) -> None:
    """Let a model that changes from step to step draw what it does in this one.

    It has a method ``draw``, which takes a random generator. That of a step is the same in a resumed training and in every
    process, and differs from the one that draws the step's batch.
    """
    draw = getattr(model, "draw", None)
    if draw is not None:
        draw(np.random.default_rng([seed, step, 1]))


def backward(
    model: PreTrainedModel, batch: TrainingBatch, readout: ReadOut | None, recipe: TrainingRecipe, of: int, micro: int
) -> tuple[Tensor, Tensor, int]:
    """This batch's share of the objective and of the last layer's loss (:func:`loss_of`), and the largest piece that fits.

    The batch is a part of one of ``of`` sequences. It is computed in pieces of ``micro`` sequences, which are halved when
    memory runs out. Gradients are left in the parameters.
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
            # The next try is outside this block: the traceback holds the tensors of this one.
            shortage = error.with_traceback(None)
        if micro == 1:
            raise too_large("a training step", shortage)
        micro = (min(micro, count) + 1) // 2
        release_memory()


def share_gradients(model: PreTrainedModel, ranks: Ranks) -> None:
    """Replace each parameter's gradient by its sum over all processes, in one exchange."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    for p, part in zip(parameters, ranks.sum(flat).split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@torch.no_grad()
def where_not_finite(model: PreTrainedModel, batch: TrainingBatch, recipe: TrainingRecipe) -> tuple[str, str]:
    """The first place where the numbers of a step are not finite, and the likely cause."""
    lower = f"first try a learning_rate below {recipe.learning_rate:g}"
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
            grown = f"states grew to {largest:.2g} before it" if layer else "the embedding itself did"
            return f"the state after layer {layer} overflowed", f"{grown}: training diverges, {lower}"
        largest = float(h.abs().max())
    if not bool(torch.isfinite(output.logits).all()):
        return "the logits overflowed", f"the last state reaches {largest:.2g}: training diverges, {lower}"
    broken = [
        name for name, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())
    ]
    if broken:  # backpropagation starts at the last layer: the last name in the model's order broke first
        return f"the gradient of {broken[-1]} is not finite", f"states reach {largest:.2g}: {lower}"
    return (
        "states and logits are finite, but the loss or its gradient is not",
        f"losses this large mean divergence: {lower}",
    )


def refuse_short_stream(stream: NDArray[np.int32], length: int) -> None:
    """Raise :class:`LensbenchError` where the tokens to train on are fewer than a sequence has."""
    if len(stream) < length:
        raise LensbenchError(
            f"the train split has {len(stream)} tokens, fewer than one sequence of {length}; give a longer text"
        )


def train(
    model: PreTrainedModel,
    stream: NDArray[np.int32] | Callable[[int], TrainingBatch],
    recipe: TrainingRecipe,
    *,
    seed: int,
    checkpoints: Path,
    device: torch.device,
    report: Callable[[StepReport], None] | None = None,
    keep: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> PreTrainedModel:
    """The trained ``model``, in evaluation mode.

    ``stream``: token ids [n] of all documents joined, from which sequences are drawn, or a function from a step to its
    batch. Training resumes from the last checkpoint in ``checkpoints``; a resumed training ends with the same weights as
    one without interruption. A batch that does not fit into memory is halved until its pieces fit, and their gradients are
    averaged. Of several processes each takes its own sequences of every batch, and gradients are summed. ``report`` is
    called after every step. ``keep`` is called with each of the recipe's ``checkpoints`` while ``model`` is as it is behind
    so many tokens; it must not change it, nor draw random numbers. A resumed training may call it again.

    Raises :class:`LensbenchError` where the stream is shorter than a sequence, where one sequence does not fit into
    memory, and where the loss is no longer finite (with the step, the layer and the likely cause).
    """
    if not callable(stream):
        refuse_short_stream(stream, recipe.length)
    torch.nn.Module.to(model, device).train()
    readout = find_readout(model) if recipe.deep_supervision else None
    if recipe.read_out_alone:
        model.requires_grad_(False)
        find_readout(model).requires_grad_(True)
    optimizers = optimizers_of(model, recipe)
    start = load_checkpoint(checkpoints, model, optimizers, ranks)
    kept = {recipe.step_of(tokens): tokens for tokens in recipe.checkpoints}
    own = ranks.share(recipe.batch)
    micro = own.stop - own.start
    for step in range(start, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        draw_step(model, seed, step)
        batch = stream(step) if callable(stream) else batch_of(stream, recipe, seed, step)
        mine = rows_of(batch, own, device)
        loss, last, micro = backward(model, mine, readout, recipe, recipe.batch, micro)
        if ranks.size > 1:
            loss, last = ranks.sum(torch.stack([loss, last]))
            share_gradients(model, ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            where, cause = where_not_finite(model, mine, recipe)
            raise LensbenchError(
                f"the training loss is {loss.item():g} at step {step + 1} of {recipe.steps}, the norm of its gradient "
                f"{norm.item():g}: {where}; {cause} (last good checkpoint kept)"
            )
        # Not earlier: only this loss and gradient show that the last step's weights are good.
        if ranks.first and keep is not None and step in kept:
            keep(kept[step])
        if ranks.first and step > start and step % recipe.checkpoint_every == 0:
            save_checkpoint(checkpoints, model, optimizers, step)
        for optimizer in optimizers:
            optimizer.step()
        if report is not None:
            report(StepReport(step + 1, recipe.steps, last.item(), (step + 1 - start) * recipe.batch * recipe.length))
    model.requires_grad_(True).eval()
    return model
