"""Train the embedded model: `python -m qwenedit.mini.train vae|tower|edit|decoder|export RUN`.

    python -m qwenedit.mini.train vae RUN          # the VAE, into RUN/vae
    python -m qwenedit.mini.train tower RUN        # the vision tower learns to see, into RUN/tower
    python -m qwenedit.mini.train edit RUN         # text encoder and transformer, into RUN/edit
    python -m qwenedit.mini.train decoder RUN      # the VAE's decoder alone goes on, into RUN/decoder
    python -m qwenedit.mini.train export RUN OUT   # the checkpoint folder

With --start CHECKPOINT a stage goes on from the weights of that checkpoint in place of random ones, or of
RUN/model's in the stage decoder. A stage that was stopped, even by a kill, resumes where it was. Each stage
writes its networks into RUN/model, which grows into a whole checkpoint. The same commands with the same
options make the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwenedit.checks import device_of, dtype_of, real_number
from qwenedit.files import replacing_file
from qwenedit.foreign import shown
from qwenedit.inputs.processor import ImageProcessorConfig, Processor
from qwenedit.inputs.tokenizer import load_tokenizer
from qwenedit.mini.build import PREPROCESSOR, write_network, write_shared
from qwenedit.mini.train_edit import networks, train_edit
from qwenedit.mini.train_tower import train_tower
from qwenedit.mini.train_vae import train_vae
from qwenedit.mini.training import Stage
from qwenedit.networks.vae import VAE
from qwenedit.weights.loading import load_network

TOWER = Path("tower") / "tower.safetensors"  # in RUN; the stage tower writes it, the stage edit reads it
STAGES = {
    "vae": Stage(steps=3800, batch=40, rate=2.5e-3, warmup=200, report_every=100),
    "decoder": Stage(steps=2000, batch=40, rate=1e-3, warmup=100, report_every=100),
    "tower": Stage(steps=600, batch=256, rate=2e-3, matrix_rate=4e-3),
    "edit": Stage(steps=6000, batch=64, rate=1.5e-3, matrix_rate=3e-3),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qwenedit.mini.train", description=__doc__.split(":")[0])
    parser.add_argument("stage", choices=(*STAGES, "export"))
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="export: folder of the checkpoint")
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="whose weights to go on from")
    parser.add_argument("--rate", type=float, default=1.0, help="peak learning rate, times the stage's own")
    parser.add_argument("--steps", type=int, help="number of updates (default: the stage's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", help="of the networks' arithmetic")
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


def train(arguments: argparse.Namespace) -> None:
    """Run one stage, or the rest of it.

    Raises:
        ValueError: an option without meaning; no checkpoint to start from; an earlier stage has not ended.
    """
    run, stage, start = arguments.run, arguments.stage, arguments.start
    model, device = run / "model", device_of(arguments.device)
    dtype = dtype_of(arguments.dtype, device)
    assert dtype is not None
    default, share = STAGES[stage], real_number("--rate", arguments.rate)
    if share <= 0:
        raise ValueError(f"--rate is {share}, wanted a number above 0")
    for component in ("vae",) if stage in ("vae", "decoder") else ("text_encoder", "transformer"):
        if start is not None and not (start / component / "config.json").is_file():
            raise ValueError(f"--start {shown(start)} has no {component}/, wanted the folder of a checkpoint")
    options = replace(
        default,
        steps=default.steps if arguments.steps is None else arguments.steps,
        rate=share * default.rate,
        matrix_rate=None if default.matrix_rate is None else share * default.matrix_rate,
        seed=arguments.seed, dtype=dtype, device=device,
    )  # fmt: skip
    write_shared(model)
    tokens = tokens_of(model)
    if stage in ("vae", "decoder"):
        only = stage == "decoder"
        first = trained_vae(start or model) if start or only else None
        vae = train_vae(run / stage, options, start=first, decoder_only=only, compiled=arguments.compile)
        write_network(model, vae)
        return
    make = partial(networks, start=start)
    if stage == "tower":
        taught = train_tower(run / stage, options, tokens, make=make)
        with replacing_file(run / TOWER) as temporary:
            save_file({name: x.cpu() for name, x in taught.items()}, temporary)
        return
    vae, tower = trained_vae(model), None
    if (run / TOWER).is_file():
        tower = load_file(run / TOWER)
    elif start is None:
        raise ValueError(f"{run} has no {TOWER}: run the stage tower first")
    pipe = train_edit(run / stage, options, tokens, vae, tower=tower, make=make, compiled=arguments.compile)
    assert pipe.vision_language is not None
    write_network(model, pipe.vision_language)
    write_network(model, pipe.mmdit)


def tokens_of(model: Path) -> Processor:
    return Processor(load_tokenizer(model / "tokenizer"), ImageProcessorConfig.from_json(PREPROCESSOR))


def trained_vae(folder: Path) -> VAE:
    """The VAE of a checkpoint folder, in float32 on the CPU.

    Raises:
        ValueError: it has none; in RUN/model, the first stage has not ended.
    """
    if not (folder / "vae" / "config.json").is_file():
        raise ValueError(f"{folder} has no vae/: run the stage vae first")
    vae = load_network(folder, "vae", device=torch.device("cpu"), dtype=torch.float32, progress=False)
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
