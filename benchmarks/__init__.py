"""Measurements of fxcalib on real models, beside other tools: `python -m benchmarks` lists them."""
