"""Every model and attention YAML builds, and the sizes are what their names say."""

from pathlib import Path

import pytest
import torch
import yaml

from model.config import config_from_dict
from model.transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "configs"
PARAMETERS = {  # with the softmax attention; asentmax adds its temperature and alphas
    "smoke": 3_950_848,
    "30m": 31_597_056,
    "125m": 123_587_328,
    "350m": 359_842_816,
    "1b": 1_100_048_384,  # TinyLlama-1.1B
    "8b": 8_030_261_248,  # Llama-3-8B
}


def network(*files: Path) -> dict:
    merged: dict = {}
    for file in files:
        merged.update(yaml.safe_load(file.read_text())["model"]["network"])
    return merged


def test_every_size_has_its_count() -> None:
    assert {path.stem for path in (CONFIGS / "models").glob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("attention", sorted((CONFIGS / "attention").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("size", sorted(PARAMETERS))
def test_builds_on_the_meta_device(size: str, attention: Path) -> None:
    config = config_from_dict(network(CONFIGS / "models" / f"{size}.yaml", attention))
    with torch.device("meta"):
        model = Transformer(config)
    count = sum(p.numel() for p in model.parameters())
    scaled = config.n_layers * (config.n_heads - config.n_alibi_heads)
    extra = {
        "softmax": 0,
        "hierarchical": config.n_layers * config.n_heads,
        "dms": config.n_layers * config.n_kv_heads * config.d_model,
        "ssmax": scaled,
        "entmax": config.n_layers * config.n_heads * config.attention.learn_alpha,
        "asentmax": config.n_layers * config.n_heads * config.attention.learn_alpha + 2 * scaled * (config.d_model + 1),
    }
    kind = attention.stem.removesuffix("_dense")
    assert config.attention.kind == kind
    if kind in extra:
        assert count == PARAMETERS[size] + extra[kind]
    else:  # feed-forward layers make up for what it adds, in steps of 16 units
        assert abs(count - PARAMETERS[size]) <= config.n_layers * 3 * config.d_model * 8 < 0.02 * PARAMETERS[size]


@pytest.mark.parametrize(("kind", "width"), [("nsa", 848), ("dsa", 1328)])
def test_widths_that_the_yaml_names(kind: str, width: int) -> None:
    file = CONFIGS / "attention" / f"{kind}.yaml"
    config = config_from_dict(network(CONFIGS / "models" / "30m.yaml", file))
    assert (config.d_ff, config.feed_forward_size) == (1376, width)
    assert f"{width:,} instead of 1,376" in file.read_text()
