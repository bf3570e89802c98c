"""Compiles a program for a named TPU topology or nodes of GPUs on a machine without them, and says what it needs and
what bounds it."""
