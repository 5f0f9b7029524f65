"""How the report of eval.sparse_frontier writes ways of attending and densities."""

AS_THEY_ARE = ("dense", "entmax")
NAMES = {
    "dense": "softmax, dense", "entmax": "entmax", "window": "sliding window", "streaming_llm": "StreamingLLM",
    "lm_infinite": "LM-Infinite", "strided": "Strided", "fixed": "Fixed", "longformer": "Longformer",
    "oracle": "oracle blocks", "vertical_slash": "Vertical-Slash", "block_sparse": "Block-Sparse",
    "flexprefill": "FlexPrefill", "sparge": "SpargeAttention", "quest": "Quest", "sparq": "SparQ",
    "twilight": "Twilight", "vattention": "vAttention", "snapkv": "SnapKV", "pyramidkv": "PyramidKV",
    "ada_snapkv": "Ada-SnapKV", "h2o": "H2O", "double_p": "Double-P", "sketch_walk": "Sketch-and-Walk", "bsfa": "BSFA",
    "minference": "MInference",
}  # fmt: skip


def method_name(method: str) -> str:
    return NAMES.get(method, method)


def density_text(share: float | None) -> str:
    """For example "4.87 %"; empty for None."""
    return "" if share is None else f"{100 * share:.3g} %"
