"""Models that this recipe has trained with alpha-entmax, for transformers. Importing this module registers them.

    import longsplash.hub
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)  # of `python -m model.export RUN FOLDER --format transformers`

Needs transformers (`pip install longsplash[hub]`); longsplash.register() imports this too.
"""

import math
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mistral.configuration_mistral import MistralConfig

from longsplash.models import DEFAULT_NAME, register_attention, registered_names
from longsplash.remote_code import AUTO_MAP, CODE, MODEL_TYPE


@strict
class LongSplashConfig(MistralConfig):
    """Mistral's keys, and these.

    alpha, alpha_min, alpha_max, learn_alpha: a head's alpha is alpha, or where learned alpha_min + (alpha_max -
    alpha_min) * sigmoid(raw + c), raw a weight, c so that raw = 0 means alpha. alpha_from, alpha_progress: it stands
    the share alpha_progress of the way from alpha_from to that. adaptive_temperature: scores are multiplied by the
    temperature of ASEntmax (arXiv:2506.16640), with temperature_offset and temperature_range; in fresh models
    temperature_bias is the bias inside its softplus. positions: rope, nape (ALiBi with nape_slopes on the first half of
    the heads, none on the others) or nope (none). nope_layers: layers without rotary positions. qkv_bias, qk_norm:
    biases of the projections to queries, keys and values; RMSNorm over each query and key head.
    """

    model_type = MODEL_TYPE

    sliding_window: int | None = None
    alpha: float = 1.5
    learn_alpha: bool = True
    alpha_min: float = 1.01
    alpha_max: float = 2.0
    alpha_from: float = 1.01
    alpha_progress: float = 1.0
    adaptive_temperature: bool = False
    temperature_offset: float = 1.0
    temperature_range: float = 2.0
    temperature_bias: float = 0.0
    positions: str = "rope"
    nape_slopes: str = "linear"
    nope_layers: list[int] | tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers' own, with what trust_remote_code reads."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CODE, Path(save_directory) / CODE.name)
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: a saved model refers to the package, it holds no copy of this file."""

    @property
    def n_alibi_heads(self) -> int:
        """They come first."""
        return self.num_attention_heads // 2 if self.positions == "nape" else 0

    def alibi_slopes(self, device: torch.device) -> Tensor | None:
        """float32 (H,), zeros after the ALiBi heads; None where there are none."""
        if not self.n_alibi_heads:
            return None
        rank = torch.arange(self.num_attention_heads, device=device, dtype=torch.float32)
        slopes = 1 / (rank + 1) if self.nape_slopes == "linear" else 2**-rank
        return slopes * (rank < self.n_alibi_heads)


class EntmaxAlpha(nn.Module):
    """Alpha of each head of a layer. alpha_raw (H,) is near 0 and keeps its resolution in bfloat16, unlike alpha."""

    def __init__(self, config: LongSplashConfig):
        super().__init__()
        self.config = config
        self.alpha_raw = nn.Parameter(torch.zeros(config.num_attention_heads)) if config.learn_alpha else None

    def forward(self) -> float | Tensor:
        """float32 (H,), or one number for all heads, for which the kernels have faster instructions."""
        config = self.config
        alpha: float | Tensor = config.alpha
        if self.alpha_raw is not None:
            share = (alpha - config.alpha_min) / (config.alpha_max - config.alpha_min)
            learned = torch.sigmoid(self.alpha_raw.float() + math.log(share / (1 - share)))
            alpha = config.alpha_min + (config.alpha_max - config.alpha_min) * learned
        if config.alpha_progress < 1:
            alpha = config.alpha_from + (alpha - config.alpha_from) * config.alpha_progress
        return alpha


class AdaptiveTemperature(nn.Module):
    """ASEntmax (arXiv:2506.16640): offset + softplus(beta(x)) * log(2 + position) ** (range * tanh(gamma(x)))."""

    def __init__(self, config: LongSplashConfig):
        super().__init__()
        self.config = config
        n_scaled = config.num_attention_heads - config.n_alibi_heads
        self.beta = nn.Linear(config.hidden_size, n_scaled)
        # transformers calls _init_weights for modules that hold parameters themselves
        self.beta.bias_start = config.temperature_bias  # type: ignore[assignment]
        self.gamma = nn.Linear(config.hidden_size, n_scaled)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """x: (B, T, C); position_ids: (B or 1, T). Returns float32 (B, H, T), 1 for ALiBi heads."""
        log_position = torch.log(2 + position_ids.float())[..., None]
        exponent = self.config.temperature_range * torch.tanh(self.gamma(x).float())
        strength = nn.functional.softplus(self.beta(x).float())
        scaled = self.config.temperature_offset + strength * log_position**exponent
        return nn.functional.pad(scaled.transpose(1, 2), (0, 0, self.config.n_alibi_heads, 0), value=1.0)


class LongSplashAttention(mistral.MistralAttention):
    def __init__(self, config: LongSplashConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, head_dim, kv_heads = config.hidden_size, self.head_dim, config.num_key_value_heads
        if config.qkv_bias:
            self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim)
            self.k_proj, self.v_proj = nn.Linear(width, kv_heads * head_dim), nn.Linear(width, kv_heads * head_dim)
        self.q_norm = mistral.MistralRMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = mistral.MistralRMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.rotates = config.positions == "rope" and layer_idx not in config.nope_layers
        self.temperature = AdaptiveTemperature(config) if config.adaptive_temperature else None
        self.entmax_alpha = EntmaxAlpha(config)  # the name that attention_function looks for

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: normalised input (B, T, C). position_ids: (B or 1, T), for the temperature."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (w(hidden_states).view(shape).transpose(1, 2) for w in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotates:  # in float32, as in training
            q, k = mistral.apply_rotary_pos_emb(q.float(), k.float(), *position_embeddings)
        if self.temperature is not None:
            q = q.float() * self.temperature(hidden_states, position_ids)[..., None]
        q, k = q.to(v.dtype), k.to(v.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(
            self, q, k, v, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.config.sliding_window, position_ids=position_ids,
            alibi_slopes=self.config.alibi_slopes(q.device), **kwargs,
        )  # fmt: skip
        return self.o_proj(out.flatten(2)), None


class LongSplashDecoderLayer(mistral.MistralDecoderLayer):
    def __init__(self, config: LongSplashConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = LongSplashAttention(config, layer_idx)


class LongSplashRotaryEmbedding(mistral.MistralRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines in float32, whatever the dtype of x; "dynamic" ones of these positions alone, as ours."""
        if self.rope_type == "dynamic":  # transformers goes on from the longest text before
            self.inv_freq, self.max_seq_len_cached = self.original_inv_freq, self.original_max_seq_len
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids)


