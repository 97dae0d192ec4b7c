"""Compress a classifier without training: `accelerate launch recipes/compress.py --help`."""

import sys
from pathlib import Path

# Python puts the folder of a script first on its path; there, evaluate.py would hide the package
# `evaluate` that this one imports.
FOLDER = Path(__file__).resolve().parent
sys.path = [entry for entry in sys.path if Path(entry).resolve() != FOLDER]

from ofb_hf.cli import compress  # noqa: E402

if __name__ == "__main__":
    compress()
