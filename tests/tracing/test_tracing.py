from __future__ import annotations

import sys

import pytest
import torch
from batches import assert_identical, state_of, token_batch
from tiny_llama import tiny_llama, tiny_mixture
from torch import nn
from torch.fx.proxy import TraceError as FxTraceError
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils import import_utils

from fxcalib import partition, trace
from fxcalib.errors import BatchError, TargetError
from fxcalib.tracing import GuardError, TraceError, default_targets


def test_every_module_beside_the_glue_is_one_node() -> None:
    traced = trace(tiny_llama(), token_batch(2, 8, use_cache=False))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == [
        "model.embed_tokens",
        "model.rotary_emb",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    assert traced.targets.names == ("model.layers.0", "model.layers.1")


def test_linear_targets_trace_through_attention_and_mlp() -> None:
    model = tiny_llama()
    traced = trace(model, token_batch(2, 8, use_cache=False), ["re:.*_proj$"])
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert [name for name in called if name.startswith("model.layers.0.self_attn")] == [
        f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"
    ]
    batch = token_batch(3, 11, seed=1, left=4, use_cache=False)
    with torch.no_grad():
        assert_identical(partition(traced).run(batch), model(**batch))


def test_a_meta_model_traces_without_weights() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, hidden_size=4096, num_key_value_heads=8)).eval()
    traced = trace(model, token_batch(1, 8, use_cache=False))
    assert len(traced.targets.names) == 12
    assert all(p.device.type == "meta" and isinstance(p, nn.Parameter) for p in model.parameters())


def test_unpadded_batches_carry_no_mask() -> None:
    model = tiny_llama()
    plain = trace(model, token_batch(2, 8, use_cache=False))
    masks = [n for n in plain.graph.nodes if n.op == "call_module" and n.kwargs.get("attention_mask") is not None]
    assert not masks
    padded = trace(model, token_batch(2, 8, left=3, use_cache=False))
    masks = [n for n in padded.graph.nodes if n.op == "call_module" and n.kwargs.get("attention_mask") is not None]
    assert len(masks) == 2


def test_guards_carry_the_line_of_the_model() -> None:
    traced = trace(tiny_llama(), token_batch(2, 8, use_cache=False))
    values = [guard for guard in traced.guards if guard.kind == "value"]
    assert len(values) == 1
    assert "masking_utils.py" in values[0].source
    assert "use_cache == False" in [guard.text for guard in traced.guards if guard.kind == "constant"]
    assert str(values[0]) in str(traced)


