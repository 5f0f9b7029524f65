"""Keeping secrets out of what a run writes: configs, logs, dumps."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"
# Whole words of a name, so that "tokens", "tokenizer" or "keys" are none.
SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|password|passwd|credentials?|api_?key|access_?key(?:_id)?|private_?key)$",
    re.IGNORECASE,
)
PATTERNS = (
    # scheme://user:password@host; one slash where pathlib has been at it
    (re.compile(r"(\b[a-z][a-z0-9+.-]*:/+)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    # ?token=..., &X-Amz-Signature=..., and options: --api_key=..., --hf_token ...
    (
        re.compile(
            r"([?&-][\w.-]*(?:token|secret|password|passwd|signature|credential|api_?key|access_?key)(?:=|\s+))[^\s&'\"]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # tokens that say what they are: Hugging Face, GitHub, OpenAI and Anthropic, AWS, Slack
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|AKIA|xox[abprs]-)[A-Za-z0-9_-]{16,}"), HIDDEN),
)
SHORTEST = 8  # characters of a variable's value that is worth hiding: "1" or "true" is no secret


def redact(text: str) -> str:
    """`text` without credentials in URLs, values of options and URL parameters that are named like secrets, known forms
    of tokens, and the values of environment variables that are named like secrets."""
    for value in sorted(environment_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def environment_secrets() -> set[str]:
    """Values of variables like WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY."""
    return {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}


def redact_config(config: Any) -> Any:
    """A nested config with every string redacted, and every string whose key is named like a secret hidden."""
    if isinstance(config, Mapping):
        return {
            key: HIDDEN if isinstance(value, str) and SECRET_NAME.search(str(key)) else redact_config(value)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact_config(value) for value in config]
    return redact(config) if isinstance(config, str) else config
