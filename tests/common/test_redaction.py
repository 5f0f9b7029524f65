"""What is hidden, and what is left alone."""

import pytest

from common.redaction import HIDDEN, redact, redact_config


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:s3cret@example.org/data", f"https://{HIDDEN}@example.org/data"),
        ("git clone https://aToken@example.org/x.git now", f"git clone https://{HIDDEN}@example.org/x.git now"),
        ("s3://bucket/x?X-Amz-Signature=abc&part=2", f"s3://bucket/x?X-Amz-Signature={HIDDEN}&part=2"),
        ("--corpus.hf_token=abc --workers 3", f"--corpus.hf_token={HIDDEN} --workers 3"),
        ("--corpus.api_key abc", f"--corpus.api_key {HIDDEN}"),
        ("it says hf_" + "a1" * 17, f"it says {HIDDEN}"),
        ("ghp_" + "a1" * 18, HIDDEN),
    ],
)
def test_secrets_are_hidden(text: str, safe: str) -> None:
    assert redact(text) == safe


@pytest.mark.parametrize(
    "text",
    [
        "--stats.tokens 4096",
        "https://example.org/a@b",
        "me@example.org",
        "prepared/stdlib/tokenizer.model",
        "step 3: loss 2",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKEN", "1")  # too short to be one
    monkeypatch.setenv("TOKENIZER", "tokenizer.model")
    assert redact("1: key 0123456789abcdef of tokenizer.model") == f"1: key {HIDDEN} of tokenizer.model"


def test_configs_are_redacted_by_key_and_by_value() -> None:
    config = {
        "stats": {"tokens": 4096},
        "hf_token": "abc",
        "token": None,
        "sources": [{"path": "https://a:b@c/d"}],
        "x": 0.1,
    }
    safe = {
        "stats": {"tokens": 4096},
        "hf_token": HIDDEN,
        "token": None,
        "sources": [{"path": f"https://{HIDDEN}@c/d"}],
    }
    assert redact_config(config) == {**safe, "x": 0.1}
