"""What may change: the candidates of every submodule, and how a search decides among them."""
