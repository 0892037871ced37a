"""kv_write as a scatter. XLA does it in place on donated pages.

It must be told that no slot occurs twice: else a GPU writes each 16-bit value by a compare-and-swap loop.
"""

import jax


@jax.jit
def kv_write(k_pages, v_pages, k, v, slots):
    """See pallas_kernels.kv_write."""
    page_size = k_pages.shape[2]
    page, offset = slots // page_size, slots % page_size
    return (
        k_pages.at[page, :, offset].set(k, mode="drop", unique_indices=True),
        v_pages.at[page, :, offset].set(v, mode="drop", unique_indices=True),
    )
