"""How a model is cut: tensors sliced by one plan, and the remaining layers fitted anew."""
