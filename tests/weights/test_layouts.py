"""Arrays between host and devices: read once, straight into place, one layer at a time."""

import jax
import numpy as np
import pytest

from zephyr_jax.weights.layouts import aligned_empty, from_parts

ARRAY = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)


def test_on_cpu_an_array_stays_in_the_memory_it_was_read_into():
    addresses = []

    def read(part):
        out = aligned_empty(ARRAY[part].shape, ARRAY.dtype)
        out[...] = ARRAY[part]
        addresses.append(out.ctypes.data)
        return out

    array = from_parts(ARRAY.shape, jax.sharding.SingleDeviceSharding(jax.devices()[0]), read)
    assert array.unsafe_buffer_pointer() == addresses[0]
    np.testing.assert_array_equal(array, ARRAY)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices (XLA_FLAGS of conftest)")
def test_every_part_is_read_once_however_many_devices_hold_it():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    parts = []

    def read(part):
        parts.append(part)
        return ARRAY[part]

    for spec, reads in ((jax.P(None, "fsdp"), 4), (jax.P(), 1), (jax.P("data", "fsdp"), 8)):
        parts.clear()
        sharding = jax.NamedSharding(mesh, spec)
        array = from_parts(ARRAY.shape, sharding, read)
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, ARRAY)
        assert len(parts) == reads
