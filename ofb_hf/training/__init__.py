"""Training runs of any purpose: resumable, interruptible, on one process or on many."""
