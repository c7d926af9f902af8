"""Recipe to checkpoint: plan, compress, decompress."""
