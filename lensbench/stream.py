"""The residual stream of any causal LM: h_0..h_L before the final norm, the generic read-out, and the rotated view.

Everything downstream sees a model only through :class:`ResidualStream` and what :func:`capture` reads off it.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from tuned_lens.nn.unembed import Unembed

from lensbench.corpus import Windows
from lensbench.errors import LensbenchError

IDENTITY_TOLERANCE = 1e-4
"""Largest relative error, in float32, between reading out h_L and the model's own logits."""


class ReadOut(Unembed):
    """``R(h) = head(norm(h))``, found by hooks instead of by a list of classes; usable wherever tuned-lens wants an Unembed.

    ``final_norm`` maps ``[..., d]`` to ``[..., d_read]`` and ``unembedding`` maps that to logits ``[..., V]``, multiplied by
    ``scale`` and bent by ``softcap tanh(. / softcap)`` where the model does so. The modules are the model's own (never
    copied), frozen.
    """

    def __init__(self, final_norm: nn.Module, unembedding: nn.Linear, scale: float = 1.0, softcap: float | None = None):
        nn.Module.__init__(self)  # Unembed's own constructor knows seven architectures and copies the weights
        self.final_norm = final_norm
        self.unembedding = unembedding
        self.scale, self.softcap = scale, softcap
        self.product_dtype: torch.dtype | None = None  # of log-partitions on a GPU; None: that of the states
        self.requires_grad_(False)
        self._scaled: tuple[Tensor, Tensor | None] | None = None
        self._gains: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}

    @property
    def linear(self) -> bool:
        """Whether logits are affine in ``norm(h)``, so that ``e = W^T p`` says all about the model's distribution."""
        return self.softcap is None

    @property
    def weight(self) -> Tensor:
        """Unembedding W with the scale of the logits folded in, ``[V, d_read]``."""
        return self.unembedding.weight if self.scale == 1 else self._folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the unembedding with the scale of the logits folded in, ``[V]``."""
        return self.unembedding.bias if self.scale == 1 else self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.unembedding.weight, self.unembedding.bias
        if self._scaled is None or self._scaled[0].device != weight.device or self._scaled[0].dtype != weight.dtype:
            self._scaled = weight * self.scale, None if bias is None else bias * self.scale
        return self._scaled

    def cap_(self, logits: Tensor) -> Tensor:
        """Soft-capping in place, where the model has it."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, n: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normalised states ``[..., d_read]``."""
        scaled = F.linear(n, self.weight, self.bias)
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``[..., V]`` of states ``[..., d]``."""
        return self.logits(self.final_norm(h))

    def gain(self, d: int) -> Tensor | None:
        """Matrix G ``[d_read, d]`` with ``norm(x) = G x / scale(x) + norm(0)``, up to a constant; None if there is none.

        Read off the norm's answers to unit vectors, so that RMSNorm, LayerNorm, norms without gain and norms that look at
        a part of the state need no case of their own. The claim is checked on random states before it is used.
        """
        weight = self.unembedding.weight
        key = d, weight.dtype, weight.device
        if key not in self._gains:
            self._gains[key] = self._find_gain(d, weight.dtype, weight.device)
        return self._gains[key]

    def _find_gain(self, d: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        offset = self.final_norm(torch.zeros(d, dtype=dtype, device=device))
        # Long vectors, so that the norm's epsilon does not count; unseen directions map to the offset itself.
        gain = (self.final_norm(1e3 * torch.eye(d, dtype=dtype, device=device)) - offset).T
        x = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        cosine = F.cosine_similarity(x @ gain.T, self.final_norm(x) - offset, dim=-1)
        return gain if bool((cosine > 1 - 1e-4).all()) else None


class ResidualStream:
    """h_0..h_L of a causal LM, verified on load to read out to the model's own logits.

    ``view="state"`` is everything that the blocks hand on; ``view="prediction"`` keeps the leading ``d_read`` entries,
    those that norm and head see (for the predictive-coding LM: z alone).
    """

    def __init__(self, model: PreTrainedModel, view: str = "state"):
        if view not in ("state", "prediction"):
            raise LensbenchError(f"unknown view {view!r}; there are 'state' and 'prediction'")
        refuse_non_finite(model)
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.readout = find_readout(model)
        self.view = view
        ids = torch.randint(0, self.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(self.device)
        heads: list[Tensor] = []
        hook = self.readout.unembedding.register_forward_hook(lambda _, args, output: heads.append(output))
        try:
            hidden, last, logits = self._outputs(ids)
        finally:
            hook.remove()
        self.readout.scale, self.readout.softcap = behind_the_head(heads[-1], logits, model.config)
        if not any(state.shape == hidden[-1].shape and torch.allclose(state, hidden[-1], rtol=1e-3, atol=1e-4)
                   for state in (last, self.readout.final_norm(last))):  # fmt: skip
            raise LensbenchError(
                f"what {type(model).__name__} hands its final norm is not its last hidden state: it does more to the "
                "stream behind its blocks than norm and head, and lensbench would read the wrong states"
            )
        states, logits = self.forward(ids)
        self.layers, self.d_model = len(states) - 1, states.shape[-1]
        error = ((self.readout(states[-1]) - logits).abs().max() / logits.abs().max()).item()
        if not error < IDENTITY_TOLERANCE:
            raise LensbenchError(
                f"reading out h_L of {type(model).__name__} does not give its own logits (relative error {error:.1e}, "
                f"allowed {IDENTITY_TOLERANCE:.0e}): something stands behind its norm and head that lensbench does not see"
            )

    @property
    def vocab_size(self) -> int:
        return self.readout.weight.shape[0]

    @torch.no_grad()
    def at(self, ids: Tensor, rows: Tensor, columns: Tensor, *, read_out: bool = True) -> tuple[Tensor, Tensor]:
        """States ``[L+1, n, d]`` and logits ``[n, V]`` at n positions of token ids ``[B, T]``; the head reads no others.

        With ``read_out=False`` the head reads none at all, and the logits are ``[0, V]``.
        """

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
            return args[0][rows, columns][None] if read_out else args[0][:1, :0]

        hook = self.readout.unembedding.register_forward_pre_hook(keep)
        try:
            hidden, last, logits = self._outputs(ids)
        finally:
            hook.remove()
        states = torch.stack([h[rows, columns] for h in (*hidden[:-1], last)])
        if self.view == "prediction":
            states = states[..., : self.readout.weight.shape[1]]
        return states, logits[0]

    @torch.no_grad()
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[L+1, B, T, d]`` and the model's logits ``[B, T, V]`` for token ids ``[B, T]``, in one forward pass."""
        hidden, last, logits = self._outputs(ids)
        # Most models report the last state behind the norm; the norm's last input is h_L in all of them.
        states = torch.stack([*hidden[:-1], last])
        if self.view == "prediction":
            states = states[..., : self.readout.weight.shape[1]]
        return states, logits

    @torch.no_grad()
    def _outputs(self, ids: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The model's reported hidden states, its final norm's last input, and its logits."""
        norm_inputs: list[Tensor] = []
        hook = self.readout.final_norm.register_forward_pre_hook(lambda _, args: norm_inputs.append(args[0]))
        try:
            output = self.model(input_ids=ids, output_hidden_states=True, return_dict=True)
        finally:
            hook.remove()
        return output.hidden_states, norm_inputs[-1], output.logits


def behind_the_head(head: Tensor, logits: Tensor, config: object) -> tuple[float, float | None]:
    """What a model does to its head's output to get its logits: ``(scale, soft cap)``, (1, None) for nothing.

    The cap's size stands in the config; whether it is applied, and the scale, are read off the numbers. The identity
    check that follows refuses a model that does something else.
    """
    if torch.equal(head, logits):
        return 1.0, None

    def ratio(bent: Tensor) -> float | None:
        large = head.abs() > 0.1 * head.abs().max()
        found = (bent / head)[large]
        middle = found.median()
        same = bool(((found - middle).abs() < 1e-3 * middle.abs()).all())
        return float(middle.double()) if same and float(middle) > 0 else None

    scale = ratio(logits)
    if scale is not None:
        return round(scale, 9), None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    if cap:
        scale = ratio(cap * torch.atanh((logits.double() / cap).clamp(-1 + 1e-9, 1 - 1e-9)))
        if scale is not None:
            return (1.0 if abs(scale - 1) < 1e-4 else scale), float(cap)
    return 1.0, None


def refuse_non_finite(model: nn.Module) -> None:
    """Raise :class:`LensbenchError` naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise LensbenchError(
                f"the model's weight {name} holds NaN or infinite values; load an undamaged checkpoint"
            )


@torch.no_grad()
def find_readout(model: PreTrainedModel) -> ReadOut:
    """The final norm and head: the head's input is the output of the norm, whatever their classes are called.

    Raises :class:`LensbenchError` for a model without a linear head on top.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise LensbenchError(f"{type(model).__name__} is an encoder-decoder: lensbench reads causal language models")
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise LensbenchError(
            f"{type(model).__name__} has no linear output embedding: lensbench reads causal language models"
        )
    produced: list[tuple[Tensor, nn.Module]] = []
    head_inputs: list[Tensor] = []

    def remember(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            produced.append((output, module))

    hooks = [m.register_forward_hook(remember) for m in model.modules() if m is not head]
    hooks.append(head.register_forward_pre_hook(lambda _, args: head_inputs.append(args[0])))
    try:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not head_inputs:
        raise LensbenchError(f"{type(model).__name__} never calls its output embedding; lensbench cannot read it")
    for output, module in produced:
        # The same numbers in the same memory: models hand the head a slice of what the norm returned.
        if output.data_ptr() == head_inputs[-1].data_ptr() and output.shape == head_inputs[-1].shape:
            return ReadOut(module, head)
    raise LensbenchError(
        f"no module of {type(model).__name__} produces its head's input: it has no final norm, which is not supported"
    )


@dataclass(frozen=True)
class Capture:
    """What the lenses need to know of N tokens of a stream; float32, on one device.

    Every array's token axis is the same N positions, in the order of the windows they came from.
    """

    states: Tensor  # [L+1, N, d]
    expected: Tensor  # [N, d_read]: e = W^T p
    # Where logits are soft-capped, sum p log p alone.
    entropy_term: Tensor  # [N]: sum p log p - sum p bias: KL(p || q) = entropy_term - e.n + logsumexp(W n + bias)
    targets: Tensor  # [N]: the next token's id
    top: Tensor  # [N]: the model's own most probable next token
    model_ce: Tensor  # [N]: the model's own cross-entropy, nats
    mean_p: Tensor  # [V]: mean of p over the N tokens
    constant_kl: Tensor  # [N]: KL of p from the best constant distribution, that of the fitting tokens
    window: np.ndarray  # [N]: row of the windows
    document: np.ndarray  # [N]: index of the document, the cluster of every interval
    target_bytes: np.ndarray  # [N]: bytes of text that the next token stands for

    @property
    def layers(self) -> int:
        return len(self.states) - 1

    def __len__(self) -> int:
        return self.states.shape[1]

    def take(self, tokens: Tensor) -> "Capture":
        """The given tokens (indices or mask [N]) alone; ``mean_p`` stays that of all."""
        at = tokens.cpu().numpy()
        return Capture(
            self.states[:, tokens], self.expected[tokens], self.entropy_term[tokens], self.targets[tokens],
            self.top[tokens], self.model_ce[tokens], self.mean_p, self.constant_kl[tokens], self.window[at],
            self.document[at], self.target_bytes[at],
        )  # fmt: skip


@torch.no_grad()
def capture(
    stream: ResidualStream,
    windows: Windows,
    *,
    constant: Tensor | None = None,
    batch: int = 16,
    memory_gib: float = float("inf"),
    report: Callable[[int, int], None] | None = None,
) -> Capture:
    """One forward pass per batch of windows, kept at the chosen positions only.

    States that would take more than ``memory_gib`` GiB lie in a memory-mapped file of just their size, in the folder for
    temporary files (``TMPDIR``), which is gone when they are.

    ``constant`` ``[V]`` is the distribution that ``constant_kl`` is measured from: ``mean_p`` of the fitting tokens. Left
    out, it is that of the captured tokens themselves. ``report(done, total)`` is called with numbers of windows.
    """
    weight, bias = stream.readout.weight, stream.readout.bias
    expected, entropy, targets, top, ce, constant_kl = [], [], [], [], [], []
    states, done = torch.empty(0), 0
    log_constant = None if constant is None else constant.double().clamp(min=1e-300).log().float().to(stream.device)
    mean_p = torch.zeros(stream.vocab_size, dtype=torch.float64, device=stream.device)
    total = len(windows.ids)
    for start in range(0, total, batch):
        rows = slice(start, min(start + batch, total))
        ids = torch.from_numpy(windows.ids[rows]).to(stream.device)
        row, column = np.nonzero(windows.valid[rows])
        at = torch.from_numpy(windows.positions[rows][row, column]).to(stream.device)
        row_at = torch.from_numpy(row).to(stream.device)
        h, logits = stream.at(ids, row_at, at)
        logits = logits.float()  # [n, V]
        target = ids[row_at, at + 1]
        log_z = logits.logsumexp(-1, keepdim=True)
        top.append(logits.argmax(-1))
        ce.append((log_z - logits.gather(-1, target[:, None]))[:, 0])
        p = logits.sub_(log_z).exp_()  # in place: fresh memory for [n, V] costs as much as filling it
        # logsumexp over many words is off by 1e-5; a p that sums to 1 + 1e-5 would move every KL by 1e-5 log Z.
        p.div_(p.sum(-1, keepdim=True))
        negative_entropy = -torch.special.entr(p).sum(-1)
        if done == 0:
            shape = (stream.layers + 1, int(windows.valid.sum()), stream.d_model)
            states = room_for(shape, stream.device, memory_gib)
        states[:, done : done + len(row)] = h
        done += len(row)
        expected.append(p @ weight.float())
        entropy.append(negative_entropy - (p @ bias.float() if bias is not None and stream.readout.linear else 0.0))
        targets.append(target)
        mean_p += p.sum(0).double()
        # Without a constant given, its cross term has the same mean: sum p log mean_p, added below.
        constant_kl.append(negative_entropy - (p @ log_constant if log_constant is not None else 0.0))
        if report is not None:
            report(rows.stop, total)
    window = np.nonzero(windows.valid)[0]
    mean_p /= len(window)
    from_constant = torch.cat(constant_kl)
    if constant is None:
        from_constant = from_constant - (mean_p * mean_p.clamp(min=1e-300).log()).sum().float()
    return Capture(
        states=states,
        expected=torch.cat(expected),
        entropy_term=torch.cat(entropy),
        targets=torch.cat(targets),
        top=torch.cat(top),
        model_ce=torch.cat(ce),
        mean_p=mean_p.float(),
        constant_kl=from_constant,
        window=window,
        document=windows.documents[window],
        target_bytes=windows.next_bytes[windows.valid],
    )


def room_for(shape: tuple[int, int, int], device: torch.device, memory_gib: float) -> Tensor:
    """An empty float32 tensor; on the CPU, one of more than ``memory_gib`` GiB is a memory-mapped file without a name."""
    size = math.prod(shape)
    if device.type != "cpu" or 4 * size <= memory_gib * 2**30:
        return torch.empty(shape, device=device)
    with tempfile.NamedTemporaryFile(prefix="lensbench-states-") as file:
        free = shutil.disk_usage(file.name).free
        if free < 4 * size:
            raise LensbenchError(
                f"the states take {4 * size / 2**30:.1f} GiB, more than memory_gib allows in memory and more than the "
                f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}; set TMPDIR to a larger disk or fit fewer tokens"
            )
        return torch.from_file(file.name, shared=True, size=size).view(shape)


@dataclass(frozen=True)
class RotatedView:
    """A model with every h_l, l < L, seen through its own random orthogonal map of the pooled principal subspace.

    The model itself is untouched, and so is what any lens fitted at one layer (with prior zero) can read there; what
    layers have in common is gone. ``maps`` is ``[L, d, d]``, float64: rotations Q_l of the top-r principal directions that
    hold ``variance`` of the layers' pooled within-layer variance, identity elsewhere.
    """

    maps: Tensor
    rank: int

    @classmethod
    def random(cls, covariances: Tensor, *, seed: int, variance: float = 0.99) -> "RotatedView":
        """Rotations drawn from the Haar measure for layers with ``covariances`` ``[L, d, d]`` (float64)."""
        values, vectors = torch.linalg.eigh(covariances.mean(0))
        share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        rank = min(len(values), int((share < variance).sum()) + 1)
        basis = vectors[:, -rank:]  # [d, r]
        generator = torch.Generator().manual_seed(seed)
        maps = []
        for _ in covariances:
            gaussian = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            q = q * r.diagonal().sign()  # without the signs QR is not uniform over rotations
            maps.append(
                torch.eye(len(values), dtype=torch.float64) + basis @ (q - torch.eye(rank, dtype=q.dtype)) @ basis.T
            )
        return cls(torch.stack(maps), rank)

    def apply(self, captured: Capture) -> Capture:
        """The same tokens with rotated states; layer L and everything that is not a state stay as they are."""
        maps = self.maps.to(captured.states)
        rotated = torch.einsum("lde,lne->lnd", maps, captured.states[:-1])
        return Capture(**{**vars(captured), "states": torch.cat([rotated, captured.states[-1:]])})
