"""The small language model that fxcalib works on when no other is named.

A Llama-architecture model of 3.0 million parameters in bfloat16 (5 decoder layers, hidden size 256, tied embeddings,
a byte-level BPE vocabulary of 2,048, a context of 2,048 tokens), trained on the Python standard library alone: the
topics of the language reference that `pydoc` shows and the library's source files with their docstrings and
comments, of Python 3.10, 3.11, 3.12 and 3.13, 41 million characters. Trained on 2026-11-22 on an H100 GPU in under
five minutes, 8,000 steps of 32,768 tokens, by

    python -m fxcalib.embedded.train --output DIR --stdlib lib/python3.10 lib/python3.11 lib/python3.12 lib/python3.13

Its perplexity on the held-out topics (`fxcalib.embedded.text.documentation("heldout")`, Python 3.12, windows of 512
tokens) is 12.5. Python, its documentation and its library are copyright of the Python Software Foundation and used
under the PSF License Agreement.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
"""The checkpoint folder: what `from_pretrained` of `AutoModelForCausalLM` and `AutoTokenizer` takes."""
