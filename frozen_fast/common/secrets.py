"""Keys and passwords are kept out of run folders, logs and trackers.

A secret is the value of an environment variable whose name says so (WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY), a
token of a well-known form, or the password of an address. Nothing else can be told from ordinary text.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "[hidden]"
_NAMES = re.compile(
    r"(^|_)(API_?KEY|ACCESS_?KEY|SECRET_?KEY|PRIVATE_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Characters; a shorter value would be found in ordinary text."""
_FORMS = re.compile(r"\b(hf_\w{20,}|gh[pousr]_\w{20,}|sk-[\w-]{20,}|AKIA[0-9A-Z]{16})")
_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+:[^/\s@'\"]+(?=@)")


def hide_secrets(text: str) -> str:
    """Return text with [hidden] in place of every secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _NAMES.search(name) and not os.path.isabs(value):
            text = text.replace(value, HIDDEN)
    return _ADDRESS.sub(HIDDEN, _FORMS.sub(HIDDEN, text))


def without_secrets(value: Any) -> Any:
    """Return nested plain values with hide_secrets() applied to every text."""
    if isinstance(value, str):
        return hide_secrets(value)
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value
