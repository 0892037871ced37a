"""Attention over paged KV as functions of arrays. Imports JAX alone and can be used without the rest of jaxllm.

Letters: T flat tokens, S rows (sequences), N query heads, K KV heads, H head dim, P pages, W pages in a row's table.
A *page* holds KV of consecutive tokens; *block* is a kernel's tile.
"""
