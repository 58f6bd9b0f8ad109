"""Networks compressed without loss, and those that the repository holds."""

import hashlib
import json
import math

import pytest
import safetensors.torch
import torch
from torch import nn

from companion.runs.data import project_root
from companion.runs.models import build
from companion.runs.packing import pack, unpack
from companion.runs.store import PACKED, SHIPPED, SIDECAR, Store

NETWORKS = project_root() / "data" / "networks"
TENSORS = {
    "weight": torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)),
    "count": torch.tensor(2**40),
    "mask": torch.tensor([True, False, True]),
    "half": torch.arange(5.0).half(),
    "double": torch.tensor([math.pi, -0.0, math.inf, math.nan], dtype=torch.float64),
    "one": torch.tensor([[1.5]]),
    "none": torch.empty(0, 3),
}


@pytest.mark.parametrize("names", [*([name] for name in TENSORS), [*TENSORS], []], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_come_back_bit_for_bit(names, metadata):
    content = safetensors.torch.save({name: TENSORS[name] for name in names}, metadata)
    assert unpack(pack(content)) == content


def test_a_network_comes_back_bit_for_bit_and_takes_less():
    torch.manual_seed(0)
    network = build("resnet8-bn-w1", (3, 32, 32), 10)
    content = safetensors.torch.save(network.state_dict())
    packed = pack(content)
    assert unpack(packed) == content
    assert len(packed) < 3.45 * sum(value.numel() for value in network.state_dict().values())


def test_what_is_no_safetensors_file_is_not_packed():
    content = safetensors.torch.save({"weight": TENSORS["weight"]})
    for wrong in (b"", b"not weights at all", content[:-1], content + b"\0", content[:20], content[8:]):
        with pytest.raises(ValueError, match="safetensors file"):
            pack(wrong)


def test_what_was_cut_or_altered_is_not_unpacked():
    packed = pack(safetensors.torch.save(nn.Linear(30, 30).state_dict()))
    for wrong in (b"", packed[:-1], packed[: len(packed) // 2], b"x" + packed):
        with pytest.raises(ValueError, match="not a packed network"):
            unpack(wrong)
    for position in range(2, len(packed), 97):  # zlib has a checksum; the first two bytes are its head
        with pytest.raises(ValueError, match="not a packed network"):
            unpack(packed[:position] + bytes([packed[position] ^ 0x10]) + packed[position + 1 :])


def test_every_network_of_the_repository_is_whole_fresh_and_documented():
    store = Store(NETWORKS)
    if not (names := store.names()):
        pytest.skip("no network comes with the repository")
    for name in names:
        folder = store.path(name)
        assert sorted(path.name for path in folder.iterdir()) == [PACKED, SIDECAR], name
        store.load(name)  # its recipe is today's, and its weights are finite
        info = json.loads((folder / SIDECAR).read_text())
        assert hashlib.sha256(unpack((folder / PACKED).read_bytes())).hexdigest() == info["sha256"], name
        assert info["run"] == name and info["metrics"]["test_accuracy"] > 0.4, name
        assert all(info.get(fact) for fact in ("processor", "precision", "data_sha256")), name
    assert sum(path.stat().st_size for path in NETWORKS.rglob("*") if path.is_file()) <= SHIPPED