class LongSplashPreTrainedModel(mistral.MistralPreTrainedModel):
    config: LongSplashConfig
    _no_split_modules = ["LongSplashDecoderLayer"]
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _can_compile_fullgraph = False  # the mask is made outside of the graph
    _can_record_outputs = {"hidden_states": LongSplashDecoderLayer}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """As LongSplashConfig's."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """The default is entmax; softmax with these weights is another model."""
        if attn_implementation is None:
            return DEFAULT_NAME
        if attn_implementation not in registered_names():
            raise ValueError(
                f"this model was trained with entmax attention, got attn_implementation={attn_implementation!r}: leave "
                f"it out, or take one of longsplash.register: {', '.join(sorted(registered_names()))}"
            )
        return attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "bias_start"):
            nn.init.constant_(module.bias, module.bias_start)  # type: ignore[arg-type]
        if isinstance(module, EntmaxAlpha) and module.alpha_raw is not None:
            nn.init.zeros_(module.alpha_raw)


class LongSplashModel(LongSplashPreTrainedModel, mistral.MistralModel):
    def __init__(self, config: LongSplashConfig):
        super(mistral.MistralModel, self).__init__(config)  # not Mistral's own layers
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LongSplashDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = mistral.MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LongSplashRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Mistral's, but positions count a row's real tokens without position_ids too: the temperature is no
        function of distances alone."""
        given = input_ids if input_ids is not None else inputs_embeds
        if position_ids is None and given is not None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -given.shape[1] :]
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)


class LongSplashForCausalLM(LongSplashPreTrainedModel, mistral.MistralForCausalLM):
    def __init__(self, config: LongSplashConfig):
        super(mistral.MistralForCausalLM, self).__init__(config)
        self.model = LongSplashModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


if DEFAULT_NAME not in registered_names():
    register_attention()
AutoConfig.register(MODEL_TYPE, LongSplashConfig, exist_ok=True)
AutoModel.register(LongSplashConfig, LongSplashModel, exist_ok=True)
AutoModelForCausalLM.register(LongSplashConfig, LongSplashForCausalLM, exist_ok=True)
