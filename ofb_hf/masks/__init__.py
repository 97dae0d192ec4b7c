"""How units are masked: scores, gates on weights, and the loss that makes a choice."""
