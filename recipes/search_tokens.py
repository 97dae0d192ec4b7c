"""Learn how many tokens each layer of a ViT keeps: `accelerate launch recipes/search_tokens.py
--help`."""

import sys
from pathlib import Path

# Python puts a script's folder first on its path, where evaluate.py would hide the package of that
# name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from ofb_hf.cli import search_tokens  # noqa: E402

if __name__ == "__main__":
    search_tokens()
