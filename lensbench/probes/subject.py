"""What a probe is given: a model's stream, its lenses and the tokens of each split."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lensbench.data.ngram import KneserNeyBigram
from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.jacobian import JacobianSource
from lensbench.lenses.maps import AffineMaps, Reads
from lensbench.runtime.progress import QUIET, Progress, Task
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream


def no_blocks(stream: ResidualStream) -> str:
    """Why a stream has no blocks that can be taken apart."""
    if stream.layers == 1:
        return "it has one layer, which cannot be told from the model around it"
    return "its layers are not blocks of their own"


@dataclass(frozen=True)
class ReadText:
    """What probes of language need in addition to a stream."""

    fit_windows: Windows
    """Other text of the same kind, on which the lenses were fitted"""
    bigram: Callable[[], KneserNeyBigram]
    """An interpolated bigram, counted on the train split"""
    tokenizer: Tokenizer | PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What a probe is given: a model's stream, the samples that are scored, lenses, and captures of the three splits.

    L is the number of layers, d the width of the stream.
    """

    stream: ResidualStream
    samples: Samples
    layers: list[int]
    """The layers that probes of pairs compare"""
    lenses: AffineMaps
    """Per-layer lenses 0..L-1 of the transfer matrix"""
    rotated: bool
    """Whether every layer is seen in a random basis of its own"""
    read: Callable[[str], Capture]
    """The capture of a split: ``fit``, ``dev`` or ``eval``"""
    own: AffineMaps
    """Per-layer lenses 0..L-1, fitted as the shared one: closed form, prior zero, best ridge"""
    shared: AffineMaps
    """The one lens for all layers"""
    text: ReadText | None = None
    """Given where the samples are windows of text"""
    name: str = ""
    """What progress and messages call it"""
    progress: Progress = QUIET
    ridges: tuple[float, ...] = ()
    """The ridge of each of ``own``, in median eigenvalues of the layer's covariance; empty where they were not fitted"""
    nulls: Mapping[str, Reads] = field(default_factory=dict)
    """Kind of lens -> the lens of a random basis, which reads plain states of layers 0..L-1"""
    further: Mapping[str, AffineMaps] = field(default_factory=dict)
    """Other kinds of lens that read every layer 0..L-1: one map for all, or L"""
    jacobians: Callable[[Windows], JacobianSource] | None = None
    """What mean Jacobians over some prompts are estimated from, where the suite estimates any"""

    @classmethod
    def plain(
        cls,
        stream: ResidualStream,
        windows: Windows,
        fit_windows: Windows,
        tokenizer: Tokenizer | PreTrainedTokenizerBase,
    ) -> "Subject":
        """A subject outside a suite: the logit lens at every layer, and a bigram counted on ``fit_windows``.

        Use ``dataclasses.replace`` for other lenses or a bigram of more text. ``fit_windows`` must come from other documents
        than ``windows``, on which everything is measured.
        """
        d = stream.d_model

        def read(split: str) -> Capture:
            if split == "fit":
                return capture(stream, fit_windows)
            constant = capture(stream, fit_windows.spread(16)).mean_p
            return capture(stream, windows, constant=constant)

        def bigram() -> KneserNeyBigram:
            return KneserNeyBigram.fit(fit_windows.ids[fit_windows.inside], stream.vocab_size)

        lenses = AffineMaps(torch.eye(d).repeat(stream.layers, 1, 1), torch.zeros(stream.layers, d))
        layers, text = list(range(stream.layers)), ReadText(fit_windows, bigram, tokenizer)
        return cls(stream, windows, layers, lenses, False, read, lenses, AffineMaps.identity(d), text)

    @property
    def windows(self) -> Windows:
        """The samples as windows of text. Raises :class:`LensbenchError` where they are images."""
        if not isinstance(self.samples, Windows):
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.samples

    @property
    def words(self) -> ReadText:
        """What goes with windows of text. Raises :class:`LensbenchError` where the samples are images."""
        if self.text is None:
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.text

    @cached_property
    def fit(self) -> Capture:
        """States and predictions of the split on which lenses were fitted."""
        return self.read("fit")

    @cached_property
    def dev(self) -> Capture:
        """States and predictions of the split on which choices are made."""
        return self.read("dev")

    @cached_property
    def eval(self) -> Capture:
        """States and predictions of the samples that are scored."""
        return self.read("eval")

    def task(self, what: str, windows: Windows) -> Task:
        """A task of one unit per window, to report progress to."""
        return self.progress.task(f"{what}-{self.name}" if self.name else what, len(windows.ids), "inputs")

    def say(self, line: str) -> None:
        """Report to the user how something is measured."""
        self.progress.say(f"{self.name}: {line}" if self.name else line)
