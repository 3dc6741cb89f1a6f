"""What the models of a run read: the corpus or the images, in tokens or pixels of each model."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lensbench.data.corpus import SPLITS, Corpus, load_corpus
from lensbench.data.images import ImageSet, Prepare, labels_for, load_images, pixels_of_size, processed_pixels
from lensbench.data.inputs import IMAGES, TRAINED_HERE, Data, Pictures, Texts
from lensbench.data.samples import Samples
from lensbench.data.tokens import train_tokenizer
from lensbench.models.pretrained import identity, load_config, load_image_processor, load_tokenizer
from lensbench.run.context import Context, digest_of
from lensbench.runtime.progress import Progress
from lensbench.streams.parts import image_shape
from lensbench.suite.recipes import ImageRecipe, ModelRecipe, Suite


def corpus_of(context: Context) -> Corpus:
    """The text of the suite, read and split once."""
    cache = context.cache
    if cache.corpus is None:
        cache.corpus = read_corpus(context.suite, context.progress)
    return cache.corpus


def read_corpus(suite: Suite, progress: Progress, *, strict: bool = False) -> Corpus:
    """The text of a suite, read and split; with ``strict`` files that are no text are refused."""
    recipe = suite.corpus
    with progress.task("corpus", 1, "steps") as task:
        corpus = load_corpus(
            recipe.spec,
            fractions=recipe.fractions,
            seed=recipe.seed,
            max_bytes=recipe.max_bytes,
            say=progress.say,
            strict=strict,
        )
        task.update(1)
    return corpus


def images_of(context: Context) -> ImageSet:
    """The images of the suite, found and split once."""
    cache, recipe = context.cache, context.suite.images
    assert recipe is not None
    if cache.images is None:
        trains = any(m.source is None and m.view_of is None and not m.untrained for m in context.suite.models)
        with context.progress.task("images", 1, "steps") as task:
            cache.images = load_images(
                recipe.spec,
                parts=recipe.parts,
                seed=recipe.seed,
                max_images=recipe.max_images,
                needed=SPLITS if trains else SPLITS[1:],
            )
            task.update(1)
    return cache.images


def source_of(context: Context) -> Corpus | ImageSet:
    """The corpus or the images, whichever the suite has."""
    return corpus_of(context) if context.suite.images is None else images_of(context)


def identity_of(context: Context, source: str) -> dict[str, str]:
    """What a pretrained model's source holds: names and checksums, read once."""
    known = context.cache.sources
    if source not in known:
        known[source] = identity(source)
    return known[source]


def data_of(context: Context, model: ModelRecipe | None = None) -> Data:
    """What a model reads: the corpus in tokens of its own tokenizer, or of the one trained here; images likewise."""
    owner = None if model is None else context.suite.trained(model)
    images, known = context.suite.images, context.cache.data
    if owner is None or owner.source is None:
        if TRAINED_HERE not in known:
            known[TRAINED_HERE] = _texts_here(context) if images is None else _pictures_here(context, images)
        return known[TRAINED_HERE]
    if owner.name not in known:
        read = _own_texts(context, owner) if images is None else _own_pictures(context, owner, images)
        known[owner.name] = read
    return known[owner.name]


def eval_samples(context: Context, data: Data, count: int | None = None) -> Samples:
    """The held-out windows or images: as many as asked, as the precision needs, or as the suite says."""
    recipe = context.suite.evaluate
    count = count or context.sequences or recipe.sequences
    return data.samples("eval", count, recipe.positions, share=recipe.max_share, turns=recipe.turns)


def _texts_here(context: Context) -> Texts:
    """The corpus in tokens of the tokenizer that the run trains, a stage of its own."""
    corpus, recipe = corpus_of(context), context.suite.corpus

    def compute(folder: Path) -> None:
        train_tokenizer(corpus, recipe.vocab_size).save(str(folder / "tokenizer.json"))

    key = {"checksum": corpus.checksum, "recipe": recipe.model_dump(exclude={"spec", "max_bytes"})}
    stage = context.stage("tokenizer", key, compute)
    load = partial(Tokenizer.from_file, str(stage.folder / "tokenizer.json"))
    # It adds no token to a text by itself, so that "auto" is "first".
    every = context.suite.evaluate.begin == "every"
    digest = digest_of({"tokenizer": stage.digest, "begin": "every"}) if every else stage.digest
    return _texts(context, TRAINED_HERE, digest, load)


def _own_texts(context: Context, owner: ModelRecipe) -> Texts:
    """The corpus in tokens of a pretrained model's own tokenizer."""
    assert owner.source is not None
    split = context.suite.corpus.model_dump(exclude={"spec", "max_bytes", "vocab_size"})
    identified = identity_of(context, owner.source)
    key = {"checksum": corpus_of(context).checksum, "recipe": split, "source": identified}
    key["begin"] = context.suite.evaluate.begin
    return _texts(context, owner.name, digest_of(key), partial(load_tokenizer, owner.source))


def _texts(context: Context, name: str, digest: str, load: Callable[[], Tokenizer | PreTrainedTokenizerBase]) -> Texts:
    evaluate = context.suite.evaluate
    return Texts(corpus_of(context), name, digest, load, context.suite.length, evaluate.first_position, evaluate.begin)


def _pictures_here(context: Context, recipe: ImageRecipe) -> Pictures:
    """The images as all models trained here see them."""
    images = images_of(context)
    channels, size = recipe.shape
    prepare = pixels_of_size(channels=channels, height=size, width=size)
    key = {"checksum": images.checksum, "recipe": recipe.model_dump(exclude={"spec", "max_images"})}
    numbers = np.arange(len(images.classes))
    return Pictures(images, IMAGES, digest_of(key), lambda: (prepare, numbers), recipe.shape, recipe.shift)


def _own_pictures(context: Context, owner: ModelRecipe, recipe: ImageRecipe) -> Pictures:
    """The images as a pretrained model's own image processor prepares them."""
    assert owner.source is not None
    name, source, images = owner.name, owner.source, images_of(context)
    split = recipe.model_dump(exclude={"spec", "max_images", "size", "channels", "shift"})
    key = {"checksum": images.checksum, "recipe": split, "source": identity_of(context, source)}

    def load() -> tuple[Prepare, NDArray[np.int64]]:
        config = load_config(source)
        channels, height, width = image_shape(config)
        processor = load_image_processor(source)
        if processor is None:
            context.progress.say(
                f"model {name} comes without an image processor: it gets images of {height} x {width}, from -1 to 1"
            )
            prepare = pixels_of_size(channels=channels, height=height, width=width)
        else:
            prepare = partial(processed_pixels, processor=processor, channels=channels)
        return prepare, labels_for(f"model {name}", config, images.classes)

    return Pictures(images, name, digest_of(key), load, recipe.shape, recipe.shift)
