"""The tokens of a text stream as texts that can be shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwenedit.inputs.processor import Processor

__all__ = ["MOST_WORDS", "Word", "words_of"]

MOST_WORDS = 160  # cells of a text; the tokens of a longer one are joined


@dataclass(frozen=True)
class Word:
    """A cell of the text: tokens in a row, `start` to `stop` of the transformer's text stream.

    `picture` is the number, from 1, of the picture that these tokens are, as the text encoder sees it; None
    for text.
    """

    text: str
    start: int
    stop: int
    picture: int | None = None


def words_of(ids: Sequence[int], processor: Processor) -> list[Word]:
    """The tokens as words: each token one, but for

    - the tokens of a picture, which are one word together;
    - tokens that hold a part of a character, which are joined until the character is whole;
    - texts of more than `MOST_WORDS` words: neighbours are joined, equally many in each.
    """
    words: list[Word] = []
    start = pictures = 0
    while start < len(ids):
        stop = start + 1
        if ids[start] == processor.image_token_id:
            while stop < len(ids) and ids[stop] == processor.image_token_id:
                stop += 1
            pictures += 1
            words.append(Word(f"picture {pictures}", start, stop, pictures))
        else:
            text = _text(ids[start:stop], processor)
            while "\ufffd" in text and stop < min(len(ids), start + 4):  # UTF-8 has at most 4 bytes
                stop += 1
                text = _text(ids[start:stop], processor)
            if "\ufffd" in text:  # no character at all
                stop = start + 1
                text = _text(ids[start:stop], processor)
            words.append(Word(text, start, stop))
        start = stop
    return _joined(words)


def _text(ids: Sequence[int], processor: Processor) -> str:
    return str(processor.tokenizer.decode(list(ids), skip_special_tokens=False))


def _joined(words: list[Word]) -> list[Word]:
    if len(words) <= MOST_WORDS:
        return words
    made: list[Word] = []
    pictures = sum(word.picture is not None for word in words)
    at_once = math.ceil(len(words) / max(1, MOST_WORDS - 2 * pictures))
    taken = 0
    for word in words:
        last = made[-1] if made else None
        if last is None or word.picture or last.picture or taken == at_once:
            made.append(word)
            taken = 1
        else:
            made[-1] = Word(last.text + word.text, last.start, word.stop)
            taken += 1
    return made
