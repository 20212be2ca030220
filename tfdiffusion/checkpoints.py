"""Model files that are never lost, and that say where their training stands.

A checkpoint is a `.keras` file (weights, averages, the optimizer's state, the count of steps that
decides noise and data) with one more entry, `training.json`: what else a training needs to go on as
if it had never stopped. One file, written aside, flushed and renamed: whenever the power fails,
there is the old one or the new one, complete.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

_NOTES = "training.json"


def save(model: Any, path: str | os.PathLike, notes: dict | None = None) -> None:
    """Saves a model, replacing the file at once or not at all.

    Args:
        model: any Keras model.
        path: of a `.keras` file, in a folder that exists.
        notes: to be found by `notes`; anything that JSON can hold.

    Raises:
        OSError: If it cannot be written, the disk being full for instance. The file that was there
            before is still there.
    """
    path = Path(path)
    # One name, so that what a killed process left is overwritten by the next.
    aside = path.with_name(f".{path.stem}.part.keras")
    try:
        model.save(aside)
        if notes is not None:
            with zipfile.ZipFile(aside, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(_NOTES, json.dumps(notes, ensure_ascii=False))
        replace(aside, path)
    except OSError as error:
        kept = f"{str(path)!r} is still the one saved before" if path.exists() else "nothing is"
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"Saving failed: {reason}; {kept}") from error
    finally:
        aside.unlink(missing_ok=True)


def replace(aside: Path, path: Path) -> None:
    """Renames a written file to its name, when it has reached the disk."""
    _flush(aside)
    os.replace(aside, path)
    _flush(path.parent)


def notes(path: str | os.PathLike) -> dict | None:
    """What `save` noted in a file; None if there is nothing, or no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(_NOTES)) if _NOTES in archive.namelist() else None
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error


def write_json(path: Path, value: object) -> None:
    """Writes JSON aside and renames it."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
