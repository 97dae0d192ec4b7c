"""Generators of the parts of the documentation that must agree with results or source code."""
