"""Compare the time of `ofb-hf --help` with that of an import that users of transformers know.

    python benchmarks/help_time.py

Every round starts three processes in turn, so that other work on the machine slows all of them
down alike: `ofb-hf --help`, `ofb-hf search --help`, and

    python -c "from transformers import ViTForImageClassification, Trainer"

A process counts from its start to its end. Printed are medians of all rounds, and the median of
the ratios to the import of the same round. Round 0 fills the caches of the disk and does not count.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
# What the console script does, without a need for the package to be installed.
SCRIPT = "import sys; from ofb_hf_command import main; sys.exit(main(sys.argv[1:]))"
IMPORT = "import of transformers"
PROCESSES = {
    "ofb-hf --help": [SCRIPT, "--help"],
    "ofb-hf search --help": [SCRIPT, "search", "--help"],
    IMPORT: ["from transformers import ViTForImageClassification, Trainer"],
}


def seconds(words: list[str]) -> float:
    """Return the wall-clock time of `python -c WORDS`, run in the root of the repository."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", *words], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each process runs")
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for number in range(rounds + 1):
        for name, words in PROCESSES.items():
            elapsed = seconds(words)
            if number > 0:
                times[name].append(elapsed)
    for name, samples in times.items():
        ratios = [mine / theirs for mine, theirs in zip(samples, times[IMPORT], strict=True)]
        print(f"{name:24} {median(samples):8.3f} s   {median(ratios):6.3f} of the import")


if __name__ == "__main__":
    main()
