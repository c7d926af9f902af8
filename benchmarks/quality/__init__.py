"""Quality of caches at equal bytes: text, our caches, simulated peers', and KL against the base model."""
