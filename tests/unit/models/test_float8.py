"""Linear layers of the blocks multiply in float8, and nothing else of the model changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.float8 import float8_layers, flops_as_bf16, use_float8
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import add_lora, add_lora_to_decoder, merged_state_dict, trainable_state_dict
from llmtrain.training.optimizers import build_optimizer
from llmtrain.verbs.plan import plan
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_decoder
from tests.support.tiny_huggingface import tiny_network
from tests.support.tiny_run import SYNTHETIC, write_config

PROJECTIONS = {f"attention.{name}_proj" for name in "qkvo"}
FEED_FORWARD = {f"feed_forward.{name}_proj" for name in ("gate", "up", "down")}

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao (the extra fp8) is not installed")


def chosen(module: nn.Module) -> set[str]:
    """The names within a block of the layers that are chosen in it; each block has the same."""
    layers = {id(layer) for layer in float8_layers(module)}
    found = [
        {name for name, layer in block.named_modules() if id(layer) in layers}
        for block in module.layers()  # type: ignore[operator]
    ]
    assert all(names == found[0] for names in found)
    assert sum(map(len, found)) == len(layers), "none outside of the blocks"
    return found[0]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torchao where it is not installed: the filter of its function, and layers that round weights."""

    class Float8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(torch.float8_e4m3fn).to(x.dtype).t()

    def convert(module: nn.Module, *, config: Any, module_filter_fn: Callable[[nn.Module, str], bool]) -> None:
        assert config.pad_inner_dim
        for name, child in list(module.named_modules()):
            if isinstance(child, nn.Linear) and module_filter_fn(child, name):
                child.__class__ = Float8Linear

    stand_in = ModuleType("torchao.float8")
    stand_in.convert_to_float8_training = convert  # type: ignore[attr-defined]
    stand_in.Float8LinearConfig = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", stand_in)


def test_all_linear_layers_of_a_block_and_nothing_else_are_chosen() -> None:
    assert chosen(tiny_decoder(tie_embeddings=False)) == PROJECTIONS | FEED_FORWARD


def test_layers_whose_sizes_are_no_multiples_of_16_are_left_out() -> None:
    assert chosen(tiny_decoder(ffn={"d_ff": 40})) == PROJECTIONS


def test_of_layers_with_adapters_the_base_is_chosen() -> None:
    decoder = tiny_decoder()
    add_lora_to_decoder(decoder, LoraConfig(r=16))
    assert chosen(decoder) == {f"{name}.base_layer" for name in PROJECTIONS | FEED_FORWARD}
    tuned = HuggingFaceModel(add_lora(tiny_network("llama"), LoraConfig(r=16, target_modules=["q_proj"])))
    names = chosen(tuned)
    assert "self_attn.q_proj.base_layer" in names
    assert "mlp.down_proj" in names
    assert not any("lora" in name for name in names)


def test_a_model_without_such_layers_is_rejected(rounding: None) -> None:
    with pytest.raises(ConfigError, match="the model's blocks have no linear layer whose sizes are multiples of 16"):
        use_float8(HuggingFaceModel(tiny_network("gpt2")))  # its layers are Conv1D


def test_parameters_keep_their_names_and_dtypes_and_chosen_layers_compute_otherwise(rounding: None) -> None:
    decoder, other = tiny_decoder(), tiny_decoder()
    before = dict(decoder.named_parameters())
    use_float8(decoder)
    assert all(parameter is before[name] for name, parameter in decoder.named_parameters())
    ids = random_batch(TINY_VOCAB_SIZE)["input_ids"]
    error = (decoder.logits(ids) - other.logits(ids)).abs().max()
    assert 1e-4 < error < 1.0


# -- torchao's own -----------------------------------------------------------------------------------------------------


def gradients(decoder: Decoder) -> tuple[float, dict[str, Tensor]]:
    loss_sum, num_tokens = decoder(random_batch(TINY_VOCAB_SIZE))
    loss_sum.backward()
    found = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    return float(loss_sum.detach() / num_tokens), found


