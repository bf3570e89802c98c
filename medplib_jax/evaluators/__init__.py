"""Evaluators: one annotation file in, (metric, value) pairs and a line per record out."""
