"""What kernels use of Pallas Mosaic GPU."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic
from pallas_kernels.paged_decode import mosaic_gpu


@pytest.mark.skipif(mosaic.unsupported(interpret=True) is not None, reason="needs jax 0.11")
def test_the_code_of_a_kernel_is_made_once_for_all_programs_that_call_it(monkeypatch):
    monkeypatch.setattr(mosaic, "_exported", {})

    def lower(rows, outer):
        """A program for a GPU, in text, of another function each time."""
        array = jax.ShapeDtypeStruct
        pool = array((64, 2, 16, 64), jnp.bfloat16)

        def program(q, k_pages, v_pages, page_table, kv_lens):
            return outer(mosaic_gpu.paged_decode(q, k_pages, v_pages, page_table, kv_lens, scale=0.1))

        shapes = array((rows, 8, 64), jnp.bfloat16), pool, pool, array((rows, 4), jnp.int32), array((rows,), jnp.int32)
        checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        return jax.export.export(jax.jit(program), platforms=["cuda"], disabled_checks=checks)(*shapes).mlir_module()

    texts = [lower(2, jnp.exp), lower(2, jnp.sin)]
    assert len(mosaic._exported) == 1
    assert all("mosaic_gpu_v2" in text for text in texts)
    lower(4, jnp.exp)
    assert len(mosaic._exported) == 2
