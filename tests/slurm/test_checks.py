"""What a node finds out about itself, on recorded output of NVIDIA's tools, and on this machine."""

from __future__ import annotations

import os

import pytest
import torch

from moetrain.slurm import checks

# Shortened from NVIDIA's own documentation of both formats; no GPU wrote them here.
ECC = "0, 0\n1, 3\n2, [N/A]\n"
KERNEL_LOG = """\
[  10.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
[  10.2] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
[  11.0] NVRM: Xid (PCI:0000:af:00): 13, pid=99, Graphics Exception
[  11.5] eth0: link up
"""


def test_uncorrected_errors_of_a_gpu():
    assert checks.ecc_faults(ECC) == ["GPU 1: 3 uncorrected ECC error(s)"]


def test_xids_of_a_gpu_not_of_a_program():
    assert checks.xid_faults(KERNEL_LOG) == ["GPU PCI:0000:3b:00: Xid 79"]


def test_this_machine_is_well(tmp_path):
    assert checks.check_node(tmp_path / "new") == []


def test_a_wrong_product_is_counted(monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        product = right(a, b)
        return (
            product + (torch.arange(product.numel()).view_as(product) == 5)
            if a.dtype == torch.bfloat16
            else product
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert checks.products() == ["cpu: 1 of 66049 elements of a torch.bfloat16 product are wrong"]


def test_fewer_gpus_than_slurm_gave(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    assert checks.gpus() == ["Slurm gave 8 GPU(s), and CUDA sees 7"]


def test_disks(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    assert checks.disk(file / "below") == [f"{file / 'below'} cannot be written: Not a directory"]
    monkeypatch.setattr(checks, "_LEAST", 1 << 60)
    assert "MiB left of" in checks.disk(tmp_path)[0]
    assert os.listdir(tmp_path) == ["file"]


def test_a_check_that_raises_is_a_fault(tmp_path, monkeypatch):
    def raises():
        raise RuntimeError("driver\nmismatch")

    monkeypatch.setattr(checks, "products", raises)
    assert checks.check_node(tmp_path) == ["product: RuntimeError: driver mismatch"]


@pytest.mark.gpu
def test_products_on_gpus():
    assert checks.products() == []
