"""The search for token counts alone; the weights of the model rest."""
