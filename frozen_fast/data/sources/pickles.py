"""Reads published pickles of plain values without executing code from them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from frozen_fast.errors import UserError


class _IntegerType:
    """Replacement for numpy.dtype that stores the integer type's code and byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if str(code).lstrip("<>|=")[:1] not in ("i", "u"):
            raise pickle.UnpicklingError(f"a numpy value of type {code!r}; allowed: integers")
        self.code = str(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.code = f"{state[1]}{self.code.lstrip('<>|=')}"

    def value(self, data: bytes) -> int:
        return int.from_bytes(data, "big" if self.code[0] == ">" else "little", signed="i" in self.code)


def _integer(kind: _IntegerType, data: bytes) -> int:
    """Replacement for numpy's scalar constructor."""
    return kind.value(data)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Replacement for _codecs.encode, which old pickle protocols use for bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "dtype"): _IntegerType,
    ("numpy.core.multiarray", "scalar"): _integer,
    ("numpy._core.multiarray", "scalar"): _integer,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    """Accepts containers, strings, numbers and NumPy integers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused")
        return _STAND_INS[module, name]


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle file of dicts, lists, strings, numbers and NumPy integers (converted to int).

    Raises:
        UserError: the file is not a pickle, or contains anything else.
    """
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # noqa: BLE001  a broken pickle raises almost anything
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a pickle of plain values ({type(error).__name__}: {reason})") from None


def load_word_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """A raw-captions.pkl, video -> list of captions as lists of words, with the words joined by spaces.

    Raises:
        UserError: as load_plain_pickle, or the structure differs, naming the first such video.
    """
    videos = load_plain_pickle(path)
    if not isinstance(videos, dict):
        raise UserError(f"{path}: got {type(videos).__name__}; allowed: a dict of video to lists of words")
    captions = {}
    for video, sentences in videos.items():
        whole = (
            isinstance(video, str)
            and isinstance(sentences, (list, tuple))
            and all(
                isinstance(words, (list, tuple)) and all(isinstance(word, str) for word in words) for words in sentences
            )
        )
        if not whole:
            raise UserError(f"{path}: {video!r:.80}: got {sentences!r:.80}; allowed: a list of lists of words")
        captions[video] = tuple(text for text in (" ".join(words).strip() for words in sentences) if text)
    return captions
