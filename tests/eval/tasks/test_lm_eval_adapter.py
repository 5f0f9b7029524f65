"""The adapter against lm-eval's own `hf` model on the same weights, and its rules for what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs pip install -r requirements-eval.txt")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

from data.tokenizer import Tokenizer, load_tokenizer
from eval.common.scoring import Runtime
from eval.tasks.lm_eval_adapter import HarnessModel
from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer

LENGTH = 256
# Two float32 evaluations of the same weights: sums of up to 60 losses of about 6 nats, each good to some 1e-6.
AGREEMENT = 1e-4


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return load_tokenizer(corpus / "tokenizer.model")


@pytest.fixture(scope="module")
def network(tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, positions="rope",
        tie_embeddings=False, init_std=0.3, attention=AttentionConfig(kind="softmax"),
    )  # fmt: skip
    return Transformer(config).eval()


def llama(network: Transformer) -> LlamaForCausalLM:
    """The same weights as a Llama of transformers."""
    config = network.config
    mirror = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, max_position_embeddings=LENGTH, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    names = {
        "embedding.": "model.embed_tokens.", "head.": "lm_head.", "blocks.": "model.layers.", "norm.": "model.norm.",
        "attention_norm.": "input_layernorm.", "feed_forward_norm.": "post_attention_layernorm.",
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w_gate": "mlp.gate_proj",
        "feed_forward.w_up": "mlp.up_proj", "feed_forward.w_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for name, value in network.state_dict().items():
        first, _, rest = name.partition(".")
        renamed = names[first + "."] + rest
        for ours, theirs in list(names.items())[4:]:
            renamed = renamed.replace(f".{ours}", f".{theirs}")
        weights[renamed] = value
    mirror.load_state_dict(weights)
    return mirror.eval()


class Wrapped(PreTrainedTokenizer):
    """The run's tokenizer as transformers wants one; only encoding with or without <bos> and decoding are used."""

    def __init__(self, codec: Tokenizer) -> None:
        self.codec = codec
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")

    @property
    def vocab_size(self) -> int:
        return self.codec.vocab_size

    def get_vocab(self) -> dict[str, int]:
        special = {"<unk>": 0, "<s>": self.codec.bos_id, "</s>": self.codec.eos_id}
        return special | {f"#{i}": i for i in range(self.codec.vocab_size) if i not in special.values()}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [f"#{i}" for i in self.codec.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {i: token for token, i in self.get_vocab().items()}[index]

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> Any:
        return [self.codec.bos_id, *token_ids_0]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = self.all_special_tokens  # lm-eval adds the name of <eos> to the stop strings
        ids = (self._convert_token_to_id(token) for token in tokens)
        return b"".join(
            token.encode() if token in special else self.codec.token_bytes(i)
            for token, i in zip(tokens, ids, strict=True)
        ).decode(errors="replace")


@pytest.fixture(scope="module")
def make_theirs(network: Transformer, tokenizer: Tokenizer) -> Callable[[bool], HFLM]:
    def make_theirs(add_bos: bool) -> HFLM:
        return HFLM(
            llama(network), tokenizer=Wrapped(tokenizer), max_length=LENGTH, add_bos_token=add_bos, batch_size=3,
            device="cpu", dtype=torch.float32,
        )  # fmt: skip

    return make_theirs


@pytest.fixture(scope="module")
def theirs(make_theirs: Callable[[bool], HFLM]) -> HFLM:
    return make_theirs(True)


MakeModel = Callable[..., HarnessModel]


@pytest.fixture
def make(network: Transformer, tokenizer: Tokenizer) -> MakeModel:
    def make(
        window: int | None = LENGTH, refuse: bool = False, row_tokens: int = 300, bos: bool = True
    ) -> HarnessModel:
        runtime = Runtime(torch.device("cpu"), None, row_tokens)
        return HarnessModel(
            network, tokenizer, runtime, window=window, refuse=refuse, add_bos_token=bos, batch_tokens=600, seed=0,
            label="test",
        )  # fmt: skip

    return make


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, 0, ("task", number, 1)) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS = [
    ("def value(items): ", "return items"), ("def value(items):", " return items"), ("", "import path"),
    ("self.items = ", "a"), ("é\n  for index in range:\n" * 3, "   self"), ("1", "2 3 4 value = 1000"),
    ("class path", "self " * 40),
]  # fmt: skip


