"""kvcompress: compress the KV cache and weights of language models, serve the result, prove what was kept."""

__version__ = "0.1.0"
