"""How a model is cut: tensors sliced by one plan, and what stays fitted to what went."""
