"""Whether a text is long enough for what a suite asks of it, told from texts and tokenizers alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lensbench.data.inputs import TRAINED_HERE, Texts
from lensbench.data.sources import sources_of
from lensbench.data.tokens import train_tokenizer
from lensbench.errors import LensbenchError
from lensbench.models.pretrained import load_tokenizer
from lensbench.models.training import refuse_short_stream
from lensbench.run.beginnings import begin_windows
from lensbench.run.context import Context
from lensbench.run.curves import has_curve
from lensbench.run.inputs import corpus_of, data_of, eval_samples
from lensbench.runtime.stages import NotFinished
from lensbench.suite.recipes import ModelRecipe

UNCHECKED = "Not checked: whether the text is long enough"


def refuse_short_text(context: Context, models: list[ModelRecipe]) -> list[str]:
    """What could not be checked, in a line each.

    Raises :class:`LensbenchError` where the text is too short for a tokenizer, a training or windows; its message is the
    one that the run would end with. No model is loaded, and nothing is written.
    """
    spec = context.suite.corpus.spec
    if context.cache.corpus is None and any(part.startswith("hf:") for part in sources_of(spec)):
        return [f"{UNCHECKED}. {spec} would have to be downloaded."]
    corpus_of(context)
    read: dict[str, tuple[Texts, Texts] | None] = {}
    unchecked = []
    for model in models:
        owner = context.suite.trained(model)
        # Revisions of one repository are checkpoints of one training: they share a tokenizer.
        who = TRAINED_HERE if owner.source is None else owner.source.partition("@")[0]
        if who not in read:
            try:
                read[who] = with_longest(texts_of(context, owner))
            except LensbenchError as error:
                if owner.source is None:
                    raise
                read[who] = None
                unchecked.append(f"{UNCHECKED} for model {owner.name}. {error}")
        if (texts := read[who]) is not None:
            refuse_model(context, model, *texts)
    return unchecked


def texts_of(context: Context, owner: ModelRecipe) -> Texts:
    """The text as a model reads it, with its tokenizer loaded; one that the run has not trained yet is trained here."""
    suite, evaluate = context.suite, context.suite.evaluate
    load: Callable[[], Tokenizer | PreTrainedTokenizerBase] = partial(
        train_tokenizer, corpus_of(context), suite.corpus.vocab_size
    )
    if owner.source is not None:
        # The texts of the run itself need the checksums of its weights, which take long.
        load = partial(load_tokenizer, owner.source)
    else:
        try:
            data = data_of(context)
            assert isinstance(data, Texts)
            return data
        except NotFinished:
            pass
    texts = Texts(corpus_of(context), owner.name, "", load, suite.length, evaluate.first_position, evaluate.begin)
    _ = texts.beginning
    return texts


def with_longest(texts: Texts) -> tuple[Texts, Texts]:
    """The texts with nothing but the longest document of each split, and the whole texts."""
    longest = {split: tuple(sorted(d, key=lambda one: -len(one.text))[:1]) for split, d in texts.corpus.splits.items()}
    alone = replace(texts, load=lambda: texts.tokenizer, corpus=replace(texts.corpus, splits=longest))
    return alone, texts


def refuse_model(context: Context, model: ModelRecipe, longest: Texts, whole: Texts) -> None:
    """Raise :class:`LensbenchError` where the text is too short for a model.

    The longest documents have a window of each split where there is one, as a rule: then the whole text is not tokenised.
    """
    for ask in asks_of(context, model):
        try:
            ask(longest)
        except LensbenchError:
            ask(whole)


def asks_of(context: Context, model: ModelRecipe) -> Iterator[Callable[[Texts], object]]:
    """What a run asks of a model's text, in its order; each raises :class:`LensbenchError` where the text is too short."""
    suite, fit = context.suite, context.suite.fit
    owner = suite.whole_training(model)
    if owner.source is None and not owner.untrained:
        yield lambda texts: refuse_short_stream(texts.batches(suite.training, 0), suite.training.length)
    if has_curve(suite, model):
        yield lambda texts: eval_samples(context, texts)
    if owner.source is not None:
        yield lambda texts: begin_windows(texts, 1) if texts.beginning.ids else None
    yield lambda texts: texts.samples(**fit.of_fit)
    yield lambda texts: texts.samples(**fit.of_dev)
    yield lambda texts: eval_samples(context, texts)
