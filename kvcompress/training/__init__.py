"""Distillation: a frozen teacher, a student with something trainable, one loop that resumes and runs on many ranks."""

MICRO_TOKENS = 4096
"""Tokens that go through the model at a time; a batch with more is accumulated. Bounds memory, mostly of logits."""
