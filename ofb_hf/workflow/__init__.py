"""Run whole commands, from a checkpoint and data to an output folder."""
