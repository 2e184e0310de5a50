"""The embedded model's vocabulary: byte-level BPE of some 700 tokens with Qwen's special tokens.

Every word of the official templates is one token, as in the official vocabulary, so that the number of
template tokens to drop comes out the same (64 and 34). Text outside the words below falls back to shorter
pieces and to bytes; nothing is unknown.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qwenedit.family import EDIT, EDIT_PLUS, TEXT_TO_IMAGE
from qwenedit.inputs.tokenizer import SPLIT, load_tokenizer

__all__ = ["SPECIAL_TOKENS", "train", "write"]

# In the official order, which is the order of their ids. The last ones are added tokens that are not special.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

WORDS = (
    "make change turn paint color recolor move put place shift add draw insert remove delete "
    "erase take away replace swap with into to the a an of on at in it is and below above left "
    "right top bottom center middle corner side next behind front circle square triangle star "
    "shape background picture red green blue yellow purple orange white black big bigger small "
    "smaller larger size upper lower from by instead one two three for something colour another "
    "recolour different "
).split()
# An instruction may start with a capital.
VERBS = (
    "make change turn paint color recolor move put place shift add draw insert remove delete erase take "
    "replace swap"
).split()
TEXTS = (
    *(template.render("", [1] * template.pictures[0]) for template in (TEXT_TO_IMAGE, EDIT)),
    EDIT_PLUS.picture,
    *(form for word in WORDS for form in (word, f" {word}")),
    *(verb.capitalize() for verb in VERBS),
)


def train() -> Tokenizer:
    """The tokenizer without its added tokens: merged until every word of `TEXTS` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # never reached: the words run out first
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def write(folder: Path) -> dict[str, int]:
    """Write the tokenizer's official files (vocab.json, merges.txt, ...) and tokenizer.json; return added
    ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # an older one would be read instead of the new files
    tokenizer = train()
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    ids = {name: first + i for i, name in enumerate((*SPECIAL_TOKENS, *ADDED_TOKENS))}

    def dump(name: str, value: object) -> None:
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    dump("added_tokens.json", ids)
    dump(
        "special_tokens_map.json",
        {
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "eos_token": {"content": "<|im_end|>", **flags},
            "pad_token": {"content": "<|endoftext|>", **flags},
        },
    )
    dump(
        "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": name, **flags, "special": name in SPECIAL_TOKENS}
                for name, i in ids.items()
            },
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    return ids
