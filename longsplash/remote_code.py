"""What a model's folder holds so that transformers finds its code in this package with trust_remote_code=True."""

from pathlib import Path

CODE = Path(__file__).with_name("modeling_longsplash.py")  # copied into the folder
MODEL_TYPE = "longsplash"
AUTO_MAP = {
    auto: f"{CODE.stem}.LongSplash{kind}"
    for auto, kind in (("AutoConfig", "Config"), ("AutoModel", "Model"), ("AutoModelForCausalLM", "ForCausalLM"))
}
