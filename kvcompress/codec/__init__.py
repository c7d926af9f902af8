"""The codec: how keys and values become bytes and how attention reads them. The torch code here is the specification;
every compiled kernel is tested against it.

Shape letters used in tensor names, in this package and wherever its tensors travel:

    T tokens          H KV heads             G query heads per KV head
    D head_dim        R kept channels (rank) B bytes of codes per token and head
    N cache blocks    S tokens per block     Q query tokens

Importing this package imports no torch: `spec` and `layout` are plain data; the other modules need torch.
"""