@needs_torchao
def test_losses_and_gradients_are_near_those_of_float32() -> None:
    decoder, other = tiny_decoder(init_std=0.05), tiny_decoder(init_std=0.05)
    use_float8(decoder)
    (loss, ours), (expected, theirs) = gradients(decoder), gradients(other)
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.01)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), theirs[name].flatten(), dim=0) > 0.98, name


@needs_torchao
def test_training_in_float8_lowers_the_loss_and_saves_what_any_decoder_loads() -> None:
    decoder = tiny_decoder(init_std=0.05)
    use_float8(decoder)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), decoder)
    losses = []
    for _ in range(5):
        losses.append(gradients(decoder)[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    tiny_decoder().load_state_dict(decoder.state_dict())  # strict: the same names


@needs_torchao
def test_only_adapters_of_layers_in_float8_are_trained_and_they_merge() -> None:
    decoder = tiny_decoder()
    add_lora_to_decoder(decoder, LoraConfig(r=16))
    use_float8(decoder)
    _, found = gradients(decoder)
    assert found.keys() == trainable_state_dict(decoder).keys()
    assert all(".lora_" in name for name in found)
    merged = merged_state_dict(decoder, {name: p.detach().clone() for name, p in trainable_state_dict(decoder).items()})
    assert merged.keys() == tiny_decoder().state_dict().keys()


# -- what is rejected, and what a plan says ----------------------------------------------------------------------------


def resolve_on(device: str) -> Any:
    trainer = TrainerConfig(precision="fp8-mixed", compile=False)
    return resolve(RunConfig(device=device), trainer, DistributedConfig())


def test_float8_is_rejected_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"fp8-mixed, but the device is cpu, .* compute capability 8\.9 or more"):
        resolve_on("cpu")


@pytest.mark.parametrize(("capability", "installed"), [((8, 0), True), ((8, 9), False), ((9, 0), True)])
def test_float8_needs_a_gpu_of_capability_8_9_and_torchao(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], installed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("llmtrain.distributed.resolve.find_spec", lambda name: installed or None)
    if capability == (9, 0):
        resolved = resolve_on("cuda")
        assert (resolved.precision, resolved.float8) == ("bf16-mixed", True)
        return
    message = r"needs torchao: `.*fp8" if capability == (8, 9) else r"a GPU of compute capability 8\.0"
    with pytest.raises(ConfigError, match=message):
        resolve_on("cuda")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["distributed.strategy=fsdp_tp"], "torchao scales whole matrices: set strategy to fsdp"),
        (
            ["model.name=huggingface", "model.path=x", "model.lora.r=1", "model.quantization=nf4"],
            "in bfloat16: set model",
        ),
    ],
)
def test_what_float8_cannot_do_is_rejected(tmp_path: Path, keys: list[str], message: str) -> None:
    config = {key: value for key, value in SYNTHETIC.items() if key != "model" or len(keys) == 1}
    file = write_config(tmp_path / "run.yaml", config)
    with pytest.raises(ConfigError, match=message):
        load_config(str(file), [*keys, "trainer.precision=fp8-mixed"])


def test_a_plan_counts_half_the_time_for_layers_in_float8(tmp_path: Path) -> None:
    file = str(write_config(tmp_path / "run.yaml", SYNTHETIC))
    config = load_config(file, ["trainer.precision=fp8-mixed"]).config
    found, bf16 = (
        plan(config, device="h100"),
        plan(load_config(file, ["trainer.precision=bf16-mixed"]).config, device="h100"),
    )
    decoder = Decoder(config.decoder(wanted_by="a test"), found["model"]["vocab_size"])
    inside = sum(p.numel() for block in decoder.blocks for p in block.parameters() if p.ndim == 2)
    flops = found["flops_per_token"]
    assert flops_as_bf16(decoder, flops) == flops - 3 * inside
    ratio = found["time"]["tokens_per_sec"] / bf16["time"]["tokens_per_sec"]
    assert ratio == pytest.approx(flops / (flops - 3 * inside))
    assert found["memory"] == bf16["memory"]
    assert found["layout"]["precision"] == "fp8-mixed"
    for device, name in (("a100", "A100-SXM4-80GB"), ("cpu", "a CPU")):
        with pytest.raises(ConfigError, match=f"{name} does not multiply in float8"):
            plan(config, device=device)
