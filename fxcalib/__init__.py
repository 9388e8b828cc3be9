"""fxcalib: a graph compiler for post-training calibration and quantization."""