def test_nothing_is_left_behind() -> None:
    model = tiny_llama()
    before, call, random = state_of(model), nn.Module.__call__, torch.get_rng_state()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    trace(model, token_batch(2, 8, output_hidden_states=True))
    assert nn.Module.__call__ is call
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks for module in model.modules())
    after = state_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Branching(nn.Module):
    """Branches on a module's result, which no trace can know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if x.sum() > 0:
            x = -x
        return self.layers[1](x)


def test_a_branch_on_what_a_module_returns_is_held_while_the_graph_runs() -> None:
    model = Branching().requires_grad_(False)
    batches = [{"x": sign * torch.ones(2, 4)} for sign in (1, -1)]
    parts = partition(trace(model, batches[0]))
    assert any("x.sum() > 0" in guard.source for guard in parts.traced.guards)
    for batch in batches:
        assert torch.equal(parts.run(batch), model(batch["x"]))
    assert parts.variants.retraces == 1
    bound = parts.traced.bind(batches[0])
    model.layers[0].weight.neg_()
    model.layers[0].bias.neg_()
    with pytest.raises(GuardError, match=r"this batch takes another way\. Calibrate with pipeline='layer_sequential'"):
        parts[0].run(bound.inputs, bound.signature)


def test_failure_names_the_line_and_restores_everything() -> None:
    model = Branching().to("meta")
    call, fake = nn.Module.__call__, import_utils.is_fake_tensor
    with pytest.raises(FxTraceError) as caught:
        trace(model, {"x": torch.randn(2, 4)})
    assert isinstance(caught.value, TraceError)
    assert "if x.sum() > 0" in str(caught.value)
    assert __file__ in str(caught.value)
    assert nn.Module.__call__ is call
    assert import_utils.is_fake_tensor is fake
    assert isinstance(model.layers[0].weight, nn.Parameter)
    assert model.layers[0].weight.is_meta


def test_an_error_of_the_forward_is_a_trace_error_with_its_line() -> None:
    class Raising(Branching):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of cheese")

    with pytest.raises(TraceError, match="RuntimeError: out of cheese") as caught:
        trace(Raising(), {"x": torch.ones(1, 4)})
    assert 'raise RuntimeError("out of cheese")' in str(caught.value)


def test_default_targets() -> None:
    assert default_targets(tiny_llama()) == ["LlamaDecoderLayer"]

    class Block(nn.Module):
        pass

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = nn.ModuleList([nn.Linear(2, 2) for _ in range(8)])
            self.big = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), Block()) for _ in range(3)])

    assert default_targets(Plain()) == ["Sequential"]
    assert default_targets(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["Linear", "ReLU"]


def test_unmatched_targets_offer_the_nearest() -> None:
    model = tiny_llama()
    with pytest.raises(TargetError, match="did you mean 'LlamaDecoderLayer'"):
        trace(model, token_batch(1, 4), ["LlamaDecoderLayr"])
    with pytest.raises(TargetError, match=r"did you mean 'model\.layers\.1'"):
        trace(model, token_batch(1, 4), ["model.layer.1"])


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(BatchError, match="holds no tensor"):
        trace(tiny_llama(), {"use_cache": False})


class Odd(nn.Module):
    """In-place writes, a loop over a size, a module called twice, a value that is only returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.scale = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = x.clone()
        view = kept[:, :2]
        hidden = self.layers[0](x)
        before = kept.sum(-1)
        kept.mul_(2)
        hidden = hidden + kept * self.scale + view.mean()
        for row in range(hidden.shape[0]):
            hidden[row] += row
        hidden = self.layers[1](self.layers[0](hidden))
        kept.add_(hidden)
        return {"hidden": hidden, "before": before, "view": view.clone()}


@pytest.mark.parametrize("rows", [3, 1, 5])
def test_in_place_writes_keep_their_order(rows: int) -> None:
    torch.manual_seed(0)
    model = Odd()
    parts = partition(trace(model, {"x": torch.randn(3, 4)}, ["Linear"]))
    x = torch.randn(rows, 4)
    original = x.clone()
    with torch.no_grad():
        assert_identical(parts.run({"x": x}), model(original))
    assert torch.equal(x, original)


def test_tracing_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.utils.import_utils")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    parts = partition(trace(model, {"input": torch.randn(2, 4)}))
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(parts.run({"input": x}), model(x))


def test_contiguous_is_recorded_where_the_real_tensor_is_not() -> None:
    class Permuting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(4, 4, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x).permute(0, 2, 1).reshape(x.shape[0], -1, 6, 6).contiguous()
            return self.layers[1](x)

    parts = partition(trace(Permuting(), {"x": torch.randn(2, 36, 4)}, ["Linear", "Conv2d"]))
    assert any("contiguous" in str(node.target) for node in parts.traced.graph.nodes)


def test_random_numbers_are_those_of_the_model_after_a_new_trace() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x) + torch.rand(4)
            return self.layers[1](-x if (x > 0).any() else x)

    model = Noisy()
    parts = partition(trace(model, {"x": torch.full((1, 4), 100.0)}))
    for value in (100.0, -100.0):
        torch.manual_seed(1)
        expected = model(torch.full((1, 4), value))
        torch.manual_seed(1)
        assert torch.equal(parts.run({"x": torch.full((1, 4), value)}), expected)


class Counting(nn.Module):
    """Numbers that depend on data: as sizes, in lists, as keys, and one that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        kept = x[lengths > 1]
        parts = torch.split(x.flatten(0, 1), [*lengths.tolist(), x.shape[0] * x.shape[1] - int(lengths.sum())])
        scale = {1: 1.0, 2: 2.0, 3: 3.0}[int(lengths.max())]
        x = self.layers[0](x) * scale + sum(part.sum() for part in parts) + kept.sum() + kept.shape[0]
        return self.layers[1](x)


def test_numbers_that_depend_on_data_are_guarded() -> None:
    model = Counting()
    parts = partition(trace(model, {"x": torch.randn(2, 3, 4), "lengths": torch.tensor([1, 2])}))
    assert any("scale = " in guard.source for guard in parts.traced.guards)
    for lengths in ([1, 2], [2, 1], [3, 1], [1, 1]):
        batch = {"x": torch.randn(2, 3, 4), "lengths": torch.tensor(lengths)}
        assert torch.equal(parts.run(batch), model(**batch))


class Experts(nn.Module):
    """Tokens are sorted by what a router says: sizes inside are known only when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(-1)
        result = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            at = (chosen == index).nonzero(as_tuple=True)
            result[at] = self.experts[index](x[at])
        return result


