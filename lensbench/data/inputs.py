"""What a model of a suite is trained, fitted and scored on: a corpus in its tokens, or images as it sees them.

:class:`Texts` and :class:`Pictures` are two kinds of the same thing: the loop that runs a suite asks either for samples of a
split, for batches to train on, and for how well counting alone predicts.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from lensbench.data.windows import TokenizedDocument, Windows, check_ids, sample_windows, tokenize, training_stream

TRAINED_HERE = "trained here"
"""What the tokenizer trained on the train split is called; no model can be called that."""


IMAGES = "images"
"""What stands in a tokenizer's place where models see images."""


class Data(Protocol):
    """One corpus or set of images, as the models that share it read it."""

    @property
    def name(self) -> str:
        """``trained here``, ``images``, or the model whose own tokens or pixels these are"""
        ...

    @property
    def digest(self) -> str:
        """What tells whether it is still the same"""
        ...

    def samples(self, split: str, count: int, positions: int, *, share: float | None = None) -> Samples:
        """At most ``count`` inputs of a split, drawn at random, with so many positions each."""
        ...

    def batches(self, recipe: TrainingRecipe, seed: int) -> Any:
        """What :func:`lensbench.models.training.train` takes."""
        ...

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        """What of a model's shape follows from what it reads, in the words of :func:`lensbench.models.build`."""
        ...

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Nats per scored position, ``[N]``, of predictions by counting alone."""
        ...

    def counts(self) -> dict[str, Any]:
        """``train_tokens`` that the baselines are counted on, and ``tokens`` of each split."""
        ...


@dataclass(frozen=True, eq=False)
class Texts:
    """The corpus of a run in the tokens of one tokenizer; it is tokenised when its documents are first needed."""

    corpus: Corpus
    name: str
    digest: str
    load: Callable[[], Tokenizer | PreTrainedTokenizerBase]
    length: int
    """Tokens of a window"""
    first_position: int

    @cached_property
    def tokenizer(self) -> Tokenizer | PreTrainedTokenizerBase:
        return self.load()

    @cached_property
    def documents(self) -> dict[str, list[TokenizedDocument]]:
        return {split: tokenize(self.tokenizer, self.corpus.splits[split]) for split in SPLITS}

    @property
    def counted(self) -> NDArray[np.int64]:
        """The tokens that n-grams are counted on: the train split, where there is none the fit split."""
        return training_stream(self.documents["train"] or self.documents["fit"]).astype(np.int64)

    @property
    def vocab_size(self) -> int:
        return max(self.tokenizer.get_vocab().values()) + 1

    def within(self, network: PreTrainedModel) -> None:
        """Raise :class:`LensbenchError` where the text holds a token that a model has no embedding for."""
        for documents in self.documents.values():
            for document in documents:
                check_ids(f"model {self.name}", document.ids, network.config.get_text_config().vocab_size)

    def samples(self, split: str, count: int, positions: int, *, share: float | None = None) -> Windows:
        return sample_windows(
            self.documents[split],
            n_sequences=count,
            length=self.length,
            positions=positions,
            seed=SPLITS.index(split),
            max_share=share,
            first_position=self.first_position,
        )

    def batches(self, recipe: TrainingRecipe, seed: int) -> NDArray[np.int32]:
        return training_stream(self.documents["train"])

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "context": recipe.length}

    def bigram(self) -> KneserNeyBigram:
        return KneserNeyBigram.fit(self.counted, self.vocab_size)

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Unigram and Kneser-Ney bigram."""
        every = slice(None)
        ids, row, at = samples.scored(every)
        contexts, targets = ids[row, at], samples.targets(every)
        return {
            "unigram": unigram_cross_entropy(self.counted, contexts, targets, self.vocab_size),
            "bigram": self.bigram().cross_entropy(contexts, targets),
        }

    def counts(self) -> dict[str, Any]:
        tokens = {s: int(sum(len(d.ids) for d in documents)) for s, documents in self.documents.items()}
        return {"train_tokens": len(self.counted), "tokens": tokens}


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of a run as one model, or all that are trained here, are fed with them; in their numbering of classes."""

    images: ImageSet
    name: str
    digest: str
    load: Callable[[], tuple[Prepare, NDArray[np.int64]]]
    """How pictures become pixels, and the number that the model has for each class"""
    size: tuple[int, int]
    """Channels, and pixels of a side, of what is trained here"""
    shift: int

    @cached_property
    def prepared(self) -> tuple[Prepare, NDArray[np.int64]]:
        return self.load()

    def samples(self, split: str, count: int, positions: int = 1, *, share: float | None = None) -> Images:
        rows = self.images.splits[split]
        if len(rows) > count:
            rows = np.sort(np.random.default_rng(SPLITS.index(split)).permutation(rows)[:count])
        prepare, numbers = self.prepared
        return Images(self.images, rows, prepare, numbers[self.images.labels[rows]])

    def batches(self, recipe: TrainingRecipe, seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        images = self.samples("train", len(self.images.splits["train"]))
        return TrainingImages.of(images, batch=recipe.batch, seed=seed, shift=self.shift)

    def shape(self, recipe: TrainingRecipe) -> dict[str, int]:
        channels, size = self.size
        return {"vocab_size": len(self.images.classes), "context": size, "channels": channels}

    def _counted(self) -> NDArray[np.int64]:
        splits = self.images.splits
        return self.images.labels[splits["train"] if len(splits["train"]) else splits["fit"]]

    def baselines(self, samples: Samples) -> dict[str, NDArray[np.float64]]:
        """Frequencies of the classes, with one more of each."""
        _, numbers = self.prepared
        targets = samples.targets(slice(None))
        size = int(numbers.max()) + 1
        return {"class frequencies": unigram_cross_entropy(numbers[self._counted()], targets, targets, size)}

    def counts(self) -> dict[str, Any]:
        return {
            "train_tokens": len(self._counted()),
            "tokens": {s: len(rows) for s, rows in self.images.splits.items()},
        }


def documents_of(data: Corpus | ImageSet) -> dict[str, int]:
    """Documents, or images, in each split."""
    return {split: len(data.splits[split]) for split in SPLITS}
