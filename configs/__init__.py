"""Experiments: one file is one of them, with the command that runs it."""
