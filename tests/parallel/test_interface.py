"""The interface of the route to a machine, by tables as Linux shows them."""

from __future__ import annotations

import os

import pytest

from moetrain.parallel.interface import choose_interface, interface_to

TABLE = """\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	0101A8C0	0003	0	0	100	00000000	0	0	0
eth0	0001A8C0	00000000	0001	0	0	100	00FFFFFF	0	0	0
docker0	000011AC	00000000	0000	0	0	0	0000FFFF	0	0	0
ib0	0000010A	00000000	0001	0	0	50	0000FFFF	0	0	0
ib1	0000010A	00000000	0001	0	0	60	0000FFFF	0	0	0
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "route"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    ("host", "interface"),
    [
        ("192.168.1.7", "eth0"),
        ("10.1.255.3", "ib0"),  # the narrowest, of the least metric
        ("8.8.8.8", "eth0"),  # the default
        ("172.17.0.3", "eth0"),  # docker0 is down
        ("127.0.1.1", "lo"),
    ],
)
def test_the_route_decides(host, interface, table):
    assert interface_to(host, table) == interface


def test_no_table_and_no_such_host(table, tmp_path):
    assert interface_to("10.1.0.1", tmp_path / "none") is None
    assert interface_to("no-such-host.invalid", table) is None


def test_the_environment_wins(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    choose_interface("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("mine", "lo")
