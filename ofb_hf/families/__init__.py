"""What a model is: its units, the tensors that hold them, the parts of its forward pass."""
