"""The zoo: tiny models of every architecture, and how exactly they are traced, cut into subgraphs and run again.

A model's own eager outputs are the reference. Each is built from its config class alone, shrunk and with random
weights, gets real inputs of several sizes and paddings, and is scored in a process of its own.
"""

from __future__ import annotations

from benchmarks.zoo.command import add_arguments, run

__all__ = ["add_arguments", "run"]
