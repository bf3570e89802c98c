"""Evaluators: how the answers to each kind of question are scored, and the files that keep them."""
