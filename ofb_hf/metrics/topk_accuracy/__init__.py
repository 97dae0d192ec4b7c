"""A folder for `evaluate.load`; a package, too, so that it is installed with the others."""
