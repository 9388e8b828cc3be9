"""Model files as checkpoints bring them along: each stands alone and is loaded through `auto_map`, never imported."""