def test_opaque_modules_that_cannot_run_on_fakes() -> None:
    model = nn.Sequential(*[Experts() for _ in range(3)])
    parts = partition(trace(model, {"input": torch.randn(2, 5, 4)}, "Experts"))
    assert [subgraph.targets for subgraph in parts] == [("0",), ("1",), ("2",)]
    for shape in ((2, 5, 4), (3, 7, 4)):
        x = torch.randn(shape)
        assert torch.equal(parts.run({"input": x}), model(x))
    traced = trace(nn.Sequential(*[Experts() for _ in range(2)]).to("meta"), {"input": torch.randn(2, 5, 4)}, "Experts")
    assert len(partition(traced)) == 2


@pytest.mark.parametrize("targets", [None, "Linear"])
def test_caches_come_back_as_the_model_returns_them(targets: str | None) -> None:
    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    batch = token_batch(2, 12)
    parts = partition(trace(model, batch, targets))
    expected, actual = model(**batch), parts.run(batch)
    assert_identical(actual.logits, expected.logits)
    assert type(actual.past_key_values) is type(expected.past_key_values)
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_dimension_of_one_that_is_broadcast() -> None:
    model = tiny_llama()
    batch = {**token_batch(2, 9), "position_ids": torch.arange(9)[None], "use_cache": False}
    parts = partition(trace(model, batch))
    assert_identical(parts.run(batch), model(**batch))


def test_targets_that_are_entered_past_their_call() -> None:
    class Entering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.forward(x)
            return x

    model = Entering()
    parts = partition(trace(model, {"x": torch.randn(2, 4)}, "Linear"))
    assert [subgraph.targets for subgraph in parts] == [("layers.0",), ("layers.1",)]
    assert "forward" not in vars(model.layers[0])
    x = torch.randn(3, 4)
    assert torch.equal(parts.run({"x": x}), model(x))


class Box:
    """An object that a module returns, with a tensor in it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Boxing(nn.Module):
    """Asks for a number that fakes do not know, so that its sizes are looked for with real stand-ins."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Box:
        return Box(x[:, : int((lengths * 2).sum()) // 2])


def test_what_stand_ins_leave_in_objects_is_never_baked_in() -> None:
    class Unboxing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxing = Boxing()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            x = self.boxing(self.layers[0](x), lengths).x
            return self.layers[1](x)

    batch = {"x": torch.randn(2, 5, 4), "lengths": torch.tensor([1, 2])}
    with pytest.raises(TraceError, match="was made"):
        trace(Unboxing(), batch, "Linear")


def test_sizes_that_hang_on_data_are_those_of_the_batch() -> None:
    class Cutting(nn.Module):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return x[:, : int((lengths * 2).sum()) // 2]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cutting = Cutting()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            x = self.cutting(self.layers[0](x), lengths)
            return self.layers[1](x.reshape(x.shape[0], -1, 4)) * x.shape[1]

    model = Model().requires_grad_(False)
    parts = partition(trace(model, {"x": torch.randn(2, 5, 4), "lengths": torch.tensor([1, 2])}, "Linear"))
    for lengths in ([1, 2], [2, 2], [1, 2]):
        batch = {"x": torch.randn(2, 5, 4), "lengths": torch.tensor(lengths)}
        parts.variants.bind(batch)  # told before anything runs, not by a module's result
        assert torch.equal(parts.run(batch), model(**batch))
    assert len(parts.variants.partitions) == 2


def test_experts_whose_kernel_wants_dense_weights() -> None:
    model = tiny_mixture("Mixtral")
    parts = partition(trace(model, token_batch(2, 9)))
    for batch in (token_batch(2, 9), token_batch(3, 14, seed=1, left=2)):
        assert_identical(parts.run(batch), model(**batch))
