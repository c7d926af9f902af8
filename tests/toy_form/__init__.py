"""A form of cache that the product does not have: every key and value as an IEEE half, added by this folder alone."""
