"""Search a Swin classifier under a budget: `accelerate launch recipes/search_swin.py --help`."""

import sys
from pathlib import Path

# Python puts a script's folder first on its path, where evaluate.py would hide the package of that
# name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from ofb_hf.cli import search  # noqa: E402

if __name__ == "__main__":
    search(model_name_or_path="digits_swin", output_dir="runs/demo_swin")
