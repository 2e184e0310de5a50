"""`make edit`: edit the example picture with the embedded model: `python -m qwenedit.mini.demo`.

Writes edited.png, and before-after.png with both pictures enlarged.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image

from qwenedit import mini
from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.inputs.pictures import open_picture
from qwenedit.instruments.sheet import sheet
from qwenedit.pipeline import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qwenedit.mini.demo", description="Edit the example picture."
    )
    parser.add_argument("picture", nargs="?", type=Path, default=mini.EXAMPLE)
    parser.add_argument("prompt", nargs="?", default="make the circle red")
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for both pictures (default: here)"
    )
    options = parser.parse_args(arguments)
    if not options.out.is_dir():
        parser.error(f"--out {shown(options.out)} is no folder")
    try:
        source = open_picture(options.picture).convert("RGB")
    except ValueError as error:
        parser.error(str(error))
    pipe = load(device="cpu", progress=False)
    start = time.perf_counter()
    result = pipe.edit(
        source, options.prompt, num_inference_steps=20, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert isinstance(result, Image.Image)
    seconds = time.perf_counter() - start
    both = sheet([(options.prompt, [source.resize(result.size), result])], scale=6)
    for name, picture in (("edited.png", result), ("before-after.png", both)):
        with replacing_file(options.out / name) as temporary:
            picture.save(temporary)
    print(f"{options.picture}: {options.prompt!r}, 20 steps with guidance in {seconds:.1f} s")
    print(f"{options.out / 'edited.png'}: the result; {options.out / 'before-after.png'}: both, enlarged")


if __name__ == "__main__":
    main()
