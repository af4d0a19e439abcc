"""CLIP's tokenizer: byte-level BPE on cleaned, lower-case text, with the vocabulary of the open_clip package."""

from __future__ import annotations

import gzip
import html
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from frozen_fast.errors import UserError
from frozen_fast.models.text.tokenizer import Tokenizer

VOCABULARY_PACKAGE, VOCABULARY_FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
"""Number of the file's merges that CLIP uses; with 2 * 256 byte symbols and two special tokens there are 49,408 ids."""

START, END = "<|startoftext|>", "<|endoftext|>"
PAD = "!"
"""The token of id 0, the padding of OpenAI's code."""

WORD_END = "</w>"
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class ClipTokenizer(Tokenizer):
    """Converts captions to ids: start of text, at most max_tokens - 2 tokens, end of text, padding of id 0.

    Text is first cleaned as in CLIP: ftfy, HTML entities unescaped twice, white space collapsed, lower case.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, max_tokens: int, pad_token: str = PAD) -> None:
        """Initialise with the result of clip_backend(), or a backend that this class saved; needs ftfy (extra clip)."""
        super().__init__(backend, max_tokens=max_tokens, pad_token=pad_token)
        try:
            from ftfy import fix_text
        except ImportError as error:
            raise _extra_missing("ftfy") from error
        self._fix_text = fix_text

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise captions, padded to the longest of them; see Tokenizer."""
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            return super().__call__(captions)  # raises the error
        return super().__call__([html.unescape(html.unescape(self._fix_text(caption))) for caption in captions])

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ClipTokenizer:
        """Add CLIP's text cleaning to a stored tokenizer, which was read as a plain one."""
        return cls(tokenizer._backend, max_tokens=tokenizer.max_tokens, pad_token=tokenizer.pad_token)

    @classmethod
    def build(cls, max_tokens: int = 77) -> ClipTokenizer:
        """CLIP's tokenizer.

        Args:
            max_tokens: 77 in CLIP, 32 in CLIP4Clip and CLIP2Video, special tokens included.

        Raises:
            UserError: the extra clip is not installed.
        """
        return cls(clip_backend(), max_tokens=max_tokens)


def clip_backend() -> tokenizers.Tokenizer:
    """Build CLIP's byte-level BPE from the merges file of the open_clip package.

    Raises:
        UserError: the package is not installed.
    """
    package = find_spec(VOCABULARY_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise _extra_missing(VOCABULARY_PACKAGE)
    path = Path(next(iter(package.submodule_search_locations))) / VOCABULARY_FILE
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = [*_byte_symbols(), *(symbol + WORD_END for symbol in _byte_symbols()), *map("".join, merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = [(token, vocabulary[token]) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    return backend


def _byte_symbols() -> list[str]:
    """Return a character per byte in CLIP's order: printable Latin-1 bytes first, the others shifted by 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def _extra_missing(module: str) -> UserError:
    return UserError(
        f"model.text.tokenizer: got clip, and {module} is not installed; allowed with the extra: "
        "pip install frozen-fast[clip]"
    )
