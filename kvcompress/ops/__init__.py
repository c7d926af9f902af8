"""Attention on compressed pages and the encoding of new tokens, by compiled kernels where there are any.

`append.append`, `attention.decode_attention`, `compress.compress_pages` and `gather.gather_decode` are what engines
call; importing them also registers torch ops of these names (`kvcompress::append`, ...) for graphs. Tensors on a CPU
take `library`'s kernels, on a GPU `cuda`'s (pages in fragment order); what these do not cover goes to the torch code
that specifies them.
"""
