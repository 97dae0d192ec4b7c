"""What a network costs: MACs, parameters, predicted milliseconds, and the budget for them."""
