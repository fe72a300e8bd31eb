"""Files of torch.save, read without unpickling: the same tensors, and nothing of what else a pickle can do."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.engine.weights.torch_archive import load
from pilotfish.errors import ModelError

DTYPES = [
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
]


def test_tensors_are_those_of_torch_load(tmp_path: Path) -> None:
    shared = torch.randn(6, 5)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    contents: list[Any] = [
        {str(dtype): torch.randn(3, 4).mul(9).to(dtype) for dtype in DTYPES},
        OrderedDict(a=shared, rows=shared[2:4], scalar=torch.tensor(5.0), row=shared[3]),
        module.state_dict(),
        {"parameter": torch.nn.Parameter(torch.ones(2))},
    ]
    for content in contents:
        torch.save(content, tmp_path / "model.bin")
        wanted, found = torch.load(tmp_path / "model.bin", weights_only=True), load(tmp_path / "model.bin")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_is_called(tmp_path: Path) -> None:
    for content in ({"a": torch.ones(1), "b": Evil(tmp_path / "made")}, Evil(tmp_path / "made")):
        torch.save(content, tmp_path / "model.bin")
        with pytest.raises(ModelError, match="calls 'posix mkdir', which is not called"):
            load(tmp_path / "model.bin")
    assert not (tmp_path / "made").exists()


def archive(content: bytes, storage: bytes = bytes(16), compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("m/data.pkl", content)
        made.writestr("m/data/0", storage)
    return file.getvalue()


def saved(tensor: torch.Tensor) -> tuple[bytes, bytes]:
    """The pickle and the whole archive of one tensor."""
    file = io.BytesIO()
    torch.save({"a": tensor}, file)
    with zipfile.ZipFile(file) as made:
        return made.read("archive/data.pkl"), file.getvalue()


PICKLE, WHOLE = saved(torch.ones(4))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"PK", WHOLE[:200], WHOLE[:-30], pickle.dumps({"a": 5})),
        archive(b""),
        archive(b"\x80\x02."),
        archive(pickle.dumps({"a": 5}, 2)),
        archive(pickle.dumps([1], 2)),
        archive(b"\x80\x02" + b"(" * 1000 + b"."),
        archive(b"\x80\x02tttt."),
        archive(b"\x80\x02h\x05."),
        archive(PICKLE, bytes(15)),
        archive(PICKLE, bytes(16 << 20), zipfile.ZIP_DEFLATED),
        archive(PICKLE.replace(b"K\x04\x85", b"K\x05\x85")),
        archive(bytes(2**22 + 1)),
    ],
    ids=range(16),
)
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="save it as safetensors"):
        load(tmp_path / "model.bin")


def test_the_archive_of_these_tests_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(archive(PICKLE))
    assert load(tmp_path / "model.bin")["a"].tolist() == [0.0] * 4
