"""The data of a suite as its models read them: a corpus in their tokens, or images as their pixels.

:class:`Texts` and :class:`Pictures` have one interface, :class:`Data`: samples of a split, batches to train on, and the
losses of baselines that only count.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lensbench.data.corpus import SPLITS, Corpus
from lensbench.data.images import Images, ImageSet, Prepare, TrainingImages
from lensbench.data.ngram import KneserNeyBigram, unigram_cross_entropy
from lensbench.data.recipe import TrainingRecipe
from lensbench.data.samples import Samples
from lensbench.data.tokens import (
    Beginning,
    BeginSetting,
    TokenizedDocument,
    beginning,
    check_ids,
    tokenize,
    training_stream,
)
from lensbench.data.windows import Turns, Windows, sample_windows

TRAINED_HERE = "trained here"
"""Name of the tokenizer that is trained on the train split; no model can have this name"""


IMAGES = "images"
"""Name of the data where models read images, in place of a tokenizer's"""


class Data(Protocol):
    """One corpus or set of images, as the models that share it read it."""

    @property
    def name(self) -> str:
        """``trained here``, ``images``, or the model whose own tokens or pixels these are"""
        ...

    @property
    def digest(self) -> str:
        """Checksum of the data; it changes when they do"""
        ...

    def read(self) -> None:
        """Read every split now, so that processes that are given these data need not read them again."""
        ...

    def samples(
        self, split: str, count: int, positions: int, *, share: float | None = None, turns: Turns = "document"
    ) -> Samples:
        """At most ``count`` inputs of a split, drawn at random, with at most ``positions`` scored positions each."""
        ...

    def batches(self, recipe: TrainingRecipe, seed: int) -> Any:
        """The training data, as :func:`lensbench.models.training.train` takes them."""
        ...

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        """The part of a model's shape that the data determine, as arguments of :func:`lensbench.models.build`."""
        ...

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Loss of each counting baseline at every scored position, nats ``[N]``."""
        ...

    def counts(self) -> dict[str, Any]:
        """``train_tokens``: the tokens that baselines are counted on; ``tokens``: those of each split."""
        ...


@dataclass(frozen=True, eq=False)
class Texts:
    """The corpus of a run in the tokens of one tokenizer. Each split is tokenised when its documents are first needed."""

    corpus: Corpus
    name: str
    digest: str
    load: Callable[[], Tokenizer | PreTrainedTokenizerBase]
    length: int
    """Tokens of a window"""
    first_position: int
    begin: BeginSetting = "auto"
    """Which windows begin with the model's beginning-of-text token"""
    known: dict[str, list[TokenizedDocument]] = field(default_factory=dict, init=False, repr=False)
    """The splits that are tokenised so far; a copy with another corpus begins with none"""

    @cached_property
    def tokenizer(self) -> Tokenizer | PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first needed"""
        return self.load()

    def documents(self, split: str) -> list[TokenizedDocument]:
        """The tokenised documents of a split."""
        if split not in self.known:
            self.known[split] = tokenize(self.tokenizer, self.corpus.splits[split], self.begin)
        return self.known[split]

    def read(self) -> None:
        """Tokenise every split."""
        for split in SPLITS:
            self.documents(split)

    @cached_property
    def beginning(self) -> Beginning:
        """What the text of these models begins with"""
        return beginning(self.tokenizer, self.begin)

    @property
    def counted(self) -> NDArray[np.int64]:
        """The tokens that n-grams are counted on: the train split, or the fit split if there is no train split"""
        return training_stream(self.documents("train") or self.documents("fit")).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        """Number of token ids"""
        return max(self.tokenizer.get_vocab().values()) + 1

    def within(self, network: PreTrainedModel) -> None:
        """Raise :class:`LensbenchError` where a token of the text has no embedding in the model."""
        for split in SPLITS:
            for document in self.documents(split):
                check_ids(f"model {self.name}", document.ids, network.config.get_text_config().vocab_size)

    def samples(
        self, split: str, count: int, positions: int, *, share: float | None = None, turns: Turns = "document"
    ) -> Windows:
        """At most ``count`` windows of a split; ``share``, ``turns``: see :func:`sample_windows`."""
        return sample_windows(
            self.documents(split),
            n_sequences=count,
            length=self.length,
            positions=positions,
            seed=SPLITS.index(split),
            max_share=share,
            turns=turns,
            first_position=self.first_position,
        )

    def batches(self, recipe: TrainingRecipe, seed: int) -> NDArray[np.int32]:
        """The token ids of the train split, one document after the other."""
        return training_stream(self.documents("train"))

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        """Size of the vocabulary and length of the context."""
        return {"vocab_size": self.vocab_size, "context": recipe.length}

    def bigram(self) -> KneserNeyBigram:
        """The bigram baseline."""
        return KneserNeyBigram.fit(self.counted, self.vocab_size)

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Losses of the unigram and the Kneser-Ney bigram, nats ``[N]``."""
        every = slice(None)
        ids, row, at = samples.scored(every)
        contexts, targets = ids[row, at], samples.targets(every)
        return {
            "unigram": unigram_cross_entropy(self.counted, contexts, targets, self.vocab_size),
            "bigram": self.bigram().cross_entropy(contexts, targets),
        }

    def counts(self) -> dict[str, Any]:
        """Tokens that baselines are counted on, and tokens of each split."""
        tokens = {split: int(sum(len(d.ids) for d in self.documents(split))) for split in SPLITS}
        return {"train_tokens": len(self.counted), "tokens": tokens}


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a run, as the pixels and class numbers of one pretrained model, or of all models trained here."""

    images: ImageSet
    name: str
    digest: str
    load: Callable[[], tuple[Prepare, NDArray[np.int64]]]
    """Gives the function from pictures to pixels, and the model's number for each class"""
    size: tuple[int, int]
    """Channels and pixels of a side, for models trained here"""
    shift: int
    """Pixels by which training moves images at most"""

    @cached_property
    def prepared(self) -> tuple[Prepare, NDArray[np.int64]]:
        """What ``load`` gives, loaded when it is first needed"""
        return self.load()

    def read(self) -> None:
        """Nothing: pictures are read for each batch."""

    def samples(
        self, split: str, count: int, positions: int = 1, *, share: float | None = None, turns: Turns = "document"
    ) -> Images:
        """At most ``count`` images of a split, drawn at random."""
        rows = self.images.splits[split]
        if len(rows) > count:
            rows = np.sort(np.random.default_rng(SPLITS.index(split)).permutation(rows)[:count])
        prepare, numbers = self.prepared
        return Images(self.images, rows, prepare, numbers[self.images.labels[rows]])

    def batches(self, recipe: TrainingRecipe, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """A function from a step to its pixels and classes."""
        images = self.samples("train", len(self.images.splits["train"]))
        return TrainingImages.of(images, batch=recipe.batch, seed=seed, shift=self.shift)

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        """Number of classes, pixels of a side, and channels."""
        channels, size = self.size
        return {"vocab_size": len(self.images.classes), "context": size, "channels": channels}

    def _counted(self) -> NDArray[np.int64]:
        splits = self.images.splits
        return self.images.labels[splits["train"] if len(splits["train"]) else splits["fit"]]

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Loss of the add-one smoothed frequencies of the classes, nats ``[N]``."""
        _, numbers = self.prepared
        targets = samples.targets(slice(None))
        size = int(numbers.max()) + 1
        return {"class frequencies": unigram_cross_entropy(numbers[self._counted()], targets, targets, size)}

    def counts(self) -> dict[str, Any]:
        """Images that the baseline is counted on, and images of each split."""
        return {
            "train_tokens": len(self._counted()),
            "tokens": {s: len(rows) for s, rows in self.images.splits.items()},
        }


def documents_of(data: Corpus | ImageSet) -> dict[str, int]:
    """Number of documents or images in each split."""
    return {split: len(data.splits[split]) for split in SPLITS}
