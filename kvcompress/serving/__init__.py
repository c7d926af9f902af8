"""The two places a compressed checkpoint runs: transformers and vLLM. Both read the codec; neither knows a method."""
