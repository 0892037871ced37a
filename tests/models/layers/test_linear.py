import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.layers.linear import matmul
from jaxllm.models.layers.mlp import ACTIVATIONS
from jaxllm.models.layers.norm import RMSNorm
from jaxllm.models.layers.param import ParamSpec, ones


def test_weight_is_contracted_on_its_last_axis():
    x, weight = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(matmul(jnp.asarray(x), jnp.asarray(weight)), x @ weight.T)


def test_bfloat16_product_accumulates_and_can_be_returned_in_float32():
    x = jnp.ones((1, 1024), jnp.bfloat16)
    weight = jnp.ones((1, 1024), jnp.bfloat16).at[0, 0].set(2)  # the sum, 1025, has no bfloat16
    assert matmul(x, weight).dtype == jnp.bfloat16
    assert float(matmul(x, weight, out_dtype=jnp.float32)[0, 0]) == 1025


def test_norm_rounds_before_it_scales():
    norm = RMSNorm(4, eps=0.0, dtype=jnp.bfloat16)
    x = jnp.asarray([[1.0, 2.0, 3.0, 5.0]], jnp.bfloat16)
    norm.weight.set_value(jnp.full(4, 3.0, jnp.bfloat16))
    x32 = np.asarray(x, np.float32)
    rounded = jnp.asarray(x32 / np.sqrt((x32**2).mean()), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(norm(x)), np.asarray(rounded * jnp.bfloat16(3.0)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS[name](x), ACT2FN[name](torch.tensor(x)).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"), [({"axes": ("a",)}, "each dimension"), ({"parts": (("q", 1), ("k", 2))}, "add up")]
)
def test_declarations_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        ParamSpec(**({"shape": (4, 2), "dtype": jnp.float32, "axes": ("a", "b"), "initializer": ones} | changes))


def test_equal_weights_share_one_initializer():
    from jaxllm.models.layers.param import normal

    assert normal(0.02) is normal(0.02)
    assert normal(0.5)(jax.random.key(0), (1000,), jnp.float32).std() > 0.4
