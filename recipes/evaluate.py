"""Measure a classifier on a data set: `accelerate launch recipes/evaluate.py --help`."""

from ofb_hf.cli import evaluate

if __name__ == "__main__":
    evaluate()
