"""Shape checks that the ops share: an error names the argument, its shape and what is wanted."""

import jax
import jax.numpy as jnp


def check_shape(name: str, array: jax.Array, letters: str, sizes: dict[str, int]) -> None:
    """Checks `array` against letters like "S N H"; a letter seen before must have the same size, a new one is noted."""
    wanted = letters.split()
    if array.ndim != len(wanted):
        raise ValueError(f"{name} must be [{', '.join(wanted)}], got shape {list(array.shape)}")
    for letter, size in zip(wanted, array.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(
                f"{name} must be [{', '.join(wanted)}] with {letter}={sizes[letter]}, got shape {list(array.shape)}"
            )


def check_attention(q, k_pages, v_pages, page_table, kv_lens, query_letters: str) -> dict[str, int]:
    """Checks what both attention ops take; returns the size of each letter."""
    sizes: dict[str, int] = {}
    check_shape("q", q, query_letters, sizes)
    check_shape("k_pages", k_pages, "P K page_size H", sizes)
    check_shape("v_pages", v_pages, "P K page_size H", sizes)
    check_shape("page_table", page_table, "S W", sizes)
    check_shape("kv_lens", kv_lens, "S", sizes)
    if sizes["N"] % sizes["K"]:
        raise ValueError(f"q has N={sizes['N']} heads, which must be a multiple of the K={sizes['K']} KV heads")
    return sizes


def check_options(sizes, k_pages, window, soft_cap, alibi_slopes, k_scales, v_scales) -> dict:
    """Checks the options of both attention ops; returns those that are given, by name."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be above 0, or None")
    if alibi_slopes is not None:
        check_shape("alibi_slopes", alibi_slopes, "N", sizes)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if (scales is not None) != (jnp.dtype(k_pages.dtype).itemsize == 1):
            raise ValueError(f"{name} must be given for pages of an 8-bit dtype and for no other, got {k_pages.dtype}")
        if scales is not None:
            check_shape(name, scales, "P K page_size", sizes)
    options = dict(
        window=window, soft_cap=soft_cap, alibi_slopes=alibi_slopes, k_scales=k_scales, v_scales=v_scales
    )  # fmt: skip
    return {name: value for name, value in options.items() if value is not None}
