"""A transformers model that brings its own code, in which a line cannot be traced."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_llama import tiny_tokenizer
from transformers import PreTrainedConfig, PreTrainedModel

CODE = """
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size=128, hidden_size=16, **more):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**more)


def places(mask):
    return torch.from_numpy(np.cumsum(mask.numpy(), -1))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + self.inner(hidden)


class OddModel(PreTrainedModel):
    config_class = OddConfig
    _no_split_modules = ["Layer"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config.hidden_size) for _ in range(2)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids) + places(attention_mask)[..., None]
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))
"""


def save_remote_model(folder: Path) -> Path:
    """Save `OddModel` with weights, tokenizer and its code to `folder`."""
    space: dict[str, type] = {"__name__": "modeling_odd"}
    exec(CODE, space)
    config: PreTrainedConfig = space["OddConfig"]()
    torch.manual_seed(0)
    model: PreTrainedModel = space["OddModel"](config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_odd.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
    settings["architectures"] = ["OddModel"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
