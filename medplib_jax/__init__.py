"""MedPLIB in JAX: a biomedical multimodal LLM that reads, refers and grounds to pixels."""
