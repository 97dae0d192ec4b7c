"""The metric as a package, so that it is installed; `evaluate.load` takes this folder."""
