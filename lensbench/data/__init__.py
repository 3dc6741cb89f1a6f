"""Texts and images: read, split, tokenised, sampled."""

from lensbench.data.corpus import SPLITS, Corpus, load_corpus
from lensbench.data.images import Images, ImageSet, load_images
from lensbench.data.samples import Samples
from lensbench.data.tokens import beginning, tokenize, train_tokenizer
from lensbench.data.windows import Windows, sample_windows

__all__ = [
    "SPLITS",
    "Corpus",
    "ImageSet",
    "Images",
    "Samples",
    "Windows",
    "beginning",
    "load_corpus",
    "load_images",
    "sample_windows",
    "tokenize",
    "train_tokenizer",
]
