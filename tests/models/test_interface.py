import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.models import ModelConfig, build
from tests.models.test_config import MINIMAL


def network(dtype="float32", **changes):
    return build(ModelConfig.from_hf(MINIMAL | changes), dtype)


def test_params_axes_and_abstract_params_have_one_structure():
    net = network(attention_bias=True)
    params = net.init(jax.random.key(0))
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
    assert abstract == net.abstract_params
    axes = jax.tree.map(lambda axes, leaf: len(axes) == leaf.ndim, net.axes, params, is_leaf=lambda x: type(x) is tuple)
    assert all(jax.tree.leaves(axes))


def test_merged_weights_keep_the_checkpoints_orientation():
    layer = network(num_key_value_heads=2).abstract_params["layers"]["0"]
    assert layer["attention"]["qkv"]["weight"].shape == ((4 + 2 * 2) * 8, 32)
    assert layer["mlp"]["gate_up"]["weight"].shape == (2 * 48, 32)
    assert layer["attention"]["out"]["weight"].shape == (32, 32)


def test_init_depends_on_key_and_path_alone():
    few, more = network().init(jax.random.key(1)), network(num_hidden_layers=3).init(jax.random.key(1))
    np.testing.assert_array_equal(
        few["layers"]["1"]["mlp"]["down"]["weight"], more["layers"]["1"]["mlp"]["down"]["weight"]
    )
    layers = more["layers"]
    assert not np.array_equal(layers["0"]["mlp"]["down"]["weight"], layers["1"]["mlp"]["down"]["weight"])
    other = network().init(jax.random.key(2))
    assert not np.array_equal(few["embed"]["weight"], other["embed"]["weight"])


def test_init_can_be_traced_and_is_in_the_networks_dtype():
    net = network("bfloat16", initializer_range=0.5)
    params = jax.jit(net.init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert abs(float(params["embed"]["weight"].astype(jnp.float32).std()) - 0.5) < 0.05
    np.testing.assert_array_equal(params["norm"]["weight"].astype(np.float32), 1)


def test_kv_shapes():
    shape = (10, 2, 16, 8)
    assert network(num_key_value_heads=2).kv_shapes(10, 16) == ((shape, shape),) * 2
