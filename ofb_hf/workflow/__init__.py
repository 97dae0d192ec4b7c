"""The walk from a dense checkpoint to a small one, as the recipes and the command line run it."""
