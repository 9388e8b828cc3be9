"""Trains the embedded model: `python -m fxcalib.embedded.train --output DIR`.

A byte-level BPE tokenizer and a Llama-architecture causal language model, both from the Python standard library's
text alone (`fxcalib.embedded.text`). The model is small and sees about ninety tokens per parameter: only then do its
weights carry so much that rounding them to 4 bits shows. Fewer steps leave them easier to quantize; many more passes
over less text teach the topics by heart, and held-out perplexity explodes.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

from fxcalib.embedded.text import documentation, training_text
from fxcalib.errors import FxcalibError, OptionError, OutputError

END = "<|endoftext|>"
PAD = "<|pad|>"
HELD_OUT_WINDOW = 512


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained weights, but for the text. Widths are of the hidden state, lengths in tokens."""

    vocab: int = 2048
    hidden: int = 256
    intermediate: int = 384
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    context: int = 2048
    steps: int = 8000
    batch: int = 16
    window: int = 2048
    lr: float = 4e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise OptionError(
                f"--hidden {self.hidden}, --heads {self.heads} and --kv-heads {self.kv_heads} do not fit: "
                "heads must divide hidden, and kv-heads must divide heads"
            )
        if self.window > self.context:
            raise OptionError(f"--window {self.window} is over the model's context of {self.context} tokens; lower it")


def train_tokenizer(texts: Sequence[str], recipe: Recipe) -> FastTokenizer:
    """A byte-level BPE tokenizer with `recipe.vocab` entries, which round-trips every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained model, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The ids of all texts one after another, each followed by the end token; int64, [tokens]."""
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, stream: torch.Tensor, window: int = HELD_OUT_WINDOW) -> float:
    """The perplexity over the whole windows of `window` tokens that fit into `stream` ([tokens])."""
    rows = stream[: len(stream) // window * window].view(-1, window).to(model.device)
    if not len(rows):
        raise OptionError(f"{len(stream)} tokens do not fill one window of {window}; pass a shorter window")
    losses = [_loss(model, row[None]) for row in rows]
    return math.exp(torch.stack(losses).mean().item())


def train(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe, on_step: Callable[[int, float], None]) -> None:
    """Trains `model` in place on random windows of `stream` ([tokens]); calls `on_step(step, loss)` now and then.

    AdamW with a short warm-up and a cosine down to a hundredth of the peak rate; bfloat16 autocast on an accelerator.
    """
    device = model.device
    stream = stream.to(device)
    generator = torch.Generator().manual_seed(recipe.seed)
    accelerated = device.type != "cpu"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=accelerated
    )
    warmup = max(1, recipe.steps // 50)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loss_of = torch.compile(_loss) if accelerated else _loss
    positions = torch.arange(recipe.window, device=device)
    model.train()
    for step in range(recipe.steps):
        starts = torch.randint(len(stream) - recipe.window + 1, (recipe.batch, 1), generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=accelerated):
            loss = loss_of(model, stream[starts.to(device) + positions])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, recipe.steps // 100) == 0:
            on_step(step + 1, loss.item())
    model.train(False)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Writes the bfloat16 checkpoint and its tokenizer to `output`: all of it appears there, or nothing does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        folder = Path(scratch) / output.name
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        os.replace(folder, output)


def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def _parser() -> argparse.ArgumentParser:
    defaults = Recipe()
    parser = argparse.ArgumentParser(
        prog="python -m fxcalib.embedded.train",
        description="Train the small Llama-architecture model that fxcalib ships, on the Python standard library's "
        "documentation and source. The topics that fxcalib evaluates on are never trained on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument(
        "--stdlib",
        type=Path,
        nargs="+",
        metavar="DIR",
        default=[Path(os.__file__).parent],
        help="standard library folders to read text from (lib/python3.12); those of several Python versions teach "
        "the model the wording and markup of each",
    )
    parser.add_argument("--topics-only", action="store_true", help="no source files: quick, for a trial")
    sizes = {
        "vocab": "tokens the tokenizer knows",
        "hidden": "width of the hidden state; a multiple of 128 lets every usual group size divide it",
        "intermediate": "width inside the MLP; a multiple of 128, too",
        "layers": "decoder layers",
        "heads": "query heads",
        "kv_heads": "key and value heads",
        "context": "longest input the model takes, in tokens",
        "steps": "optimizer steps",
        "batch": "windows a step",
        "window": "tokens a window",
        "lr": "peak learning rate; a high one makes the weights harder to quantize",
        "weight_decay": "AdamW weight decay; a low one makes the weights harder to quantize",
        "seed": "of the initial weights and the order of the windows",
    }
    for name, text in sizes.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, metavar="N", help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 on success, 2 on an option, text or folder that cannot be used."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
        if options.output.exists():
            raise OutputError(f"{options.output} exists; choose a new folder for --output, or remove it")
        texts = documentation("calibration") if options.topics_only else training_text(options.stdlib)
    except FxcalibError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(texts, recipe)
    stream = token_stream(texts, tokenizer)
    held_out = token_stream(documentation("heldout"), tokenizer)
    model = build_model(recipe, tokenizer).to(options.device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(texts)} texts, {sum(map(len, texts)):,} characters, {len(stream):,} tokens; {parameters:,} parameters; "
        f"{recipe.steps} steps of {recipe.batch * recipe.window:,} tokens"
    )
    window = min(HELD_OUT_WINDOW, recipe.context)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("train", total=recipe.steps, loss=math.nan)

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if step % max(1, recipe.steps // 10) == 0:
                value = perplexity(model, held_out, window)
                progress.console.print(f"step {step}: loss {loss:.3f}, held-out perplexity {value:.3f}")

        train(model, stream, recipe, on_step)
    save(model, tokenizer, options.output)
    value = perplexity(model, held_out, window)
    print(f"{options.output}: held-out perplexity {value:.3f} (windows of {window} tokens)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
