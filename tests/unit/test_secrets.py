"""Keys and passwords stay out of what is written, and ordinary text stays as it is."""

from __future__ import annotations

import logging

import pytest

from frozen_fast.common.logs import set_up_logging
from frozen_fast.common.secrets import hide_secrets, without_secrets


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "comet_api_key", "TOKEN"]
)
def test_the_value_of_a_secret_variable_is_hidden_wherever_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "v4lue/of-the+secret")
    assert hide_secrets("--key=v4lue/of-the+secret, twice: v4lue/of-the+secret") == "--key=[hidden], twice: [hidden]"
    assert without_secrets({"a": ["v4lue/of-the+secret", 3], "b": None}) == {"a": ["[hidden]", 3], "b": None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false-as-always"),
        ("KEYBOARD", "qwertzuiop"),
        ("HF_TOKEN", "short"),
        ("SSL_KEY", "/etc/ssl/key.pem"),
        ("MONKEY", "bananas-and-more"),
    ],
)
def test_other_variables_are_no_secrets(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert hide_secrets(f"a {value} b") == f"a {value} b"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("s3 https://user:pass@host/bucket/x.mp4", "s3 https://[hidden]@host/bucket/x.mp4"),
        ("a hf_" + "a1" * 16 + " b", "a [hidden] b"),
        ("ghp_" + "Z" * 30, "[hidden]"),
        ("AKIA" + "A1" * 8, "[hidden]"),
        ("https://host:8080/path@x", "https://host:8080/path@x"),
        ("commit 0123456789abcdef0123456789abcdef01234567", "commit 0123456789abcdef0123456789abcdef01234567"),
        ("max_tokens: 32", "max_tokens: 32"),
    ],
)
def test_well_known_forms(text: str, hidden: str) -> None:
    assert hide_secrets(text) == hidden


def test_log_lines_and_tracebacks_are_clean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789-secret")
    set_up_logging()
    try:
        raise RuntimeError("refused: 0123456789-secret")
    except RuntimeError:
        logging.getLogger("frozen_fast.test").exception("key %s", "0123456789-secret")
    told = capsys.readouterr().err
    assert "key [hidden]" in told and "RuntimeError: refused: [hidden]" in told and "-secret" not in told
