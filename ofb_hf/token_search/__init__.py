"""Search for token counts alone, with all weights frozen: counts that learn, and their trainer."""
