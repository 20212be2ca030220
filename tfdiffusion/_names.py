"""Looking things up by name, with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from tfdiffusion import _checks


def unknown(kind: str, name: object, known) -> ValueError:
    """The error for a name nobody knows: what came, what is known, the nearest of them."""
    nearest = difflib.get_close_matches(str(name), known, n=1) if isinstance(name, str) else ()
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return ValueError(
        f"Unknown {kind} {_checks.shown(name)}.{hint} Known: {', '.join(sorted(known))}."
    )


def look_up(kind: str, name: object, table: Mapping):
    """`table[name]`, or a ValueError that lists the names and suggests the nearest."""
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, name, table)
    return table[name]


def one_of(kind: str, name: object, known: Sequence[str]) -> str:
    """The name itself, or a ValueError that lists the known ones and suggests the nearest."""
    if not isinstance(name, str) or name not in known:
        raise unknown(kind, name, known)
    return name
