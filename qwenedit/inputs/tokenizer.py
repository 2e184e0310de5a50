"""The family's tokenizer, from either of its official forms, by the `tokenizers` library.

Source: transformers 4.57.6, `Qwen2TokenizerFast` with `Qwen2Converter` (convert_slow_tokenizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from qwenedit.foreign import read_json, read_text, shown

__all__ = ["has_tokenizer", "load_tokenizer", "token_ids"]

# Qwen2 splits a text before merging: contractions, words with the character before them, single digits, runs
# of punctuation, line breaks, other spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The byte-level BPE tokenizer of a folder, in either official form, with its added tokens.

    The forms are tokenizer.json, and vocab.json with merges.txt. Both take their added tokens from
    tokenizer_config.json; if it lists none, the first form has its own and the second takes
    added_tokens.json. The ids do not depend on the form.

    Raises:
        ValueError: files are missing or broken, or ids clash or have gaps.
    Source: `Qwen2TokenizerFast`. The slow `Qwen2Tokenizer`, which the text-to-image pipeline loads, gives the
        same ids with one exception: it normalises a text before it looks for special tokens, so it misses a
        special token that is followed by a combining mark.
    """
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if os.path.lexists(file):
        with _told(f"{shown(file)} is no tokenizer"):
            tokenizer = Tokenizer.from_str(read_text(file, "tokenizer"))
    else:
        tokenizer = _from_vocab_and_merges(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    config = read_json(folder / "tokenizer_config.json", optional=True)
    listed = read_json(folder / "added_tokens.json", optional=True)
    special_map = read_json(folder / "special_tokens_map.json", optional=True)
    added: list[tuple[int, AddedToken]] = []
    try:
        if "added_tokens_decoder" in config:
            added = _added_tokens(config["added_tokens_decoder"])
        elif not os.path.lexists(file):
            added = _added_tokens_from_list(listed, {**config, **special_map})
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        why = shown(repr(error))
        raise ValueError(f"{folder}: the added tokens are not listed as they should be: {why}") from error
    with _told(f"{folder}: the tokens that are to be added cannot be used"):
        for _, token in added:
            tokenizer.add_tokens([token])  # one by one: each gets the next free id
        got_ids = [tokenizer.token_to_id(token.content) for _, token in added]
        got_ids += map(tokenizer.token_to_id, listed)
    contents = [*((token.content, index) for index, token in added), *listed.items()]
    for (content, wanted), got in zip(contents, got_ids, strict=True):
        if got != wanted:
            raise ValueError(
                f"{folder}: the added token {shown(content)} has id {shown(wanted)} in one file, the others "
                f"make it {got}: the ids clash or have gaps"
            )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """True if the folder has the files of either form."""
    there = os.path.lexists
    return there(folder / "tokenizer.json") or (there(folder / "vocab.json") and there(folder / "merges.txt"))


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text.

    Raises:
        ValueError: the tokenizer's own parts contradict each other, which shows on use only.
    """
    with _told("the tokenizer does not work"):
        return list(tokenizer.encode(text).ids)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Make a ValueError that begins with `what` of an error of the library, or of a panic in it.

    The library raises nothing more precise than Exception. A panic of its Rust code is a BaseException, like
    the user's interrupt, of a class that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {shown(error)}") from error
        raise


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    if missing := [name for name in ("vocab.json", "merges.txt") if not os.path.lexists(folder / name)]:
        raise ValueError(f"{folder} lacks {' and '.join(missing)}, wanted both or tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    if not all(type(index) is int for index in vocab.values()) or set(vocab.values()) != set(
        range(len(vocab))
    ):
        raise ValueError(f"{folder / 'vocab.json'}: the ids clash or have gaps, wanted 0 to {len(vocab) - 1}")
    merges = _merges(folder / "merges.txt")
    with _told(f"{folder}: vocab.json and merges.txt do not fit"):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _merges(file: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version:")):  # elsewhere # is an ordinary symbol
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{file}, line {number}: {shown(repr(line))} is no merge, wanted two symbols")
        merges.append((left, right))
    return merges


def _added_tokens(decoder: Mapping[str, Mapping[str, Any]]) -> list[tuple[int, AddedToken]]:
    """In the order of ids, from tokenizer_config.json's added_tokens_decoder."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    added = []
    for index, token in decoder.items():
        flags = {name: token[name] for name in names if name in token}
        added.append((int(index), AddedToken(token["content"], **flags)))
    return sorted(added, key=lambda item: item[0])


def _added_tokens_from_list(
    listed: Mapping[str, int], config: Mapping[str, Any]
) -> list[tuple[int, AddedToken]]:
    """In the order of ids, from added_tokens.json; tokens with a role in the other files are special."""
    special: set[str] = set()
    for value in config.values():
        for token in value if isinstance(value, list) else [value]:
            special.add(token.get("content", "") if isinstance(token, dict) else str(token))
    return [
        (index, AddedToken(content, normalized=content not in special, special=content in special))
        for content, index in sorted(listed.items(), key=lambda item: item[1])
    ]
