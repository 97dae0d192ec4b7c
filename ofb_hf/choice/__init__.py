"""What is best under a budget: arithmetic, without a trainer."""
