"""These tests run the Triton kernels through Triton's interpreter, which has to be chosen before Triton is
imported.

An ordinary session does not collect them (the other rooms' tests must not run interpreted kernels by
accident): there tests/kernels/test_interpreter.py runs this folder in processes of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

import collections
import contextlib
import os

import numpy as np
import pytest
from triton.runtime import interpreter

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def counted_bytes():
    """with counted_bytes() as count: ... -> dict from kernel name to the bytes that its programs loaded and
    stored.
    """

    @contextlib.contextmanager
    def count():
        found = collections.Counter()
        builder = interpreter.InterpreterBuilder
        load, store, call = (
            builder.create_masked_load,
            builder.create_masked_store,
            interpreter.GridExecutor.__call__,
        )
        running = []

        def counting_load(self, ptrs, mask, *rest):
            found[running[-1]] += int(np.count_nonzero(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
            return load(self, ptrs, mask, *rest)

        def counting_store(self, ptrs, value, mask, *rest):
            found[running[-1]] += int(np.count_nonzero(mask.data)) * ptrs.get_element_ty().primitive_bitwidth // 8
            return store(self, ptrs, value, mask, *rest)

        def counting_call(self, *args, **kwargs):
            running.append(self.fn.__name__)
            try:
                return call(self, *args, **kwargs)
            finally:
                running.pop()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", counting_load)
            patch.setattr(builder, "create_masked_store", counting_store)
            patch.setattr(interpreter.GridExecutor, "__call__", counting_call)
            yield found

    return count
