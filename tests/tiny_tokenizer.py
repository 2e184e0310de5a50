"""A tokenizer of the family in small: byte-level BPE over a few sentences, Qwen's special tokens, both forms.

Every word of the official system prompts is one token, as in the official vocabulary, so that the templates'
prefixes have the official 64 and 34 tokens. The files are written without the code under test.
"""

import functools
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
NOT_SPECIAL = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

_SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a "
    "new image that meets the user's requirements while maintaining consistency with the original input "
    "where appropriate.",
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
    "user\n",
    "assistant\n",
    "Picture 1: ",
)
_TEXT = (
    "Make the red circle blue and move it to the left of the yellow triangle; don't change the background.",
    "Ultra HD, 4K, cinematic composition. It's 1024x1024, isn't it? We'll see: 50%\n\n\n  - café, naïve, Ωm",
    "# heading\n## second {braces} {} {0} 'quoted' \"twice\"\r\n\ttabs   and   spaces ",
    "把红色的圆变成蓝色，超清，4K，电影级构图。请保持背景不变。",
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@functools.cache
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary without added tokens, and the merges in order.

    The last merges join what a right split keeps apart, such as two digits: a wrong one shows in the ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, _BYTE_LEVEL])
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than there is to learn: every word of the texts becomes a token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_SYSTEM * 20, *_TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    symbols = "0124adelstLT,.-{'" + _BYTE_LEVEL.pre_tokenize_str(" \n\r\t")[0][0]
    for pair in itertools.product(symbols, repeat=2):
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    return vocab, merges


def added_ids() -> dict[str, int]:
    """The added tokens' ids: <|image_pad|> and the others, after the vocabulary."""
    start = len(vocabulary()[0])
    return {token: start + i for i, token in enumerate(SPECIAL + NOT_SPECIAL)}


def size() -> int:
    """How many ids there are: the least vocab_size of a text encoder for it."""
    return len(vocabulary()[0]) + len(SPECIAL) + len(NOT_SPECIAL)


def write(folder: str | Path, form: str = "json") -> Path:
    """Write the tokenizer into a folder, made if need be, as tokenizer.json ("json") or in the older files
    ("files"); both with the configuration files that go with them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    if form == "json":
        dump(folder / "tokenizer.json", _tokenizer_json(vocab, merges))
    elif form == "files":
        dump(folder / "vocab.json", vocab)
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"form is {form!r}, wanted 'json' or 'files'")
    dump(folder / "added_tokens.json", dict(sorted(added_ids().items())))
    dump(folder / "tokenizer_config.json", _tokenizer_config())
    roles = {name: {"content": token, **_flags()} for name, token in _ROLES.items()}
    dump(folder / "special_tokens_map.json", {"additional_special_tokens": list(SPECIAL[1:]), **roles})
    return folder


def dump(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def _flags() -> dict[str, bool]:
    return {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _tokenizer_config() -> dict[str, object]:
    decoder = {
        str(index): {"content": token, **_flags(), "special": token in SPECIAL}
        for token, index in added_ids().items()
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        **_ROLES,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _tokenizer_json(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    added = [
        {"id": index, "content": token, **_flags(), "special": token in SPECIAL}
        for token, index in added_ids().items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [" ".join(merge) for merge in merges],
        },
    }
