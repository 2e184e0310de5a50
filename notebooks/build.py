"""Execute the notebooks in place, as they are committed: `python -m notebooks.build [FILE ...]`.

Each runs in a fresh kernel, from top to bottom. Output that depends on the machine or the time is removed, so
that a rebuilt notebook differs only where its results do.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
TIMEOUT = 300  # seconds a cell, enough on a busy machine
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.ipynb"))


def executed(path: Path) -> NotebookNode:
    """The notebook with the outputs of a fresh kernel of this Python, on two threads (or OMP_NUM_THREADS).

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",  # a download fails at once
        "TQDM_DISABLE": "1",  # progress bars show times
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # no warnings about this machine's sockets
    )
    client.execute(cwd=str(path.parent), env=environment)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                figure = data.get("text/plain", "").startswith("<Figure")
                data["image/png"] = smaller(data["image/png"], figure)
    return stripped(notebook)


def smaller(png: str, figure: bool) -> str:
    """A PNG in base64, recompressed; figures, unlike pictures, are reduced to 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if figure:
        image = image.quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook without metadata, addresses of objects and duplicate pictures."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop("image/jpeg", None)  # Pillow emits both
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9A-Fa-f]+", "", data["text/plain"])
            if "metadata" in output:
                output.metadata = NotebookNode()
    return notebook


def main() -> None:
    for path in [Path(name).resolve() for name in sys.argv[1:]] or notebooks():
        start = time.perf_counter()
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
