"""State on NVMe that is brought into memory to be filled, and goes back whatever happens meanwhile."""

from __future__ import annotations

from unittest import mock

import pytest

from dsgpt.errors import DamagedError
from dsgpt.partitioned import PartitionedState


@pytest.mark.parametrize(
    "write, back", [(True, "_optimizer_states_and_gradient_swap_out"), (False, "_release_swap_buffers")]
)
def test_a_group_that_was_brought_in_goes_back_after_an_error(write, back):
    """Else an older checkpoint could not be loaded over one that turned out damaged."""
    state = PartitionedState()
    state._optimizer = mock.Mock(swap_optimizer=True)
    with pytest.raises(DamagedError), state._in_memory(3, write):
        raise DamagedError("file content differs from its checksum")
    getattr(state._optimizer, back).assert_called_once_with(3)
