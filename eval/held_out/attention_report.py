"""The report's part on attention: support, live tiles, entropy and sink, over all and by layer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.held_out import figures as plots
from eval.held_out.attention_profile import LayerProfile
from eval.held_out.config import EvalConfig
from eval.held_out.measurement import Measurement
from eval.reporting.document import Block, Details, Heading, Paragraph, Picture, Table
from eval.reporting.formatting import count
from model.config import config_from_dict
from model.flops import density


def head_mean(layers: Sequence[LayerProfile], multiple: int, name: str) -> float:
    """Mean over layers and heads of a field of LayerProfile at one length."""
    return float(np.mean([getattr(layer, name) for layer in layers if layer.multiple == multiple]))


def entropy_text(nats: float, relative: float) -> str:
    return f"{nats:.2f} ({100 * relative:.0f} %)"


def attention_blocks(
    measurements: Sequence[Measurement], config: EvalConfig, base_length: int, output: Path
) -> list[Block]:
    """Tables and pictures; the pictures are written below output/plots."""
    title, left_out = Heading("Attention: support, live tiles, entropy, sink"), _left_out(measurements, base_length)
    measurements = [one for one in measurements if one.attention]
    if not measurements:
        return [title, *left_out]
    documents = count(min(config.profile_documents, len(measurements[0].plan.documents)), "held-out document")
    return [
        title,
        *_pictures(measurements, base_length, output / "plots"),
        Paragraph(
            f"Mean over layers and heads on {documents}. Support: keys with weight above zero. Live tiles: causal "
            "64x64 tiles of the score matrix that hold weight; others need no work in a sparse kernel. Entropy: of a "
            "query's weights, in nats, and as a share of the log of its visible keys (100 %: the same weight on "
            f"every key). Sink: weight on the document's first {config.sink_tokens} tokens. Entropy and sink are "
            f"means over at most {config.profile_queries} queries a document, one at random of each of that many equal "
            "stretches; support and live tiles over all queries."
        ),
        Table(
            ["run", "context (tokens)", "support (keys)", "live tiles", "entropy (nats)", "sink"],
            [_overall_row(one, multiple, base_length) for one in measurements for multiple in _multiples(one)],
        ),
        *left_out,
        Details("Layer by layer", _layer_tables(measurements, base_length)),
    ]


# What is read, by kind
READS = {
    "nsa": "What its branches read together (compressed keys, those of selected blocks and the window's)",
    "dsa": "What it reads (the chosen keys, in stage warmup all, and the products of the indexer beside those of dense "
    "attention)",
}


def _left_out(measurements: Sequence[Measurement], base_length: int) -> list[Block]:
    """What is said of runs without profiles, those of model.trained_sparse."""
    return [
        Paragraph(
            f"{one.label} is not in this part: of {one.model['attention']['kind']} it knows no weights. "
            f"{READS[one.model['attention']['kind']]}, as a share of the visible keys of one document: "
            f"{_densities(one, base_length)}."
        )
        for one in measurements
        if not one.attention
    ]


def _densities(one: Measurement, base_length: int) -> str:
    config = config_from_dict(one.model)
    lengths = [multiple * base_length for multiple in one.plan.multiples]
    return ", ".join(f"{100 * density(config, [length]):.1f} % at {length:,} tokens" for length in lengths)


def _pictures(measurements: Sequence[Measurement], base_length: int, folder: Path) -> list[Block]:
    everyone = {one.label: one.attention for one in measurements}
    # Softmax has all keys and all tiles by construction: a line in every plot, not a plot of its own.
    kinds = {one.label: config_from_dict(one.model).attention for one in measurements}
    sparse = {label: layers for label, layers in everyone.items() if kinds[label].has_statistics}
    with_alpha = {label: layers for label, layers in sparse.items() if layers[0].alpha is not None}
    blocks: list[Block] = []
    if sparse:
        path = plots.by_layer(sparse, plots.SPARSITY, base_length, folder / "sparsity.png")
        blocks.append(Picture(path, "Support size and share of live tiles by layer and context length."))
    if with_alpha:
        path = plots.alpha_by_head(with_alpha, folder / "alpha_by_head.png")
        blocks.append(Picture(path, "Alpha of every head by layer."))
    path = plots.by_layer(everyone, plots.SPREAD, base_length, folder / "attention_spread.png")
    return [
        *blocks,
        Picture(path, "Entropy of attention and weight on the first tokens by layer and context length."),
    ]


def _multiples(measurement: Measurement) -> list[int]:
    return sorted({layer.multiple for layer in measurement.attention})


def _overall_row(one: Measurement, multiple: int, base_length: int) -> list[str]:
    names = ("support", "live_share", "entropy", "relative_entropy", "sink_share")
    support, live, entropy, relative, sink = (head_mean(one.attention, multiple, name) for name in names)
    cells = [f"{support:,.1f}", f"{100 * live:.1f} %", entropy_text(entropy, relative), f"{100 * sink:.1f} %"]
    return [one.label, f"{multiple * base_length:,}", *cells]


def _layer_tables(measurements: Sequence[Measurement], base_length: int) -> list[Block]:
    """One table a measure, a row for each run and layer; means over heads."""
    cells: dict[str, Callable[[LayerProfile], str]] = {
        "Entropy in nats (share of the log of the visible keys)": lambda one: entropy_text(
            float(np.mean(one.entropy)), float(np.mean(one.relative_entropy))
        ),
        "Support in keys": lambda one: f"{np.mean(one.support):,.1f}",
        "Sink": lambda one: f"{100 * np.mean(one.sink_share):.1f} %",
    }
    multiples = _multiples(measurements[0])
    header = ["run", "layer", *(f"{multiple}x ({multiple * base_length:,})" for multiple in multiples)]
    blocks: list[Block] = []
    for title, cell in cells.items():
        rows = [
            [one.label, str(layer), *(cell(profile) for profile in one.attention if profile.layer == layer)]
            for one in measurements
            for layer in sorted({profile.layer for profile in one.attention})
        ]
        blocks.append(Table(header, rows, caption=f"{title}, by layer and context length"))
    return blocks
