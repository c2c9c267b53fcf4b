"""The allow-list: which host may be reached at which address."""

import socket
from ipaddress import ip_address

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.errors import ConfigError, StepFailed
from workers.egress import CheckedResolver, Egress

PUBLIC = "93.184.216.34"
PUBLIC6 = "2606:2800:220:1:248:1893:25c8:1946"


@pytest.mark.parametrize(
    ("entries", "host", "address", "allowed"),
    [
        ([], "example.com", PUBLIC, False),
        (["example.com"], "example.com", PUBLIC, True),
        (["example.com"], "EXAMPLE.com.", PUBLIC6, True),
        (["Example.COM."], "example.com", PUBLIC, True),
        (["example.com"], "sub.example.com", PUBLIC, False),
        (["example.com"], "notexample.com", PUBLIC, False),
        (["*.example.com"], "a.b.example.com", PUBLIC, True),
        (["*.example.com"], "example.com", PUBLIC, False),
        (["*.example.com"], "notexample.com", PUBLIC, False),
        (["*.example.com"], "example.com.evil.org", PUBLIC, False),
        (["bücher.example"], "xn--bcher-kva.example", PUBLIC, True),
        # A name does not lead inside.
        (["example.com"], "example.com", "127.0.0.1", False),
        (["example.com"], "example.com", "10.0.0.1", False),
        (["example.com"], "example.com", "172.20.0.1", False),
        (["example.com"], "example.com", "192.168.1.1", False),
        (["example.com"], "example.com", "169.254.169.254", False),
        (["example.com"], "example.com", "100.64.0.1", False),
        (["example.com"], "example.com", "0.0.0.0", False),
        (["example.com"], "example.com", "224.0.0.1", False),
        (["example.com"], "example.com", "255.255.255.255", False),
        (["example.com"], "example.com", "::1", False),
        (["example.com"], "example.com", "::", False),
        (["example.com"], "example.com", "fe80::1", False),
        (["example.com"], "example.com", "fd00:ec2::254", False),
        (["example.com"], "example.com", "::ffff:127.0.0.1", False),
        (["example.com"], "example.com", "::ffff:169.254.169.254", False),
        (["example.com"], "example.com", "::127.0.0.1", False),
        (["example.com"], "example.com", "64:ff9b::7f00:1", False),
        (["example.com"], "example.com", "2002:7f00:1::", False),
        (["example.com"], "example.com", f"::ffff:{PUBLIC}", True),
        # A network does, for every name.
        (["127.0.0.0/8"], "localhost", "127.0.0.1", True),
        (["127.0.0.0/8"], "localhost", "::ffff:127.0.0.1", True),
        (["127.0.0.0/8"], "localhost", "::1", False),
        (["::1"], "localhost", "::1", True),
        (["10.1.0.0/16"], "inside", "10.1.2.3", True),
        (["10.1.0.0/16"], "inside", "10.2.0.1", False),
        (["169.254.169.254"], "metadata", "169.254.169.254", True),
        # The whole internet is not the inside.
        (["0.0.0.0/0"], "example.com", PUBLIC, True),
        (["0.0.0.0/0"], "example.com", "127.0.0.1", False),
        (["0.0.0.0/0"], "example.com", "169.254.169.254", False),
        (["::/0"], "example.com", PUBLIC6, True),
        (["::/0"], "example.com", "::1", False),
        (["0.0.0.0/0"], "example.com", PUBLIC6, False),
    ],
)
def test_decision(entries: list[str], host: str, address: str, allowed: bool) -> None:
    assert Egress(entries).allows(host, ip_address(address)) is allowed


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0x7f.0.0.1", "0x7f000001", "0177.0.0.1", "1.2.3.0x4", "127.0.0.1.5", "a.1", "0x"])
def test_odd_numbers_are_no_hosts(host: str) -> None:
    with pytest.raises(StepFailed) as caught:
        Egress(["0.0.0.0/0", "127.0.0.0/8"]).check_host(host)
    assert caught.value.reason == "EGRESS_DENIED"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "::ffff:127.0.0.1", "169.254.169.254", PUBLIC, "example.org"])
def test_check_before_dns_denies(host: str) -> None:
    with pytest.raises(StepFailed) as caught:
        Egress(["example.com"]).check_host(host)
    assert (caught.value.code, caught.value.reason) == ("PERMISSION_DENIED", "EGRESS_DENIED")
    assert host in caught.value.message
    assert "tools.egress_allow" in caught.value.message


def test_check_before_dns_passes_what_may_be_right() -> None:
    egress = Egress(["example.com", "127.0.0.0/8"])
    for host in ("example.com", "localhost", "127.0.0.1", "::ffff:127.0.0.1"):
        egress.check_host(host)


def test_all_bad_entries_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Egress(["ok.example", "10.0.0.1/8", "https://x.example", "*", "a.*.example", "x.example:80", "", "127.1"])
    assert len(caught.value.problems) == 7


class FixedResolver(AbstractResolver):
    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0) for address in self.addresses]

    async def close(self) -> None: ...


async def test_resolver_gives_only_allowed_addresses() -> None:
    egress = Egress(["example.com"])
    found = await CheckedResolver(egress, FixedResolver("10.0.0.1", PUBLIC, "::1")).resolve("example.com", 80)
    assert [entry["host"] for entry in found] == [PUBLIC]
    with pytest.raises(StepFailed, match=r"10\.0\.0\.1.*network"):
        await CheckedResolver(egress, FixedResolver("10.0.0.1")).resolve("example.com", 80)
