"""What a program needs on a TPU topology or nodes of GPUs, and what bounds it, by their compilers alone."""
