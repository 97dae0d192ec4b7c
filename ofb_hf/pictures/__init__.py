"""Pictures of a run and of what becomes of an image's tokens."""
