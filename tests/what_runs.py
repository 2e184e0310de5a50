"""Shows that the code one reads is the code that runs: changing any network's `forward` must change a result.

    python -m tests.what_runs

prints a line for each forward: its file, its class, the first run that changed ("-" if none did), and the
modes that use the class but did not change. The change is made in the source, in a copy of the package: the
forward's result is multiplied by 1.01.

A worker process imports torch once. For each forward it forks a child, which imports the copy and runs it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwenedit"
AT_ONCE = 2  # children that run at the same time
SECONDS = 120  # time limit of a child

CHANGE = """

import torch  # some files do not import it under this name


def _times_1_01(result):
    if isinstance(result, torch.Tensor):
        return result * 1.01 if result.is_floating_point() else result
    if isinstance(result, (tuple, list)):
        parts = [_times_1_01(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result
"""


class Forward(NamedTuple):
    """One `forward`: its file, relative to the package, and its class."""

    file: str
    name: str


class Outcome(NamedTuple):
    """The effect of changing one forward."""

    file: str
    name: str
    run: str  # the first run that changed, or "-"
    modes: list[str]  # the modes that use the class
    unchanged: list[str]  # the modes among them that did not change

    def __str__(self) -> str:
        unchanged = f"  unchanged in: {', '.join(self.unchanged)}" if self.unchanged else ""
        return f"{self.file:28} {self.name:18} {self.run:8}{unchanged}".rstrip()


def network_files(package: Path = PACKAGE) -> list[Path]:
    return sorted((package / "networks").glob("*.py"))


def forwards(package: Path = PACKAGE) -> list[Forward]:
    """Every class of the network files that defines a `forward`."""
    return [
        Forward(file.relative_to(package).as_posix(), node.name)
        for file in network_files(package)
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.ClassDef) and _forward_of(node) is not None
    ]


def changed(source: str, name: str) -> str:
    """The source, changed so that the forward of class `name` returns 1.01 times its result.

    Raises:
        ValueError: there is not exactly one such class, or its forward returns nothing.
    """
    classes = [x for x in ast.walk(ast.parse(source)) if isinstance(x, ast.ClassDef) and x.name == name]
    found = [forward for node in classes if (forward := _forward_of(node)) is not None]
    if len(found) != 1:
        raise ValueError(f"{len(found)} classes {name} have a forward, wanted one")
    values = list(_returned(found[0]))
    if not values:
        raise ValueError(f"{name}.forward returns nothing")
    lines = source.encode().splitlines(keepends=True)  # bytes, because ast counts columns in bytes
    for value in sorted(values, key=lambda value: (value.lineno, value.col_offset), reverse=True):
        assert value.end_lineno is not None and value.end_col_offset is not None
        for row, column, text in (
            (value.end_lineno, value.end_col_offset, b"))"),
            (value.lineno, value.col_offset, b"_times_1_01(("),
        ):
            lines[row - 1] = lines[row - 1][:column] + text + lines[row - 1][column:]
    return b"".join(lines).decode() + CHANGE


def _forward_of(node: ast.ClassDef) -> ast.FunctionDef | None:
    functions = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "forward"]
    return functions[-1] if functions else None


def _returned(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that a function returns, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return) and child.value is not None:
            yield child.value
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _returned(child)


# --- the caller's side


def outcomes() -> Iterator[Outcome]:
    """The outcomes of all forwards, one by one as the worker reports them.

    Raises:
        RuntimeError: the worker failed, or its runs are not reproducible. Its message is on stderr.
    """
    from tests.tiny import checkpoint  # imports the reference libraries, which the worker does not need

    folders = [str(checkpoint("plus", zero_cond_t=True)), str(checkpoint("layered"))]
    command = [sys.executable, "-m", "tests.what_runs", *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            yield Outcome(*json.loads(line))
    if worker.returncode:
        raise RuntimeError(f"the worker ended with status {worker.returncode}")


# --- the worker's side: it imports torch; only its children import the package


def work(*folders: str) -> None:
    """Print each forward's outcome as a line of JSON; `folders` are checkpoints of 2511 and Layered.

    Raises:
        RuntimeError: a child failed, or two runs of the unchanged package differ.
    """
    _prepare()

    def unchanged(_: None) -> dict[str, Any]:
        with _copy(None) as package:
            models = Models(package, *folders)
            return {
                "runs": {name: _digest(run(models)) for name, run in RUNS.items()},
                "modes": {name: _digest(run(models)) for name, (_, run) in MODES.items()},
                "used": {name: models.classes(network(models)) for name, (network, _) in MODES.items()},
            }

    def with_a_change(forward: Forward) -> list[Any]:
        with _copy(forward) as package:
            models = Models(package, *folders)
            acts = (name for name, run in RUNS.items() if _digest(run(models)) != plain["runs"][name])
            first = next(acts, "-")
            modes = [name for name in MODES if list(forward) in plain["used"][name]]
            same = [name for name in modes if _digest(MODES[name][1](models)) == plain["modes"][name]]
            return [first, modes, same]

    plain, again = _in_children(unchanged, [None, None])
    if plain != again:
        raise RuntimeError("two runs of the unchanged package differ, so a difference would prove nothing")
    every = forwards()
    for forward, outcome in zip(every, _in_children(with_a_change, every), strict=True):
        print(json.dumps([*forward, *outcome]), flush=True)


class Models:
    """The models of a copy of the package, loaded when first used, and runs of them on small inputs."""

    def __init__(self, package: Path, folder_2511: str, folder_layered: str) -> None:
        import qwenedit

        assert Path(qwenedit.__file__).parent == package, f"{qwenedit.__file__} is not the copy"
        self.package = package
        self.folder_2511, self.folder_layered = folder_2511, folder_layered
        self.load = functools.cache(functools.partial(qwenedit.load, device="cpu", progress=False))

    def edit(self, output_type: str) -> Tensor:
        return self._result(self.load().edit, "make the circle red", steps=2, output_type=output_type)

    def edit_2511(self, **options: Any) -> Tensor:
        return self._result(self.load(self.folder_2511, **options).edit, "turn left")

    def edit_with_shared_prefix(self) -> Tensor:
        pipe = self.load()
        pipe.share_prefix = True
        try:
            return self.edit("latent")
        finally:
            pipe.share_prefix = False

    def edit_with_lora(self) -> Tensor:
        layer = "transformer.transformer_blocks.0.attn.to_q"
        width = self.load(self.folder_2511).mmdit.config.width
        other = layer.replace("to_q", "to_k")
        weights = {f"{layer}.lora_A.weight": _random(2, width), f"{layer}.lora_B.weight": _random(width, 2)}
        weights |= {f"{other}.lokr_w1": _random(2, 2), f"{other}.lokr_w2": _random(width // 2, width // 2)}
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            safetensors.torch.save_file(weights, file.name)
            pipe = self.load(self.folder_2511, residency="resident")
            pipe.load_lora_weights(file.name)
        return self._result(pipe.edit, "turn left")

    def generate_under_control(self, blockwise: bool = False) -> Tensor:
        from qwenedit.mini import EXAMPLE

        pipe = self.load()
        pipe.controlnets = [self.controlnet(blockwise)]
        try:
            return pipe.generate(
                "a red circle", true_cfg_scale=1.0, negative_prompt=None, num_inference_steps=1, height=32,
                width=48, control_image=Image.open(EXAMPLE).crop((0, 0, 48, 32)), output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
        finally:
            pipe.controlnets = []

    @functools.cache  # noqa: B019
    def controlnet(self, blockwise: bool = False) -> nn.Module:
        from qwenedit.networks import blockwise_controlnet, controlnet

        config = self.load().mmdit.config
        if blockwise:
            net: nn.Module = blockwise_controlnet.BlockwiseControlNet(
                blockwise_controlnet.BlockwiseControlNetConfig(
                    num_layers=config.num_layers, width=config.width, in_channels=config.in_channels,
                    extra_condition_channels=0,
                )
            )  # fmt: skip
        else:
            names = (one.name for one in dataclasses.fields(controlnet.ControlNetConfig))
            shared = {name: getattr(config, name) for name in names if hasattr(config, name)}
            net = controlnet.ControlNet(controlnet.ControlNetConfig(**{**shared, "num_layers": 2}))
        for parameter in net.parameters():
            parameter.copy_(_random(*parameter.shape) * (0.1 if parameter.ndim > 1 else 1.0))
        return net

    def decompose(self) -> Tensor:
        pipe = self.load(self.folder_layered)
        return self._result(pipe.decompose, "a red circle", output_type="pt", layers=1, resolution=64)

    def encode_video(self) -> Tensor:
        return self.load().vae.encode(_random(1, 3, 9, 32, 32).clamp(-1, 1)).mode()

    def decode_video(self) -> Tensor:
        return self.load().vae.decode(self._latents(3))

    def encode_picture(self) -> Tensor:
        """The encoder alone: the convolution after it could hide a change."""
        return self.load().vae.encoder(_random(1, 3, 1, 32, 32).clamp(-1, 1))

    def decode_picture(self) -> Tensor:
        return self.load().vae.decoder(self._latents(1))

    def _latents(self, frames: int) -> Tensor:
        return _random(1, self.load().vae.config.z_dim, frames, 4, 4)

    def classes(self, network: nn.Module) -> list[list[str]]:
        """File and name of every class of the package in a network, including base classes."""
        kinds = {kind for module in network.modules() for kind in type(module).__mro__}
        own = {kind for kind in kinds if kind.__module__.startswith("qwenedit.")}
        return sorted([_file_of(kind, self.package), kind.__name__] for kind in own)

    @staticmethod
    def _result(
        call: Callable[..., Any], prompt: str, *, steps: int = 1, output_type: str = "latent", **options: Any
    ) -> Tensor:
        from qwenedit.mini import EXAMPLE

        generator = torch.Generator().manual_seed(0)
        return call(
            Image.open(EXAMPLE), prompt, true_cfg_scale=4.0, num_inference_steps=steps, generator=generator,
            output_type=output_type, **options,
        ).images  # fmt: skip


Run = Callable[[Models], list[Tensor]]

# A changed forward is tried in these runs, in this order, until one changes.
RUNS: dict[str, Run] = {
    "edit": lambda models: [models.edit("latent"), models.edit("pt")],
    "2511": lambda models: [models.edit_2511()],
    "layered": lambda models: [models.decompose()],
    "LoRA": lambda models: [models.edit_with_lora()],
    "control": lambda models: [models.generate_under_control()],
    "blockwise": lambda models: [models.generate_under_control(blockwise=True)],
    "video": lambda models: [models.encode_video(), models.decode_video()],
}

# A network, and a way to run it that uses every class in it.
MODES: dict[str, tuple[Callable[[Models], nn.Module], Run]] = {
    "resident": (lambda models: models.load(models.folder_2511).mmdit, lambda models: [models.edit_2511()]),
    "stream": (
        lambda models: models.load(models.folder_2511).mmdit,
        lambda models: [models.edit_2511(residency="stream")],
    ),
    "precomputed": (
        lambda models: models.load(models.folder_2511).mmdit,
        lambda models: [models.edit_2511(modulation="precomputed")],
    ),
    "float8": (
        lambda models: models.load(models.folder_2511).mmdit,
        lambda models: [models.edit_2511(storage="float8")],
    ),
    "shared prefix": (
        lambda models: models.load().vision_language,
        lambda models: [models.edit_with_shared_prefix()],
    ),
    "control": (lambda models: models.controlnet(), lambda models: [models.generate_under_control()]),
    "blockwise": (
        lambda models: models.controlnet(blockwise=True),
        lambda models: [models.generate_under_control(blockwise=True)],
    ),
    "encode": (lambda models: models.load().vae.encoder, lambda models: [models.encode_picture()]),
    "decode": (lambda models: models.load().vae.decoder, lambda models: [models.decode_picture()]),
    "encode video": (lambda models: models.load().vae.encoder, lambda models: [models.encode_video()]),
    "decode video": (lambda models: models.load().vae.decoder, lambda models: [models.decode_video()]),
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _digest(tensors: Sequence[Tensor]) -> str:
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in tensors)).hexdigest()


def _file_of(kind: type, package: Path) -> str:
    file = sys.modules[kind.__module__].__file__
    assert file is not None
    return Path(file).relative_to(package).as_posix()


@contextmanager
def _copy(forward: Forward | None) -> Iterator[Path]:
    """A copy of the package, one forward changed, that `import qwenedit` finds."""
    with tempfile.TemporaryDirectory(prefix="qwenedit-copy-") as folder:
        package = Path(folder) / PACKAGE.name
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, package, copy_function=os.symlink, ignore=caches)
        if forward is not None:
            source = (package / forward.file).read_text()
            (package / forward.file).unlink()  # the link
            (package / forward.file).write_text(changed(source, forward.name))
        sys.path.insert(0, folder)
        yield package


def _prepare() -> None:
    """Do the work that all children share: imports, and compiling the unchanged sources."""
    torch.set_num_threads(1)  # a process that has started threads must not fork
    torch.set_grad_enabled(False)
    for name in ("einops", "numpy", "safetensors.torch", "tokenizers", "torch._dynamo", "tqdm"):
        importlib.import_module(name)
    sources = [file.read_bytes() for file in PACKAGE.rglob("*.py")]
    code = {source: compile(source, "a copy", "exec", dont_inherit=True) for source in sources}
    sys.dont_write_bytecode = True
    original = SourceFileLoader.source_to_code

    def source_to_code(self: SourceFileLoader, data: Any, path: Any, **options: Any) -> Any:
        return code[data] if data in code else original(self, data, path, **options)

    SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign]
    gc.freeze()  # garbage collections in the children skip the objects of the parent


def _in_children(work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """The results of `work` for the jobs, in order. Each job gets a forked process."""
    running: deque[tuple[int, int]] = deque()
    for job in jobs:
        running.append(_start(work, job))
        if len(running) == AT_ONCE:
            yield _finish(*running.popleft())
    while running:
        yield _finish(*running.popleft())


def _start(work: Callable[[Any], Any], job: Any) -> tuple[int, int]:
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    signal.alarm(SECONDS)
    status = 1
    try:
        os.write(write, json.dumps(work(job)).encode())  # less than a pipe holds
        status = 0
    except BaseException:
        print(f"{job}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _finish(pid: int, read: int) -> Any:
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a child ended with status {status}")
    return json.loads(answer)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(*sys.argv[1:])
    else:
        for outcome in outcomes():
            print(outcome, flush=True)