@pytest.mark.parametrize("bos", [True, False])
def test_loglikelihoods_are_those_of_lm_evals_own_model(
    bos: bool, make_theirs: Callable[[bool], HFLM], make: MakeModel
) -> None:
    theirs = make_theirs(bos)
    found = make(bos=bos).loglikelihood(requests("loglikelihood", *PAIRS))
    wanted = theirs.loglikelihood(requests("loglikelihood", *PAIRS))
    for pair, (ours, greedy), (reference, reference_greedy) in zip(PAIRS, found, wanted, strict=True):
        assert ours == pytest.approx(reference, abs=AGREEMENT), pair
        assert greedy == reference_greedy
    assert len({round(ours, 2) for ours, _ in found}) == len(PAIRS) - 1  # the first two are the same text


def test_rolling_loglikelihoods_are_those_of_lm_evals_own_model(
    make_theirs: Callable[[bool], HFLM], make: MakeModel
) -> None:
    theirs = make_theirs(False)  # it has <bos> as the prefix; with add_bos_token it would also predict a second one
    texts = [("def value(items):\n    return items[index]\n" * repeat,) for repeat in (1, 60)] + [("",)]
    assert len(make().codec.encode(texts[1][0])) > 2 * LENGTH  # several windows
    found = make().loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert found == pytest.approx(wanted, rel=1e-6, abs=AGREEMENT) and found[2] == 0
    whole = make(window=None).loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert whole[0] == pytest.approx(found[0], abs=AGREEMENT) and abs(whole[1] - found[1]) > 1  # more text before


def test_generated_texts_are_those_of_lm_evals_own_model(
    theirs: HFLM, make_theirs: Callable[[bool], HFLM], make: MakeModel
) -> None:
    contexts = ["def value", "self.items = range(", "é" * 40, ""]
    free = {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 1}
    plain = make().generate_until(requests("generate_until", *((text, free) for text in contexts)))
    # The stop string lies in the middle of one text, and need not begin or end with a token.
    stop = plain[0][7:10]
    stopped = {"until": [stop], "max_gen_toks": 24, "do_sample": False}
    several = [(text, kwargs) for kwargs in (free, stopped, {**free, "max_gen_toks": 3}) for text in contexts[:3]]
    found = make().generate_until(requests("generate_until", *several))
    assert found == theirs.generate_until(requests("generate_until", *several))
    bare = make(bos=False).generate_until(requests("generate_until", *((text, free) for text in contexts)))
    assert bare[:3] == make_theirs(False).generate_until(requests("", *((text, free) for text in contexts[:3])))
    assert bare != plain and bare[3] == plain[3]
    assert found[:3] == plain[:3] and found[3] == plain[0][: plain[0].index(stop)] and len(found[6]) < len(plain[0])


def test_batches_do_not_change_the_answers(make: MakeModel) -> None:
    asked = requests("loglikelihood", *PAIRS)
    packed = make(row_tokens=2000).loglikelihood(asked)
    for (one, greedy), (other, same) in zip(packed, make(row_tokens=1).loglikelihood(asked), strict=True):
        assert one == pytest.approx(other, abs=AGREEMENT) and greedy == same


def test_what_does_not_fit_is_counted_or_refused_and_never_cut(make: MakeModel) -> None:
    small = make(window=40)
    found = small.loglikelihood(requests("loglikelihood", *PAIRS))
    fits = [len(small.codec.encode("".join(pair))) <= 40 for pair in PAIRS]  # <bos> is read, the last token is not
    assert [value == value for value, _ in found] == fits and 0 < sum(fits) < len(fits)
    assert small.too_long == {"task": {number for number, fit in enumerate(fits) if not fit}}
    for (value, _), (whole, _), fit in zip(found, make().loglikelihood(requests("", *PAIRS)), fits, strict=True):
        assert not fit or value == pytest.approx(whole, abs=AGREEMENT)
    exact = {"until": [], "max_gen_toks": 35}
    assert len(small.codec.encode("self")) == 1  # 1 + <bos> + 38 = 40
    texts = make(window=40).generate_until(requests("", ("self", exact | {"max_gen_toks": 38})))
    other = make(window=40)
    assert texts[0] and other.generate_until(requests("", ("self", exact | {"max_gen_toks": 39}))) == [""]
    assert other.too_long == {"task": {0}}
    with pytest.raises(ValueError, match="task task, sample 6: [0-9]+ tokens do not fit the window of 40"):
        make(window=40, refuse=True).loglikelihood(requests("", *PAIRS))
    with pytest.raises(ValueError, match="41 tokens do not fit the window of 40"):
        make(window=40, refuse=True).generate_until(requests("", ("self", exact | {"max_gen_toks": 39})))


def test_requests_that_make_no_sense_are_errors(make: MakeModel) -> None:
    with pytest.raises(ValueError, match="sample 0: the continuation '' has no token"):
        make().loglikelihood(requests("", ("value", "")))
    with pytest.raises(ValueError, match="generation_kwargs has num_beams: expected some of do_sample"):
        make().generate_until(requests("", ("value", {"until": [], "num_beams": 4})))
