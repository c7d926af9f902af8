"""What is measured: long-context tasks, perplexity, agreement with the base model."""
