"""kv_write: every token in its place, padding nowhere, and no copy of donated pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_write import kv_write
from pallas_kernels.kv_write.specs import SPECS


def test_every_token_in_its_place():
    rng = np.random.default_rng(0)
    P, K, size, H, T = 5, 2, 4, 8, 9
    before = rng.normal(size=(2, P, K, size, H)).astype(np.float32)
    new = rng.normal(size=(2, T, K, H)).astype(np.float32)
    slots = rng.permutation(P * size)[:T]
    slots[3], slots[7] = P * size, P * size + 1000  # padding
    after = before.copy()
    for token, slot in enumerate(slots):
        if slot < P * size:
            after[:, slot // size, :, slot % size] = new[:, token]
    out = kv_write(*map(jnp.asarray, (*before, *new, slots.astype(np.int32))))
    np.testing.assert_array_equal(np.stack(out), after)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_in_place_when_donated(spec):
    pages = jax.ShapeDtypeStruct((spec.num_pages, spec.num_kv_heads, spec.page_size, spec.head_dim), jnp.float32)
    new = jax.ShapeDtypeStruct((spec.num_tokens, spec.num_kv_heads, spec.head_dim), jnp.float32)
    slots = jax.ShapeDtypeStruct((spec.num_tokens,), jnp.int32)
    memory = (
        jax.jit(lambda *args: kv_write(*args), donate_argnums=(0, 1))
        .lower(pages, pages, new, new, slots)
        .compile()
        .memory_analysis()
    )
    pool = pages.size * 4
    assert memory.alias_size_in_bytes >= 2 * pool and memory.temp_size_in_bytes < pool


def test_bad_shapes():
    pages, new = jnp.zeros((3, 2, 4, 8)), jnp.zeros((5, 2, 8))
    with pytest.raises(ValueError, match=r"v must be \[T, K, H\] with T=5"):
        kv_write(pages, pages, new, new[:4], jnp.zeros(5, jnp.int32))
