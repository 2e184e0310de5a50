"""The embedded model's vocabulary: byte-level BPE of some 700 tokens with Qwen's special tokens.

Every word of the official templates is one token, as in the official vocabulary, so the number of template
tokens to drop is the official one (64 and 34). Other text is split into shorter pieces, down to bytes; no
text is unknown.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qwenedit.family import EDIT, EDIT_PLUS, TEXT_TO_IMAGE
from qwenedit.inputs.tokenizer import SPLIT, load_tokenizer
from qwenedit.weights.writing import write_json

__all__ = ["SPECIAL_TOKENS", "train", "write"]

# Both in the official order, which is the order of their ids.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (  # but not special
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

VERBS = (
    "make change turn paint color recolor move put place shift add draw insert remove delete erase take "
    "replace swap"
).split()
WORDS = (
    "away with into to the a an of on at in it is and below above left right top bottom center middle "
    "corner side next behind front circle square triangle star shape background picture red green blue "
    "yellow purple orange white black big bigger small smaller larger size upper lower from by instead one "
    "two three for something colour another recolour different"
).split()
TEXTS = (
    *(template.render("", [1] * template.pictures[0]) for template in (TEXT_TO_IMAGE, EDIT)),
    EDIT_PLUS.picture,
    *(form for word in (*VERBS, *WORDS) for form in (word, f" {word}")),
    *(verb.capitalize() for verb in VERBS),  # an instruction may start with a capital
)


def train() -> Tokenizer:
    """The tokenizer without its added tokens; every word of `TEXTS` is one token."""
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
    """Write the tokenizer's official files (vocab.json, merges.txt, ...) and tokenizer.json.

    Returns the ids of the added tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").unlink(missing_ok=True)  # `load_tokenizer` would read an old one
    tokenizer = train()
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    ids = {name: first + i for i, name in enumerate((*SPECIAL_TOKENS, *ADDED_TOKENS))}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(folder / "added_tokens.json", ids)
    write_json(
        folder / "special_tokens_map.json",
        {
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "eos_token": {"content": "<|im_end|>", **flags},
            "pad_token": {"content": "<|endoftext|>", **flags},
        },
    )
    write_json(
        folder / "tokenizer_config.json",
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
