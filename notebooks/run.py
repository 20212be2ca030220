"""Runs the notebooks, and keeps their outputs true.

    python notebooks/run.py                 # run every chapter and save its outputs
    python notebooks/run.py 03 05           # these two
    python notebooks/run.py --fast          # with the small sizes of the tests; saves nothing
    python notebooks/run.py --fast --check  # and compare the numbers of the cells tagged `checked`
    python notebooks/run.py 03 --fast --out /tmp/look

What makes a notebook one of ours (`tests/test_notebooks.py` holds each to it):

* The first cell is markdown and has the title, `# 3. Langevin dynamics`.
* The second is code, tagged `parameters`, and assigns constants in upper case. The notebook's
  metadata give the small values: `{"tfdiffusion": {"fast": {"STEPS": 50}}}`. A chapter that writes
  pictures has the parameter `ASSETS = "../assets"`; runs that save nothing send it elsewhere.
  With `"eager": true` beside `"fast"`, small runs do without graphs, which suits a chapter that
  makes many of them and runs each a few times.
* Cells tagged `checked` print numbers that do not depend on the parameters, and that any machine
  finds again: closed forms, and seeded experiments without training.
* Cells tagged `exercise` check a reader's answer with `assert`; the cell above such a cell, tagged
  `answer`, holds ours, collapsed.
* One of the headings is "What to read".

A run is saved only if every cell ran and none wrote to stderr or warned. With the outputs a digest
of the code is saved, so that a test sees when somebody has edited one without the other.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 4_000_000
CELL_TIMEOUT = 900  # seconds
RELATIVE_TOLERANCE = 1e-3  # of a checked number, or one unit of its last printed digit

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
_WARNING = re.compile(r"warning:", re.IGNORECASE)
# How small runs save time: optimizing a graph takes longer than a few steps gain by it, and so may
# making one. (What TensorFlow warns of, that input pipelines stay graphs, is as it should be.)
_AS_TRACED = """\
import tensorflow as tf
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})"""
_EAGER = """\
import warnings
warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_functions_eagerly`")
import tensorflow as tf
tf.config.run_functions_eagerly(True)"""
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")


def notebooks(chapters: Sequence[str] = ()) -> list[Path]:
    """Paths of the chapters that begin with these numbers, of all without any.

    Raises:
        ValueError: If a number is no chapter's.
    """
    every = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
    wanted = [number.zfill(2) for number in chapters]
    missing = [number for number in wanted if not any(p.name.startswith(number) for p in every)]
    if missing:
        have = ", ".join(path.name[:2] for path in every) or "none"
        raise ValueError(f"There is no chapter {', '.join(missing)}; there are {have}.")
    return [path for path in every if not wanted or path.name[:2] in wanted]


def read(path: str | os.PathLike) -> NotebookNode:
    """Reads a notebook, without changing it to another version of the format."""
    import nbformat

    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """Code cells with a tag."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and tag in cell.metadata.get("tags", [])
    ]


def digest(notebook: NotebookNode) -> str:
    """A digest of all code, in order: that of the run which made the outputs."""
    code = [cell.source.rstrip() for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------- running


def execute(notebook: NotebookNode, changes: dict | None = None, setting: str = "") -> NotebookNode:
    """Runs all cells in order, in a fresh kernel in the folder of the notebooks.

    Args:
        notebook: left as it is.
        changes: parameter → value, assigned in a cell behind the one tagged `parameters`.
        setting: code that runs behind those assignments.

    Returns:
        A copy with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    import copy

    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    notebook = copy.deepcopy(notebook)
    lines = [f"{name} = {value!r}" for name, value in (changes or {}).items()]
    lines += [setting] if setting else []
    if lines:
        place = notebook.cells.index(tagged(notebook, "parameters")[0]) + 1
        notebook.cells.insert(place, nbformat.v4.new_code_cell("\n".join(lines)))
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
        # What C++ libraries log when they start goes to the terminal, not into the notebook.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    )
    client.execute()
    return notebook


def small_values(notebook: NotebookNode) -> dict:
    """Values of the parameters in the tests' fast mode."""
    return dict(notebook.metadata.get("tfdiffusion", {}).get("fast", {}))


def run(path: Path, fast: bool = False, save: bool = True) -> NotebookNode:
    """Runs a notebook from its file.

    Args:
        path: of the notebook.
        fast: with the small values.
        save: whether pictures may go to the folder `assets`; otherwise they go to a folder that
            is removed.

    Returns:
        The notebook with outputs.
    """
    notebook = read(path)
    changes = small_values(notebook) if fast else {}
    with tempfile.TemporaryDirectory() as folder:
        if not save and "ASSETS" in tagged(notebook, "parameters")[0].source:
            changes["ASSETS"] = folder
        eager = notebook.metadata.get("tfdiffusion", {}).get("eager", False)
        return execute(notebook, changes, (_EAGER if eager else _AS_TRACED) if fast else "")


def normalized(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook as it is committed: no times, versions or random names in it."""
    ours = dict(notebook.metadata.get("tfdiffusion", {}))
    notebook.metadata.clear()
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata["tfdiffusion"] = {**ours, "digest": digest(notebook)}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:2]}-{i:03d}"
        kept = ("tags", "jupyter")
        cell["metadata"] = {key: cell.metadata[key] for key in kept if key in cell.metadata}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = {}
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Saves a notebook by writing it aside and renaming it."""
    import nbformat

    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- checking


def printed(cell: NotebookNode) -> str:
    """What a code cell printed and returned, as text; pictures count for nothing."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type == "execute_result" and "image/png" not in output.data:
            parts.append(output.data.get("text/plain", ""))
    return "\n".join(part.rstrip("\n") for part in parts)


def blemishes(notebook: NotebookNode) -> Iterator[str]:
    """What must not be in a committed output: errors, stderr, warnings, addresses in memory."""
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {i} failed: {output.ename}: {output.evalue}"
            elif output.output_type == "stream" and output.name == "stderr":
                yield f"cell {i} wrote to stderr: {output.text.strip()[:300]}"
        if cell.cell_type == "code":
            text = printed(cell)
            if _WARNING.search(text):
                yield f"cell {i} shows a warning: {text[:300]}"
            if _ADDRESS.search(text):
                yield f"cell {i} shows an address in memory, another one each time: {text[:300]}"


def disagreements(notebook: NotebookNode, committed: NotebookNode) -> Iterator[str]:
    """Where cells tagged `checked` print something else than those that are committed."""
    pairs = itertools.zip_longest(tagged(notebook, "checked"), tagged(committed, "checked"))
    for new, old in pairs:
        if new is None or old is None:
            yield "the notebooks have different numbers of cells tagged `checked`"
        elif not same_text(printed(new), printed(old)):
            yield f"a checked cell printed\n{printed(new)}\nand the notebook says\n{printed(old)}"


def same_text(new: str, old: str) -> bool:
    """Whether two texts agree: words exactly, numbers to the tolerance."""
    if _NUMBER.sub("#", new).split() != _NUMBER.sub("#", old).split():
        return False
    return all(map(_close, _NUMBER.findall(new), _NUMBER.findall(old)))


def _close(new: str, old: str) -> bool:
    unit = max(_last_digit(new), _last_digit(old))
    return abs(float(new) - float(old)) <= max(
        RELATIVE_TOLERANCE * abs(float(old)), 1.01 * unit if unit < 1 else 0.0
    )


def _last_digit(number: str) -> float:
    """Unit of the last printed digit: 0.01 of 3.14, 1e-5 of 2.0e-4, 1 of a whole number."""
    mantissa, _, exponent = number.lower().partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


# ---------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every notebook ran clean, otherwise 1."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="numbers, such as 03 05; all without any")
    parser.add_argument("--fast", action="store_true", help="small sizes; the chapter stays as is")
    parser.add_argument("--check", action="store_true", help="compare checked cells; save nothing")
    parser.add_argument("--out", type=Path, help="folder to save to instead")
    options = parser.parse_args(arguments)
    try:
        paths = notebooks(options.chapters)
    except ValueError as error:
        parser.error(str(error))
    in_place = not (options.fast or options.check or options.out)
    failed = 0
    for path in paths:
        began = time.perf_counter()
        try:
            notebook = run(path, options.fast, save=in_place)
            faults = list(blemishes(notebook))
        except Exception as error:  # a cell may fail in any way; the others still get their turn
            notebook, faults = None, [f"{type(error).__name__}: {error}"]
        if notebook and options.check:
            faults += disagreements(notebook, read(path))
        if notebook and options.out:
            write(normalized(notebook, path.name), options.out / path.name)
        if notebook and in_place and not faults:
            write(normalized(notebook, path.name), path)
            if path.stat().st_size > MAX_BYTES:
                faults = [f"{path.stat().st_size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:g}"]
        failed += bool(faults)
        print(f"{path.name}: {'; '.join(faults) or 'ok'} ({time.perf_counter() - began:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
