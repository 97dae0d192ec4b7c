"""Finetune a classifier, for example a searched one for longer: `accelerate launch recipes/finetune.py --help`."""

from ofb_hf.cli import finetune

if __name__ == "__main__":
    finetune()
