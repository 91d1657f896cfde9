"""Sums and gatherings between ranks over gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from serving.errors import EngineDeadError
from serving.transport.tensor_group import TensorGroup
from tests.serving.ranks import run_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_get_the_same_sum(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = torch.randn(size, 7, 33, generator=torch.Generator().manual_seed(1)).to(dtype)

    def work(group: TensorGroup) -> Tensor:
        assert group.size == size
        mine = parts[group.rank].clone()
        group.all_reduce(mine)
        return mine

    sums = run_ranks(size, tmp_path, work)
    assert all(torch.equal(one, sums[0]) for one in sums)
    loose = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(sums[0].float(), parts.float().sum(0), atol=loose, rtol=loose)


def test_gathered_parts_stand_side_by_side_in_the_order_of_ranks(tmp_path: Path) -> None:
    def work(group: TensorGroup) -> list[Tensor]:
        rows = torch.arange(3, dtype=torch.float32).unsqueeze(1) * 100
        part = rows + torch.arange(4) + 10 * group.rank
        return [group.all_gather(part), group.all_gather(part[:, ::2])]

    expected = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])
    for whole, strided in run_ranks(2, tmp_path, work):
        for row in range(3):
            assert torch.equal(whole[row], expected + 100 * row)
            assert torch.equal(strided[row], expected[::2] + 100 * row)


def test_links_stay_on_the_loopback_interface(tmp_path: Path) -> None:
    def work(group: TensorGroup) -> list[str]:
        return [item.laddr.ip for item in psutil.Process().net_connections(kind="inet")]

    for addresses in run_ranks(2, tmp_path, work):
        assert addresses
        assert set(addresses) <= {"127.0.0.1", "::1"}


def test_a_rank_whose_neighbour_is_gone_says_so(tmp_path: Path) -> None:
    def work(group: TensorGroup) -> None:
        if group.rank == 0:
            group.all_reduce(torch.zeros(1 << 20))

    with pytest.raises(EngineDeadError, match="link between the ranks of stage 0 broke"):
        run_ranks(2, tmp_path, work, together=False)


def test_one_rank_needs_no_tensor_group() -> None:
    code = (
        "import sys, serving.models, serving.stage.worker, serving.layers; "
        "print('serving.transport.tensor_group' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
