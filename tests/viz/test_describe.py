"""A description says what the partition is: counts are the model's, bytes those of real tensors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from batches import token_batch
from tiny_llama import tiny_llama
from transformers import WhisperConfig, WhisperForConditionalGeneration

from fxcalib import viz
from fxcalib.api import plan
from fxcalib.partitioning import Partition, partition
from fxcalib.report import Report
from fxcalib.tracing import trace
from fxcalib.viz.dot import shape_text
from fxcalib.viz.drawing import draw
from fxcalib.viz.folding import Stretch, stretches
from fxcalib.viz.view import GraphView, ValueView


@pytest.fixture(scope="module")
def view(llama: Partition, report: Report) -> GraphView:
    return viz.describe(llama, report)


def test_counts_are_those_of_the_model(view: GraphView, llama: Partition) -> None:
    model = llama.traced.model
    assert view.parameters == sum(p.numel() for p in model.parameters())
    for subgraph, shown in zip(llama, view.subgraphs, strict=True):
        held = {id(p): p for m in subgraph.modules for p in m.parameters()}.values()
        assert shown.parameters == sum(p.numel() for p in held)
        assert shown.targets == subgraph.targets
    kinds = [node.kind for node in view.nodes]
    assert kinds.count("target") == 6
    assert kinds.count("module") == 4  # embedding, rotary embedding, norm, head
    assert kinds.count("input") == 2


def test_bytes_of_carried_values_are_those_of_real_tensors(view: GraphView, llama: Partition) -> None:
    bound = llama.traced.bind(token_batch(2, 16, use_cache=False))
    values = dict(bound.inputs)
    for subgraph, shown in zip(llama, view.subgraphs, strict=True):
        outputs = subgraph.run(values, bound.signature)
        for value in shown.outputs:
            real = outputs[value.name]
            assert value.bytes == (real.nbytes if isinstance(real, torch.Tensor) else 0)
        values |= outputs


def test_every_edge_joins_two_nodes_and_crosses_where_subgraphs_differ(view: GraphView) -> None:
    nodes = {node.id: node for node in view.nodes}
    assert len(nodes) == len(view.nodes)
    for edge in view.edges:
        start, end = nodes[edge.source], nodes[edge.target]
        if end.subgraph is not None:
            assert edge.crosses == (start.subgraph != end.subgraph)


def test_glue_knows_its_source_line(view: GraphView) -> None:
    glue = [node for node in view.nodes if node.kind == "glue"]
    assert glue
    assert all(".py:" in node.source and not node.source.startswith("/") for node in glue)
    arange = next(node for node in glue if node.name == "aten.arange")
    assert "position_ids = torch.arange" in arange.source


def test_flops_of_a_layer_are_two_for_each_weight_and_token(view: GraphView) -> None:
    layer = view.subgraphs[1]
    assert layer.flops is not None
    weights = layer.parameters - 2 * 64  # norms multiply nothing
    assert 2 * weights * 32 <= layer.flops <= 2.2 * weights * 32


def test_measurements_go_with_their_subgraph(view: GraphView) -> None:
    measured = view.subgraphs[2].measured
    assert measured is not None
    assert measured.commit_seconds == 0.5
    assert [m.name for m in measured.modules] == ["model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    assert view.subgraphs[6].measured is None


def test_the_memory_of_the_steps_is_that_of_the_plan(llama: Partition) -> None:
    batch = token_batch(2, 16, use_cache=False)
    memory = viz.predict_memory(llama, batch, samples=10, device="cpu")
    model = tiny_llama(num_hidden_layers=6)
    planned = plan(model, group_size=64, samples=10, batch_size=2, seq_len=16, device="cpu", writes=False)
    assert [step.text for step in memory.steps] == [str(step) for step in planned.plan.steps]
    assert [step.parts for step in memory.steps] == [dict(m.host) for m in planned.moments if m.step is not None]
    groups = "in groups of 64"  # the widths are 64 and 128
    assert memory.title == f"Predicted host memory of each step of GPTQ to W4A16 {groups} on cpu, 10 samples"
    assert not hasattr(llama.traced.model.model.layers[0].mlp.up_proj, "weight_scale")


def test_memory_that_cannot_be_predicted_says_why(llama: Partition) -> None:
    batch = {"input_ids": torch.full((2, 16), 10_000)}
    memory = viz.predict_memory(llama, batch, samples=10, device="cpu")
    assert memory.steps == ()
    assert memory.title.startswith("The memory of the steps was not predicted: ")
    assert "10000" in memory.title


def test_the_modules_inside_of_a_target_are_known(view: GraphView) -> None:
    inside = {module.name: module.type for module in view.subgraphs[3].inside}
    assert inside["model.layers.3.mlp.up_proj"] == "Linear"
    assert "model.layers.3" not in inside


def test_sizes_named_after_an_input_are_written_out() -> None:
    sizes = ("batch", "decoder_input_ids_0", "a_name_of_more_than_24_letters")
    value = ValueView("x", "float32", sizes, "", 0)
    assert shape_text(value) == "f32 [batch, decoder_input_ids_0, …]"


def test_json_holds_everything(view: GraphView) -> None:
    data = json.loads(view.to_json())
    assert data["format"] == 2
    assert len(data["nodes"]) == len(view.nodes)
    assert data["subgraphs"][1]["same_as"] == 1
    assert data["subgraphs"][4]["same_as"] == 1


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        ([], []),
        ([0], [Stretch(0, 1, 1)]),
        ([0, 1, 1, 1, 4], [Stretch(0, 1, 1), Stretch(1, 1, 3), Stretch(4, 1, 1)]),
        ([0, 1, 0, 1, 0, 1], [Stretch(0, 2, 3)]),
        ([0, 0, 1, 0, 0, 1, 6], [Stretch(0, 3, 2), Stretch(6, 1, 1)]),
    ],
)
def test_stretches(same: list[int], expected: list[Stretch]) -> None:
    assert stretches(same) == expected


def test_a_fold_draws_one_of_the_same_and_its_loop(view: GraphView) -> None:
    drawing = draw(view)
    assert sorted(drawing.subgraphs) == [0, 1, 6]
    loops = [arrow for arrow in drawing.arrows if arrow.loops]
    assert [(a.source, a.target) for a in loops] == [("1:model_layers_1", "1:model_layers_1")]
    into_tail = [a for a in drawing.arrows if a.target == "6:model_norm"]
    assert [a.source for a in into_tail] == ["1:model_layers_1"]
    assert not drawing.tags


def test_expanded_values_that_many_read_are_tags(view: GraphView) -> None:
    drawing = draw(view, expand=True)
    assert sorted(drawing.subgraphs) == list(range(7))
    assert not any(arrow.loops for arrow in drawing.arrows)
    tagged = {tag.cluster for tag in drawing.tags if tag.value.name == "getitem"}
    assert tagged == {1, 2, 3, 4, 5}
    assert max(sum(a.source == "0:getitem" for a in drawing.arrows), 1) == 1


def test_chains_of_glue_are_one_box(view: GraphView) -> None:
    boxes = [box for box in draw(view).boxes if box.cluster == 1 and box.nodes[0].kind == "glue"]
    assert [[n.name for n in box.nodes] for box in boxes] == [["aten.arange", "aten.add.Tensor", "aten.unsqueeze"]]


def test_structure_counts_and_names_do_not() -> None:
    model = tiny_llama(num_hidden_layers=4)
    mlp = model.model.layers[2].mlp
    mlp.up_proj = torch.nn.Linear(64, 128, bias=True)
    shown = viz.describe(partition(trace(model, token_batch(1, 8, use_cache=False))))
    assert [s.same_as for s in shown.subgraphs] == [0, 1, 2, 1, 4]


def test_encoder_and_decoder_fold_by_themselves() -> None:
    config = WhisperConfig(
        encoder_layers=3,
        decoder_layers=3,
        d_model=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config).eval()
    batch = viz.sample_batch(model, sequence=8)
    assert batch["input_features"].shape == (1, 80, 100)
    shown = viz.describe(partition(trace(model, batch)))
    assert [s.same_as for s in shown.subgraphs] == [0, 1, 1, 3, 4, 4, 6]
    feeds = [a for a in draw(shown).arrows if a.source == "3:model_encoder_layer_norm" and a.crosses]
    assert {a.target for a in feeds} >= {"4:model_decoder_layers_1"}


def test_what_only_some_repetitions_read_says_so(view: GraphView) -> None:
    layers = [s for s in view.subgraphs if s.index in (2, 3)]
    dropped = {f"{s.index}:{s.targets[0].replace('.', '_')}" for s in layers}
    edges = tuple(e for e in view.edges if not (e.target in dropped and e.source == "0:getitem"))
    shares = {a.share for a in draw(replace(view, edges=edges)).arrows if a.source == "0:getitem" and a.crosses}
    assert shares == {"3 of 5"}
