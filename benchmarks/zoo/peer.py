"""llm-compressor beside fxcalib, through the functions that its sequential pipeline is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llmcompressor.args import DatasetArguments
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils import helpers
from torch import nn

from benchmarks.zoo.outputs import copied
from benchmarks.zoo.tools import Cut, Tool


class LLMCompressor(Tool):
    """`trace_subgraphs`, as the sequential pipeline calls it."""

    def cut(self, model: nn.Module, batch: Mapping[str, Any], targets: Sequence[str]) -> Cut:
        ignored = DatasetArguments().tracing_ignore
        subgraphs = trace_subgraphs(model, copied(batch), list(targets), ignored, targets_per_subgraph=1)
        return LLMCompressorCut(model, targets, subgraphs)


class LLMCompressorCut(Cut):
    """Subgraphs that pass values on by name. Its calibration has no use for what the model returns."""

    innermost = True
    whole_output = False

    def __init__(self, model: nn.Module, targets: Sequence[str], subgraphs: Sequence[Any]) -> None:
        self._model, self._targets, self._subgraphs = model, targets, subgraphs
        graph = subgraphs[-1].graph
        *_, last, output = graph.nodes
        if not output.all_input_nodes:  # the trace ends with the output head
            output.args = (last,)

    @property
    def calls(self) -> list[list[int]]:
        found = []
        for subgraph in self._subgraphs:
            called = [self._model.get_submodule(n.target) for n in subgraph.graph.nodes if n.op == "call_module"]
            found.append([id(module) for module in called if type(module).__name__ in self._targets])
        return found

    def run(self, batch: Mapping[str, Any]) -> Any:
        values: dict[str, Any] = copied(batch)
        result: Any = None
        with contextlib.ExitStack() as stack:
            # what its calibration runs in, but with the output head, without which there are no outputs to compare
            stack.enter_context(torch.no_grad())
            for context in ("disable_cache", "eval_context", "disable_hf_kernels", "use_eager_attention"):
                stack.enter_context(getattr(helpers, context)(self._model))
            for subgraph in self._subgraphs:
                inputs = {name: values[name] for name in subgraph.input_names}
                result = subgraph.forward(self._model, **inputs)
                if subgraph is not self._subgraphs[-1]:
                    values.update(result)
                    for name in subgraph.consumed_names:
                        del values[name]
        return result
