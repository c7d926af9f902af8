"""Attention on compressed pages and the encoding of new tokens, by compiled kernels where there are any.

For caches of independent tokens: `append.append`, `compress.compress_pages`, `attention.decode_attention` and
`gather.gather_decode`; for the form `blocks`: `blocks.attend`. Importing them also registers the torch ops of the same
names (`kvcompress::block_attention` for the last) for graphs. Tensors the compiled library does not cover go to the
torch code that specifies it.
"""
