"""vLLM's module paths, for scripts that import from them."""
