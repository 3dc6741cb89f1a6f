"""What a probe looks at: a model's stream, its lenses and the tokens of each split."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lensbench.data.ngram import KneserNeyBigram
from lensbench.data.samples import Samples
from lensbench.data.windows import Windows
from lensbench.errors import LensbenchError
from lensbench.lenses.maps import AffineMaps
from lensbench.streams.capture import Capture, capture
from lensbench.streams.stream import ResidualStream


@dataclass(frozen=True)
class ReadText:
    """What probes of language need beside a stream."""

    fit_windows: Windows
    """Other text of the same kind, that lenses were fitted on"""
    bigram: Callable[[], KneserNeyBigram]
    """Counted on the train split"""
    tokenizer: Tokenizer | PreTrainedTokenizerBase


@dataclass(frozen=True)
class Subject:
    """What probes look at: a model's stream, the inputs that are scored, and tokens of the three splits when asked for."""

    stream: ResidualStream
    samples: Samples
    layers: list[int]
    """The layers of what is made for pairs of them"""
    lenses: AffineMaps
    """Per-layer lenses 0..L-1 of the headline matrix"""
    rotated: bool
    read: Callable[[str], Capture]
    own: AffineMaps
    """Per-layer lenses 0..L-1 as the shared one was made: closed form, prior zero, best ridge"""
    shared: AffineMaps
    """The one lens for all layers"""
    text: ReadText | None = None
    """Where the samples are windows of text"""
    report: Callable[[str, int, int], None] = lambda what, done, total: None
    """Called with what passes by, how many have, and of how many"""
    say: Callable[[str], None] = lambda line: None
    """Called with what a user should know of how something is measured"""

    @classmethod
    def plain(
        cls,
        stream: ResidualStream,
        windows: Windows,
        fit_windows: Windows,
        tokenizer: Tokenizer | PreTrainedTokenizerBase,
    ) -> "Subject":
        """Outside a suite: with the logit lens at every layer, and a bigram counted on ``fit_windows``.

        Other lenses, or a bigram of more text, with ``dataclasses.replace``. Nothing is measured on ``fit_windows`` alone;
        they must be other documents than ``windows``.
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
        """The samples, where they are windows of text; probes that ask for them are not in :data:`OF_IMAGES_TOO`."""
        if not isinstance(self.samples, Windows):
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.samples

    @property
    def words(self) -> ReadText:
        """As :attr:`windows`, what goes with them."""
        if self.text is None:
            raise LensbenchError("this probe reads text, and the samples are images")
        return self.text

    @cached_property
    def fit(self) -> Capture:
        return self.read("fit")

    @cached_property
    def dev(self) -> Capture:
        return self.read("dev")

    @cached_property
    def eval(self) -> Capture:
        return self.read("eval")
