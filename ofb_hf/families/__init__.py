"""What a model is: submodules and coupled tensors of each family, described in one vocabulary."""
