"""Distillation: a frozen teacher, a student with something trainable, one loop that resumes and runs on many ranks."""
