"""The family's tokenizer, from either of its official forms, by the `tokenizers` library.

Source: transformers 4.57.6, `Qwen2TokenizerFast` with `Qwen2Converter` (convert_slow_tokenizer.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
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

from qwenedit.foreign import read_json

__all__ = ["has_tokenizer", "load_tokenizer"]

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
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(f"{file} is no tokenizer: {error}") from error
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
        elif not file.is_file():
            added = _added_tokens_from_list(listed, {**config, **special_map})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the added tokens are not listed as they should be: {error!r}") from error
    for _, token in added:
        tokenizer.add_tokens([token])  # one by one: each gets the next free id
    for content, wanted in [*((token.content, index) for index, token in added), *listed.items()]:
        if (got := tokenizer.token_to_id(content)) != wanted:
            raise ValueError(
                f"{folder}: the added token {content} has id {wanted} in one file, the others make it {got}: "
                "the ids clash or have gaps"
            )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """True if the folder has the files of either form."""
    return (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )


def _from_vocab_and_merges(folder: Path) -> Tokenizer:
    if missing := [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {' and '.join(missing)}, wanted both or tokenizer.json")
    vocab = read_json(folder / "vocab.json")
    if set(map(str, vocab.values())) != set(map(str, range(len(vocab)))):
        raise ValueError(f"{folder / 'vocab.json'}: the ids clash or have gaps, wanted 0 to {len(vocab) - 1}")
    merges = _merges(folder / "merges.txt")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{folder}: vocab.json and merges.txt do not fit: {error}") from error
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
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version:")):  # elsewhere # is an ordinary symbol
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"{file}, line {number}: {line!r} is no merge, wanted two symbols")
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
