"""Modules a compressed checkpoint needs beyond those of stock transformers. They know no method and no engine."""
