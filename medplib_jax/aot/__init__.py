"""Compiles a program for a named TPU topology on a machine without one, and says what it needs and what bounds it."""
