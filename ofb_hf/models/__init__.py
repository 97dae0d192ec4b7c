"""Stock transformers classifiers whose widths are read from lists in the config.

The files here travel to the Hub with a checkpoint, so each is self-contained: torch, transformers and
huggingface_hub only, nothing of ours but its own configuration file.
"""
