"""Train the embedded model: `python -m qwenedit.mini.train vae|tower|edit|export RUN`.

    python -m qwenedit.mini.train vae RUN          # the VAE, into RUN/vae
    python -m qwenedit.mini.train tower RUN        # the vision tower learns to see, into RUN/tower
    python -m qwenedit.mini.train edit RUN         # text encoder and transformer, into RUN/edit
    python -m qwenedit.mini.train export RUN OUT   # the checkpoint folder

Each stage goes on where it was stopped, however it was stopped, and ends in RUN/model, which grows into a
whole checkpoint. The same commands with the same options make the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwenedit.checks import device_of, dtype_of
from qwenedit.files import replacing_file
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.inputs.tokenizer import load_tokenizer
from qwenedit.mini.build import PREPROCESSOR, write_network, write_shared
from qwenedit.mini.train_edit import networks, train_edit
from qwenedit.mini.train_tower import train_tower
from qwenedit.mini.train_vae import train_vae
from qwenedit.networks.vae import VAE
from qwenedit.weights.loading import load_network

TOWER = Path("tower") / "tower.safetensors"  # in RUN: what the stage tower hands to the stage edit


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qwenedit.mini.train", description=__doc__.split(":")[0])
    parser.add_argument("stage", choices=("vae", "tower", "edit", "export"))
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="export: the checkpoint's folder")
    parser.add_argument("--steps", type=int, default=None, help="default: as the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="that the networks compute in")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler on the CPU")
    options = parser.parse_args(arguments)
    if options.stage == "export" and options.out is None:
        parser.error("export needs OUT")
    try:
        if options.stage == "export":
            export(options.run / "model", options.out)
        else:
            train(options)
    except ValueError as error:
        parser.error(str(error))


def train(options: argparse.Namespace) -> None:
    """Run one stage, or the rest of it."""
    model = options.run / "model"
    device = device_of(options.device)
    common = {
        "seed": options.seed,
        "dtype": dtype_of(options.dtype, device),
        "device": device,
        **({} if options.steps is None else {"steps": options.steps}),
    }
    ids = write_shared(model)
    if options.stage == "vae":
        write_network(model, train_vae(options.run / "vae", **common, compiled=options.compile), ids)
    elif options.stage == "tower":
        torch.manual_seed(options.seed)
        untaught = networks(tokens_of(model))[0].vision
        taught = train_tower(options.run / "tower", untaught, tokens_of(model), **common)
        with replacing_file(options.run / TOWER) as temporary:
            save_file({name: x.cpu() for name, x in taught.items()}, temporary)
    else:
        vae = frozen_vae(model)
        if not (options.run / TOWER).is_file():
            raise ValueError(f"{options.run} has no {TOWER}: run the stage tower first")
        tower = load_file(options.run / TOWER)
        run, tokens = options.run / "edit", tokens_of(model)
        pipe = train_edit(run, tokens, vae, tower=tower, **common, compiled=options.compile)
        assert pipe.vision_language is not None
        write_network(model, pipe.vision_language, ids)
        write_network(model, pipe.mmdit, ids)


def tokens_of(model: Path) -> Processor:
    return Processor(load_tokenizer(model / "tokenizer"), ImageProcessorConfig.from_json(PREPROCESSOR))


def frozen_vae(model: Path) -> VAE:
    """The first stage's VAE as the second one uses it.

    Raises:
        ValueError: the first stage has not ended.
    """
    if not (model / "vae" / "config.json").is_file():
        raise ValueError(f"{model} has no vae/: run the stage vae first")
    vae = load_network(model, "vae", device=torch.device("cpu"), dtype=torch.float32, progress=False)
    assert isinstance(vae, VAE)
    return vae


def export(model: Path, out: Path) -> None:
    """Copy the finished checkpoint.

    Raises:
        ValueError: a stage has not ended.
    """
    for component in ("vae", "text_encoder", "transformer"):
        if not (model / component / "config.json").is_file():
            raise ValueError(f"{model} has no {component}/: a stage has not ended")
    shutil.copytree(model, out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
