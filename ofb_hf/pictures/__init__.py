"""Pictures of runs, and of which patches of an image a token schedule drops and merges."""
