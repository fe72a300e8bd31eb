"""Sums and parts of gloo's ranks, each a thread with a process group of its own: bit by bit as a Communicator says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.distributed_c10d import AllreduceOptions, GatherOptions

from pilotfish.engine.ranks.torch_group import TorchGroup, connect, join_store, serve_store
from pilotfish.errors import CollectiveError

CPU = torch.device("cpu")

Each = Callable[[Callable[[TorchGroup], torch.Tensor]], list[torch.Tensor]]


@contextmanager
def ranks(size: int, timeout: float = 30.0) -> Iterator[Each]:
    """Calls a function on each rank at once; returns what they returned, by rank."""
    store = serve_store("127.0.0.1", size)

    def meet(rank: int) -> TorchGroup:
        return connect(join_store("127.0.0.1", store.port, size, timeout), rank, size, CPU, "127.0.0.1", timeout)

    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(meet, range(size)))
        yield lambda function: list(pool.map(function, groups))
        for group in groups:
            group.close()


@pytest.fixture(params=(2, 3))
def each(request: pytest.FixtureRequest) -> Iterator[Each]:
    with ranks(request.param) as found:
        yield found


def rows(rank: int, count: int = 7, width: int = 96) -> torch.Tensor:
    """(count, width): such that sums in another order differ."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank % 3)


def test_a_sum_is_that_of_the_ranks_in_order_on_each_of_them(each: Each) -> None:
    sums = each(lambda group: group.all_reduce(rows(group.rank)))
    expected = rows(0)
    for rank in range(1, len(sums)):
        expected = expected + rows(rank)
    for found in sums:
        assert found.shape == (7, 96)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_row_s_sum_does_not_depend_on_the_rows_beside_it(each: Each) -> None:
    together = each(lambda group: group.all_reduce(rows(group.rank)))[0]

    def one(place: int, group: TorchGroup) -> torch.Tensor:
        return group.all_reduce(rows(group.rank)[place : place + 1])

    for place in range(7):
        alone = each(partial(one, place))[-1]
        assert torch.equal(alone[0], together[place])


def test_what_is_summed_need_not_be_contiguous(each: Each) -> None:
    whole = each(lambda group: group.all_reduce(rows(group.rank)))[0]
    halves = each(lambda group: group.all_reduce(rows(group.rank)[:, ::2]))
    assert all(torch.equal(half, whole[:, ::2]) for half in halves)


def test_parts_come_side_by_side_to_rank_0(each: Each) -> None:
    gathered = each(lambda group: group.gather(rows(group.rank, count=3, width=5)))
    assert torch.equal(gathered[0], torch.cat([rows(rank, 3, 5) for rank in range(len(gathered))], dim=1))


def test_collectives_are_counted(each: Each) -> None:
    def both(group: TorchGroup) -> torch.Tensor:
        group.all_reduce(rows(0))
        group.gather(rows(0))
        return torch.tensor(group.entered)

    assert {int(count) for count in each(both)} == {2}


def test_a_rank_that_does_not_come_fails_those_that_wait_for_it() -> None:
    def wait_for_the_other(group: TorchGroup) -> torch.Tensor:
        if group.rank == 0:
            with pytest.raises(CollectiveError, match="rank 0 could not complete a collective"):
                group.all_reduce(rows(0))
        return torch.ones(1)

    with ranks(2, timeout=1.0) as each:
        each(wait_for_the_other)


# NCCL, by a stand-in: what it is asked, on tensors of a GPU that is not there.

CUDA = torch.device("cuda", 0)


class StandIn:
    """ProcessGroupNCCL's methods that are used, with their rules: contiguous tensors of the GPU, no waiting, and on the
    current stream, where it returns no work. Signatures as torch's own stubs have them."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions) -> None:
        (tensor,) = tensors
        assert tensor.device == CUDA
        assert tensor.is_contiguous()
        assert opts.reduceOp == dist.ReduceOp.SUM
        assert not opts.asyncOp

    def gather(
        self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor], opts: GatherOptions
    ) -> None:
        (given,) = input_tensors
        assert given.device == CUDA
        assert given.is_contiguous()
        assert opts.rootRank == 0
        assert not opts.asyncOp
        if self.rank:
            assert output_tensors == []
        else:
            (parts,) = output_tensors
            assert [(part.shape, part.device) for part in parts] == [(given.shape, CUDA)] * self.size


@pytest.mark.parametrize("rank", [0, 1])
def test_nccl_is_asked_for_sums_in_place_and_for_parts_on_rank_0(rank: int) -> None:
    """A look at a value, which would wait for the GPU, fails on fake tensors; so what is here can be captured."""
    group = TorchGroup(rank, 2, CUDA, StandIn(rank, 2))
    with FakeTensorMode():
        x = torch.empty(5, 8, dtype=torch.bfloat16, device=CUDA)
        assert group.all_reduce(x) is x
        gathered = group.gather(torch.empty(3, 7, device=CUDA))
        assert gathered.device == CUDA
        if rank == 0:
            assert gathered.shape == (3, 14)
    assert group.entered == 2
