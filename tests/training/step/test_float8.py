"""FP8 products of the blocks' linears, emulated: which they are, what they compute, and runs with and without."""

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import training.step.float8
from model.checkpoint import checkpoint_folder, read_complete
from model.config import AttentionConfig, DSAConfig, ModelConfig
from model.loading import StoredTensors, load_model
from model.transformer import Transformer
from tests.training.conftest import TrainProcess, callbacks, logged
from training.module import LanguageModule
from training.step.float8 import (
    CAPABILITY,
    Converted,
    Float8,
    check_device,
    check_products,
    convert_linears,
)
from training.step.optim import OptimizerConfig, build_optimizer, parameter_groups

RECIPES: list[Any] = [recipe for recipe in get_args(Float8) if recipe != "none"]
MODES = ["none", "selective", "full", "offload"]
PROJECTIONS = {f"attention.{w}" for w in ("wq", "wk", "wv", "wo")}
FEED_FORWARD = {f"feed_forward.{w}" for w in ("w_gate", "w_up", "w_down")}
# largest relative error of rounding to a dtype
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
TOKENS = 64


def network(**options: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 48}
    return ModelConfig(**{"vocab_size": 64, "attention": AttentionConfig(kind="asentmax"), **sizes, **options})


def make_module(float8: Float8, **options: Any) -> LanguageModule:
    torch.manual_seed(0)
    return LanguageModule(network(), OptimizerConfig(lr=1e-2, warmup_steps=0), float8=float8,
                          **{"loss_backend": "chunked", **options})  # fmt: skip


