import signal
import subprocess
import sys

import pytest

from zephyr_jax.data.prepare.parallel import run_tasks


def square(number):
    if number == 13:
        raise ValueError("unlucky")
    return number * number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_errors_come_through(workers):
    bar = {"title": "squares", "unit": "number"}
    squares = run_tasks(square, range(7), workers, sizes=[1] * 7, **bar)
    assert squares == [number * number for number in range(7)]
    with pytest.raises(ValueError, match="unlucky"):
        run_tasks(square, range(10, 20), workers, sizes=[1] * 10, **bar)
    assert run_tasks(square, [], workers, sizes=[], **bar) == []


PARENT = """
import time
from zephyr_jax.data.prepare.parallel import run_tasks

if __name__ == "__main__":
    run_tasks(time.sleep, [1.5, 600, 600], 2, sizes=[1] * 3, title="sleep", unit="nap")
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, program], stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stderr is not None
    while b"1/3" not in parent.stderr.read1():  # the first nap is over, the others go on
        pass
    parent.kill()
    parent.communicate(timeout=60)  # until the last process that holds the other end is gone
    assert parent.wait() == -signal.SIGKILL
