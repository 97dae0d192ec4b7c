"""Search a ViT or DeiT classifier under a budget: `accelerate launch recipes/search_deit.py --help`."""

from ofb_hf.cli import search

if __name__ == "__main__":
    search()
