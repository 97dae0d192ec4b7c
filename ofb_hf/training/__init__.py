"""A training run, whatever it is for: resumable, interruptible, on one process or many."""
