import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zephyr_jax.weights.host_arrays import aligned_empty, from_parts, to_host

WHOLE = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)


def test_on_cpu_an_array_lies_where_it_was_read():
    """No second copy of the parameters, also where they are sharded."""
    places = []

    def read(index):
        part = aligned_empty(WHOLE[index].shape, np.dtype(np.float32))
        part[...] = WHOLE[index]
        places.append(part.ctypes.data)
        return part

    array = from_parts(WHOLE.shape, jax.sharding.SingleDeviceSharding(jax.devices()[0]), read)
    assert array.unsafe_buffer_pointer() == places[0]
    np.testing.assert_array_equal(array, WHOLE)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (XLA_FLAGS of conftest)")
def test_every_part_is_read_once_whoever_holds_it():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    asked = []

    def read(index):
        asked.append(index)
        return WHOLE[index]

    for spec, reads in ((jax.P(None, "fsdp"), 4), (jax.P(), 1), (jax.P("data", "fsdp"), 8)):
        asked.clear()
        sharding = jax.NamedSharding(mesh, spec)
        array = from_parts(WHOLE.shape, sharding, read)
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, WHOLE)
        assert len(asked) == reads
        out = np.empty(WHOLE.shape[::-1], jnp.bfloat16)
        to_host(array, None, out.T)  # transposed and cast on the way
        np.testing.assert_array_equal(out, WHOLE.T.astype(jnp.bfloat16))


def test_one_layer_of_a_stack_comes_alone():
    for stack in (WHOLE, jnp.asarray(WHOLE)):
        row = np.empty(8, np.float32)
        to_host(stack, 3, row)
        np.testing.assert_array_equal(row, WHOLE[3])
