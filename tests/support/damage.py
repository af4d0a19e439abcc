"""Hypothesis strategies that damage files: bytes, text, JSON values and pickles."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8)
WORDS = (
    "&a", "*a", "<<: *a", "[", "]" * 3, "{", "}", "[" * 3000, "\n- " * 2000, "\0", "\ufeff", "\n---\n", ": ", "!!int x",
    "1e999", "-1", "9" * 400, ".nan", "null", "~", "''", '"', "../../../outside", "/outside", "=", "[0]", "[999999999]",
    "!!python/object/apply:os.system ['touch {canary}']", "!!binary x", "\ud7ff", "trian", "\u202e", "${x}", "{name.x}",
)  # fmt: skip
VALUES = (None, True, -1, 0, 1e308, float("nan"), 10**400, "", "\0", "../../../outside", "x" * 5000, [], {}, [[[]]])


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with up to three faults."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(content)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("flip", "noise", "extreme", "delete", "repeat", "cut", "insert")))
        if kind == "flip" and first < len(content):
            content[first] ^= 1 << draw(st.integers(0, 7))
        elif kind == "noise":
            content[first : first + length] = draw(st.binary(min_size=length, max_size=length))
        elif kind == "extreme":
            value = draw(st.sampled_from(EXTREMES))
            content[first : first + len(value)] = value
        elif kind == "delete":
            del content[first : first + length]
        elif kind == "repeat":
            content[first:first] = content[first : first + length] * draw(st.integers(1, 50))
        elif kind == "cut":
            del content[first:]
        else:
            content[first:first] = draw(st.binary(min_size=1, max_size=length))
    return bytes(content)


@st.composite
def damaged_text(draw: st.DrawFn, text: str, canary: Path) -> bytes:
    """A text with words that are awkward to read, or damaged as bytes."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(text)))
        end = draw(st.sampled_from((place, place + 1, place + 20)))
        word = draw(st.sampled_from(WORDS)).replace("{canary}", str(canary))
        text = text[:place] + word + text[end:]
    data = text.encode("utf-8", "surrogatepass")
    return draw(st.one_of(st.just(data), damaged_bytes(data)))


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one part in another's place: a wrong type, a missing key, a hostile string."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.sampled_from(("change", "change", "change", "drop", "rename")))
        rest = {name: item for name, item in value.items() if name != key}
        if kind == "change":
            return {**value, key: draw(damaged_value(value[key]))}
        return rest if kind == "drop" else {**rest, draw(st.text(max_size=8)): value[key]}
    if isinstance(value, list) and value and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(damaged_value(value[place])), *value[place + 1 :]]
    return draw(st.one_of(st.sampled_from(VALUES), st.integers(), st.floats(), st.text(max_size=20)))


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file whose value or whose text is damaged."""
    whole = json.dumps(value).encode()
    return st.one_of(damaged_value(value).map(lambda found: json.dumps(found).encode()), damaged_bytes(whole))


class _Runs:
    """Unpickles by running a command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        import os

        return os.system, (self._command,)


def damaged_pickle(value: Any, canary: Path) -> st.SearchStrategy[bytes]:
    """A pickle that is damaged, holds another value, or runs a command."""
    hostile = [pickle.dumps({"a": _Runs(f"touch {canary}")}, protocol) for protocol in range(6)]
    others = damaged_value(value).map(pickle.dumps)
    whole = [pickle.dumps(value, protocol) for protocol in (0, 2, 4)]
    return st.one_of(st.sampled_from(hostile), others, *(damaged_bytes(data) for data in whole))