def batch(seed: int = 0) -> dict[str, Any]:
    """One sequence of two documents that count up from a random token."""
    starts = torch.randint(64, (2,), generator=torch.Generator().manual_seed(seed))
    tokens = (starts.repeat_interleave(TOKENS // 2) + torch.arange(TOKENS))[None] % 64
    bounds = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
    return {"tokens": tokens, "labels": (tokens + 1) % 64, "cu_seqlens": bounds, "max_seqlen": TOKENS // 2}


def test_the_indexer_of_dsa_stays_as_it_is() -> None:
    sizes = dict(n_heads=16, n_kv_heads=16, d_model=128, head_dim=16)
    dsa = DSAConfig(index_heads=16)  # 16 divides all of them
    model = Transformer(network(attention=AttentionConfig(kind="dsa", dsa=dsa), **sizes))
    convert_linears(model.layers(), "rowwise")
    kept = {name for name, one in model.layers()[0].named_modules() if type(one) is nn.Linear}
    assert kept == {f"attention.sparse.indexer.{name}" for name in ("wq", "wk", "head_weight")}


def test_gates_and_phi_of_nsa_stay_as_they_are() -> None:
    sizes = dict(n_heads=16, n_kv_heads=16, d_model=128, head_dim=16)  # 16 divides all of them
    model = Transformer(network(attention=AttentionConfig(kind="nsa"), **sizes))
    convert_linears(model.layers(), "rowwise")
    kept = {name for name, one in model.layers()[0].named_modules() if type(one) is nn.Linear}
    assert kept == {"attention.sparse.gate"} | {
        f"attention.sparse.compress_{part}.{w}" for part in "kv" for w in ("w_in", "w_out")
    }


def loss_of(module: LanguageModule, data: dict[str, Any]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module.training_step(data, 0)["loss"]


def gradients(module: LanguageModule) -> dict[str, Tensor]:
    module.zero_grad()
    loss_of(module, batch()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def in_float8(model: Transformer) -> list[set[str]]:
    return [{n for n, m in block.named_modules() if type(m).__name__ == "Float8Linear"} for block in model.layers()]


@pytest.mark.usefixtures("emulated_float8")
class TestConversion:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_projections_and_feed_forward_layers_of_blocks(self, recipe: Float8) -> None:
        sizes = {"n_heads": 16, "n_kv_heads": 16, "positions": "rope"}  # temperatures have sizes that fit
        torch.manual_seed(0)
        model = Transformer(network(**sizes, tie_embeddings=False, qkv_bias=True))
        before, types = dict(model.named_parameters()), {n: type(m) for n, m in model.named_modules()}
        assert convert_linears(model.layers(), recipe) == Converted(14, 18)
        assert in_float8(model) == [PROJECTIONS | FEED_FORWARD] * 2
        others = {n: t for n, t in types.items() if ".".join(n.split(".")[2:]) not in PROJECTIONS | FEED_FORWARD}
        assert others.items() <= {n: type(m) for n, m in model.named_modules()}.items()
        after = dict(model.named_parameters())
        assert list(after) == list(before) and all(after[name] is before[name] for name in before)
        assert {p.dtype for p in after.values()} == {torch.float32}

    def test_sizes_that_16_does_not_divide_stay(self) -> None:
        model = Transformer(network(head_dim=24, d_ff=40))  # wk and wv of 24, wq and wo of 48
        assert convert_linears(model.layers(), "rowwise") == Converted(4, 18)
        assert in_float8(model) == [{"attention.wq", "attention.wo"}] * 2
        with pytest.raises(
            ValueError, match="'rowwise', but no linear .* sizes that 16 divides: expected such a d_mod"
        ):
            convert_linears(Transformer(network(d_model=40)).layers(), "rowwise")

    def test_muon_steps_the_same_matrices(self) -> None:
        config = OptimizerConfig(name="muon")
        plain, ours = (
            {
                group["name"]: [n for n, p in model.named_parameters() if any(p is q for q in group["params"])]
                for group in parameter_groups(model, config, fused=False)
            }
            for model in (make_module("none").model, make_module("rowwise").model)
        )
        assert plain == ours and len(ours["hidden"]) == 14


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None, power_of_2: bool) -> Tensor:
    """As FP8 holds it, scaled so that the largest magnitude (along dim) becomes the dtype's."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / largest.double()).float()
    scale = torch.exp2(scale.log2().floor()) if power_of_2 else scale
    return (x.float() * scale).to(dtype).float() / scale


@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_rounded_operands(recipe: Float8) -> None:
    torch.manual_seed(0)
    model = Transformer(network())
    x = torch.randn(1, TOKENS, 32, requires_grad=True)
    upstream = torch.randn(1, TOKENS, 48).bfloat16()
    convert_linears(model.layers(), recipe)
    layer = model.layers()[0].feed_forward.w_gate
    y = layer(x)  # under autocast
    y.backward(upstream)
    rows, of_gradients = recipe != "tensorwise", torch.float8_e5m2 if recipe == "tensorwise" else torch.float8_e4m3fn

    def fp8(matrix: Tensor, dim: int, dtype: torch.dtype = torch.float8_e4m3fn, by_row: bool = rows) -> Tensor:
        return rounded(matrix, dtype, dim if by_row else None, rows)

    operand, weight, g = x.detach()[0].bfloat16(), layer.weight.detach(), upstream[0]
    wanted = [
        (y[0], fp8(operand, 1) @ fp8(weight, 1).T),
        (x.grad[0], fp8(g, 1, of_gradients) @ fp8(weight, 0, by_row=recipe == "rowwise")),
        (layer.weight.grad, g.float().T @ operand.float() if recipe == "rowwise_with_gw_hp"
         else fp8(g, 0, of_gradients).T @ fp8(operand, 0)),
    ]  # fmt: skip
    assert y.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    for ours, theirs in wanted:  # sums are rounded to bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=2 * ROUNDING[torch.bfloat16], atol=1e-5)


def losses(float8: Float8, autocast: bool = True) -> Tensor:
    module = make_module(float8)
    optimizer, _ = build_optimizer(module.model, module.optimizer_config, total_steps=100, fused=False)
    found = []
    for step in range(30):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = module.training_step(batch(step), 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.usefixtures("emulated_float8")
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_follow_those_of_bfloat16(recipe: Float8) -> None:
    exact, plain, ours = losses("none", autocast=False), losses("none"), losses(recipe)
    assert exact[-1] < 0.5 * exact[0]
    coarsest = torch.float8_e5m2 if recipe == "tensorwise" else torch.float8_e4m3fn
    noise = (plain - exact).abs().max()
    assert noise < (ours - exact).abs().max() < noise * ROUNDING[coarsest] / ROUNDING[torch.bfloat16]


@pytest.mark.usefixtures("emulated_float8")
class TestWithOtherOptions:
    @pytest.mark.parametrize("mode", MODES[1:])
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_recomputed_blocks_have_the_same_gradients(self, recipe: Float8, mode: Any) -> None:
        plain, ours = gradients(make_module(recipe)), gradients(make_module(recipe, activation_checkpointing=mode))
        assert all(torch.equal(ours[name], gradient) for name, gradient in plain.items())

    def test_tiles_change_sums_of_weights_gradients_only(self) -> None:
        options: dict[str, Any] = {"mlp_tile_tokens": TOKENS // 2, "activation_checkpointing": "full"}
        recipe: Float8 = "rowwise_with_gw_hp"  # others scale along the tokens of a tile
        plain, ours = gradients(make_module(recipe)), gradients(make_module(recipe, **options))
        for name, gradient in plain.items():
            rounding = 4 * ROUNDING[torch.bfloat16] * float(gradient.abs().max())
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=rounding, msg=name)

    @pytest.mark.parametrize(
        ("recipe", "mode"), [("tensorwise", "none"), ("rowwise", "selective"), ("rowwise_with_gw_hp", "full")]
    )
    def test_compiled_blocks_are_one_graph(self, recipe: Float8, mode: Any) -> None:
        graphs: list[Any] = []

        def counted(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)

        torch._dynamo.reset()  # or blocks stay eager past so many tests
        module = make_module(recipe, activation_checkpointing=mode)
        for block in module.model.blocks:
            block.compile(backend=counted, fullgraph=True)
        eager = gradients(make_module(recipe))
        for name, gradient in gradients(module).items():
            error = (gradient - eager[name]).norm() / eager[name].norm()
            assert error < ROUNDING[torch.float8_e4m3fn], f"{name}: {error:.2e}"  # where values round the other way
        assert len(graphs) == 1  # for both


class TestRefusals:
    def test_torchao_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training.step.float8, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="model.float8 is 'rowwise', but torchao is not installed: pip install"):
            make_module("rowwise")
        assert make_module("none").converted is None

    def test_unknown_recipe(self) -> None:
        with pytest.raises(ValueError, match=r"model.float8 is 'fp8': expected one of \('none', 'tensorwise'"):
            make_module("fp8")  # type: ignore[arg-type]

    def test_devices_without_fp8(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = torch.device("cuda", 0)
        check_device("none", torch.device("cpu"))
        with pytest.raises(
            ValueError, match="which needs a CUDA device .* but the run is on cpu: use model.float8 none"
        ):
            check_device("rowwise", torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
        for capability, fits in (((8, 0), False), ((8, 6), False), (CAPABILITY, True), ((9, 0), True), ((12, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            if fits:
                check_device("rowwise", gpu)
                continue
            with pytest.raises(ValueError, match=f"NVIDIA A100 has {capability[0]}.{capability[1]}: use model.float8"):
                check_device("rowwise", gpu)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"precision": "32-true"}, "trainer.precision is '32-true', but .* expected bf16-mixed or bf16-true"),
            ({"precision": "16-mixed"}, "trainer.precision is '16-mixed'"),
            ({"tokens": 1000}, "sequence_parallel is 1000, but model.float8 is 'rowwise': expected a multiple of 16"),
            ({"tile_tokens": 40}, "model.mlp_tile_tokens is 40, but .* expected a multiple of 16"),
        ],
    )
    def test_products_that_fp8_cannot_replace(self, changed: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {"precision": "bf16-mixed", "tokens": 1024, "tile_tokens": 0}
        check_products("rowwise", **good)
        check_products("rowwise", **good | {"precision": "bf16-true", "tile_tokens": 256})
        check_products("none", **good | changed)
        with pytest.raises(ValueError, match=message):
            check_products("rowwise", **good | changed)
        if "precision" not in changed:
            check_products("rowwise_with_gw_hp", **good | changed)


EMULATED = "--trainer.callbacks=tests.training.step.emulated_float8.Emulated"
WIDER = """
model: {network: {d_model: 32, d_ff: 64, attention: {learn_alpha: true}}}
trainer: {max_steps: 8, log_every_n_steps: 1, precision: bf16-mixed}
checkpoint: {every_n_steps: 4}
"""


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "wider.yaml"
    path.write_text(WIDER)
    return path


def float8(recipe: str) -> tuple[str, ...]:
    return EMULATED, "--model.float8", recipe


@pytest.fixture(scope="module")
def one(train: TrainProcess, wider: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of one process, whose products do not depend on what else is in a micro-batch."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    done = train("--run_dir", run_dir, *float8("rowwise_with_gw_hp"), configs=(wider,))
    assert done.returncode == 0, done.stderr
    assert "14 of the blocks' 18 linears in FP8 (rowwise_with_gw_hp)" in done.stderr
    assert "torchao" not in done.stderr and "Enum" not in done.stderr  # its warnings
    return run_dir


@pytest.mark.parametrize(
    "options",
    [
        ("--data.micro_batch_size", 1),
        ("--data.micro_batch_size", 1, "--parallel.zero_stage", 3, "--model.activation_checkpointing", "full"),
        ("--parallel.sequence_parallel", 2),
    ],
    ids=["ddp", "zero3", "sequence_parallel"],
)
def test_two_processes_train_as_one(
    options: tuple[object, ...], one: Path, train: TrainProcess, wider: Path, tmp_path: Path
) -> None:
    recipe = float8("rowwise_with_gw_hp")
    done = train("--run_dir", tmp_path / "two", *recipe, *options, "--trainer.devices", 2, configs=(wider,))
    assert done.returncode == 0, done.stderr
    wanted, found = logged(one), logged(tmp_path / "two")
    zero = "--parallel.zero_stage" in options  # whose weights and residual stream are bfloat16
    assert found[1] == pytest.approx(wanted[1], rel=2e-3 if zero else 5e-4)
    assert found[1][0] == pytest.approx(wanted[1][0], rel=1e-4 if zero else 1e-6)
    assert wanted[8][0] < 0.8 * wanted[1][0]
    for step, (loss, _) in wanted.items():
        assert found[step][0] == pytest.approx(loss, rel=5e-3), step


def test_checkpoints_go_from_fp8_to_bf16_and_back(one: Path, train: TrainProcess, wider: Path, tmp_path: Path) -> None:
    start, before = checkpoint_folder(one, 4), "rowwise_with_gw_hp"
    for last, recipe, options in ((6, "none", ()), (8, "tensorwise", float8("tensorwise"))):
        watching = callbacks(
            ("SaveAtStart", {"folder": str(tmp_path / recipe)}), ("StopAfterStep", {"step": last})
        ).replace("=[", "+=[")
        done = train("--run_dir", tmp_path / "run", "--resume", start, *options, watching, configs=(wider,))
        assert done.returncode == 0, done.stderr
        assert f"model.float8 {before} (config: {recipe})" in done.stderr
        old, new = (dict(StoredTensors(read_complete(folder))) for folder in (start, tmp_path / recipe))
        assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        assert {tensor.dtype for tensor in new.values()} == {torch.float32}
        start, before = checkpoint_folder(tmp_path / "run", last), recipe
    evaluated = load_model(tmp_path / "run").model
    assert {type(m) for m in evaluated.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert all(torch.equal(new_value, stored) for new_value, stored in zip(
        evaluated.state_dict().values(), (dict(StoredTensors(read_complete(start)))[f"weight/{name}"]
                                          for name in evaluated.state_dict()), strict=True))  # fmt: skip


def test_torchao_is_imported_where_it_is_used() -> None:
    """It takes seconds."""
    source = ast.parse(Path(training.step.float8.__file__).read_text())
    lines = [ast.unparse(node) for node in ast.walk(source) if isinstance(node, ast.Import | ast.ImportFrom)]
    at_once = [ast.unparse(node) for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any("torchao" in line for line in lines) and not any("torchao" in line for line in at_once)
