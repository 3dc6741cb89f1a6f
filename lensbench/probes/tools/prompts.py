r"""Few-shot prompts ``query:label\n`` of whole words: their token ids, as a tokenizer makes them of the text of a prompt."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from lensbench.data.tokens import backend_of, beginning
from lensbench.data.windows import Windows
from lensbench.probes.tools.crossfit import FOLDS

Ids = NDArray[np.int64]


PROMPTS = 512
"""Number of prompts"""


EXAMPLES = 16
"""Examples in a prompt, at most"""


QUERIES, LABELS = 4, 4
"""Number of different queries and labels in a prompt; each prompt draws its own, and its own map between them"""


POOL = 64
"""Number of the text's most frequent words from which queries and labels are drawn"""


NOISE = 0.2
"""Share of examples with a random label, so that errors go on when the map is known"""


WORD = re.compile(r"(?<=\s)[A-Za-z]{2,}(?=[\s.,;:!?()\[\]{}\"=])")
"""A whole word in a text: between whitespace and whitespace or punctuation. One at an edge of a window may be cut."""


@dataclass(frozen=True)
class Form:
    """How an example is written: query, ``colon``, label, ``newline``; queries and labels are one token each.

    ``front`` stands before the first example, and is never scored. ``first`` maps the token of a word to the one that the
    same word has at the start of a text, where these differ (sentencepiece puts a space there).
    """

    colon: Sequence[int]
    newline: Sequence[int]
    front: Sequence[int] = ()
    first: Mapping[int, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens of an example."""
        return 2 + len(self.colon) + len(self.newline)

    @property
    def answer(self) -> int:
        """Position at which the first example's label is predicted; that of each further one is ``tokens`` later."""
        return len(self.front) + len(self.colon)

    def written(self, queries: Ids, labels: Ids) -> Ids:
        """Token ids ``[S, front + k * tokens]`` of k examples ``[S, k]``."""
        queries = queries.copy()
        queries[:, 0] = [self.first.get(query, query) for query in queries[:, 0].tolist()]
        parts = [
            queries[..., None],
            np.broadcast_to(self.colon, (*queries.shape, len(self.colon))),
            labels[..., None],
            np.broadcast_to(self.newline, (*queries.shape, len(self.newline))),
        ]
        front = np.broadcast_to(np.array(self.front, dtype=np.int64), (len(queries), len(self.front)))
        return np.concatenate([front, np.concatenate(parts, -1).reshape(len(queries), -1)], 1)


@dataclass(frozen=True)
class Prompts:
    """S prompts of k examples: token ids of queries and labels ``[S, k]``, and of the labels of each prompt ``[S, m]``.

    ``at`` ``[S]`` is the example that is taken out, ``same`` ``[S]`` whether the next one asks the same query. ``mapped``
    and ``place`` ``[S]`` are numbers of labels: of the one to which the last query maps, and of the one shown at ``at``.
    ``exchanged`` ``[S, k]`` are the queries with each replaced by another one of the prompt's own.
    """

    queries: Ids
    labels: Ids
    choices: Ids
    at: Ids
    same: NDArray[np.bool_]
    mapped: Ids
    place: Ids
    exchanged: Ids


def prompts_of(
    tokenizer: Tokenizer | PreTrainedTokenizerBase, text: Windows, length: int
) -> tuple[Form, Prompts] | str:
    """Prompts of at most ``length`` tokens with the frequent words of a text; or why a tokenizer cannot write them.

    Raises :class:`LensbenchError` for a slow tokenizer.
    """
    backend = backend_of(tokenizer)
    # A prompt is a whole text, so it begins as a document does. That a document's later windows may lack these ids changes
    # nothing: a prompt is no middle of a text.
    found = form_of(backend, beginning(tokenizer).ids, whole_words(backend, text))
    if isinstance(found, str):
        return found
    form, words = found
    room = (length - len(form.front)) // form.tokens
    if room < 4:
        return f"its windows have room for {room} examples: too few"
    prompts = draw_prompts(np.array(list(words)[:POOL], dtype=np.int64), min(EXAMPLES, room), np.random.default_rng(0))
    return unlike_text(backend, form, words, prompts) or (form, prompts)


def whole_words(backend: Tokenizer, text: Windows) -> list[str]:
    """The words of a text, the most frequent first: two ASCII letters or more, and no part of a longer word."""
    windows = [ids[:n].tolist() for ids, n in zip(text.ids, text.lengths, strict=True)]
    counts = Counter(
        word for part in backend.decode_batch(windows, skip_special_tokens=False) for word in WORD.findall(part)
    )
    return [word for word, _ in counts.most_common()]


def form_of(backend: Tokenizer, front: Sequence[int], words: Sequence[str]) -> tuple[Form, dict[int, str]] | str:
    """How a tokenizer writes prompts, and the words that are one token wherever a prompt has them; or why it cannot.

    The separators are those that most words have in the encoding of a whole prompt. A word's token is the same as query and
    as label; at the start of a prompt it may be another one (:attr:`Form.first`). The words keep their order.
    """
    texts = [f"{word}:{word}\n" * 2 for word in words]
    encoded = [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]
    decoded = backend.decode_batch(encoded, skip_special_tokens=False)
    if words and all(spelled.lstrip(" ") != text for spelled, text in zip(decoded, texts, strict=True)):
        return f"its tokenizer cannot write `query:label` and a line break: {texts[0]!r} becomes {decoded[0]!r}"
    found = {word: parts for word, ids in zip(words, encoded, strict=True) if (parts := _parts(backend, ids, word))}
    separators = Counter((colon, newline) for _, colon, _, newline in found.values()).most_common(1)
    usable = {word: parts for word, parts in found.items() if (parts[1], parts[3]) == separators[0][0]}
    if len(usable) < QUERIES + LABELS:
        return f"its tokenizer has {len(usable)} whole words of this text that are one token in `query:label`: too few"
    colon, newline = separators[0][0]
    first = {token: start for start, _, token, _ in usable.values() if start != token}
    return Form(colon, newline, front, first), {token: word for word, (_, _, token, _) in usable.items()}


def _parts(backend: Tokenizer, ids: list[int], word: str) -> tuple[int, tuple[int, ...], int, tuple[int, ...]] | None:
    r"""First token, colon, token and newline of ``word:word\nword:word\n``; None where the word is not one token in it."""
    separators = (len(ids) - 4) // 2
    for size in range(1, separators):
        start, colon, token, newline = ids[0], ids[1 : size + 1], ids[size + 1], ids[size + 2 : separators + 2]
        example = [token, *colon, token, *newline]
        if ids != [start, *example[1:], *example]:
            continue
        if {backend.decode([i], skip_special_tokens=False).strip(" ") for i in (start, token)} == {word}:
            return start, tuple(colon), token, tuple(newline)
    return None


def draw_prompts(words: Ids, examples: int, rng: np.random.Generator) -> Prompts:
    """:data:`PROMPTS` random prompts of token ids ``words`` ``[W]``."""
    count = PROMPTS
    drawn = np.stack([rng.permutation(len(words))[: QUERIES + LABELS] for _ in range(count)])
    asked, choices = words[drawn[:, :QUERIES]], words[drawn[:, QUERIES:]]
    mapping = rng.integers(0, LABELS, (count, QUERIES))
    which = rng.integers(0, QUERIES, (count, examples))
    at = rng.integers(1, examples - 1, count)  # at least one example before it and one after it
    same = np.arange(count) // FOLDS % 2 == 0
    row = np.arange(count)
    other = (which[row, at] + rng.integers(1, QUERIES, count)) % QUERIES
    which[row, at + 1] = np.where(same, which[row, at], other)
    label = np.take_along_axis(mapping, which, 1)
    noisy = rng.random((count, examples)) < NOISE
    label = np.where(noisy, rng.integers(0, LABELS, label.shape), label)
    return Prompts(
        np.take_along_axis(asked, which, 1),
        np.take_along_axis(choices, label, 1),
        choices,
        at,
        same,
        np.take_along_axis(mapping, which[:, -1:], 1)[:, 0],
        label[row, at],
        np.take_along_axis(np.roll(asked, 1, 1), which, 1),
    )


def unlike_text(backend: Tokenizer, form: Form, words: Mapping[int, str], prompts: Prompts) -> str:
    r"""Why prompts are not what the tokenizer makes of ``query:label\n``; empty where every one is.

    Each prompt is decoded, and what it spells is encoded again: the text is that of its words, and the ids are the same.
    """
    for queries in (prompts.queries, prompts.exchanged):
        pairs = zip(queries.tolist(), prompts.labels.tolist(), strict=True)
        texts = ["".join(f"{words[q]}:{words[y]}\n" for q, y in zip(*pair, strict=True)) for pair in pairs]
        ids = form.written(queries, prompts.labels)[:, len(form.front) :].tolist()
        decoded = backend.decode_batch(ids, skip_special_tokens=False)
        again = [e.ids for e in backend.encode_batch(decoded, add_special_tokens=False)]
        for text, spelled, made, remade in zip(texts, decoded, ids, again, strict=True):
            if spelled.lstrip(" ") != text:
                return f"its tokenizer does not keep the text of a prompt: {text[:40]!r} is read as {spelled[:40]!r}"
            if remade != made:
                return f"its tokenizer does not keep the ids of a prompt: it encodes as other ids what spells {text[:40]!r}"
    return ""
