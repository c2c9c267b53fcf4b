"""Which hosts may a tool call? Nothing but what `tools.egress_allow` lists. Pure, apart from the resolver at the end.

The decision is made on the very address that is connected to, after DNS, so that a public name cannot lead inside:

    api.example.com      that name, at public addresses only
    *.example.com        every name below it (not example.com itself), at public addresses only
    10.1.0.0/16, ::1     every address of the network, whatever name led to it

Addresses with a special purpose (private, loopback, link-local and with it cloud metadata, carrier NAT, multicast and the IPv6
forms that carry an IPv4 address) need a network that lies inside that special range; 0.0.0.0/0 means the public internet.
Source of the ranges: the IANA IPv4 and IPv6 Special-Purpose Address Registries.
"""

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.errors import ConfigError, StepFailed

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_SPECIAL: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4"),
        *("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
        *("5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
)


def _inside(network: Network, others: Sequence[Network]) -> bool:
    return any(network.version == other.version and network.subnet_of(other) for other in others)  # type: ignore[arg-type]


def _plain(address: Address) -> Address:
    """An IPv4-mapped IPv6 address as the IPv4 address that the kernel connects to."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _plain_name(host: str) -> str:
    return host.rstrip(".").lower()


def literal(host: str) -> Address | None:
    """The address that host spells canonically; None for a name."""
    try:
        return _plain(ip_address(host.strip("[]")))
    except ValueError:
        return None


def _is_odd_number(host: str) -> bool:
    """True for spellings that C libraries take for an IPv4 address: `2130706433`, `127.1`, `0x7f.1`, `0177.0.0.1`.

    The rule is the WHATWG URL standard's "ends in a number".
    """
    last = _plain_name(host).rpartition(".")[2]
    return last.isdigit() or (last.startswith("0x") and all(digit in "0123456789abcdef" for digit in last[2:]))


class Egress:
    """The allow-list. Entries are names, `*.` names, addresses or networks; ConfigError names every other one."""

    def __init__(self, entries: Sequence[str]) -> None:
        names, suffixes, networks, problems = set(), [], [], []
        for entry in entries:
            try:
                networks.append(ip_network(entry.strip("[]")))
                continue
            except ValueError:
                pass
            name = _plain_name(entry)
            body = name.removeprefix("*.")
            if not body or "*" in body or _is_odd_number(body) or any(char in body for char in "/:@?# []"):
                problems.append(f"tools.egress_allow: {entry!r} is neither a host name, '*.' and a name, nor a network without host bits")
                continue
            try:
                body = body.encode("idna").decode()
            except UnicodeError:
                problems.append(f"tools.egress_allow: {entry!r} is not a host name")
                continue
            if name.startswith("*."):
                suffixes.append("." + body)
            else:
                names.add(body)
        if problems:
            raise ConfigError("egress", problems)
        self._names = frozenset(names)
        self._suffixes = tuple(suffixes)
        self._networks = tuple(networks)
        self._special_networks = tuple(network for network in networks if _inside(network, _SPECIAL))

    def allows(self, host: str, address: Address) -> bool:
        """May a connection for host go to address?"""
        address = _plain(address)
        if any(address in special for special in _SPECIAL):
            return any(address in network for network in self._special_networks)
        return self._lists(host) or any(address in network for network in self._networks)

    def check_host(self, host: str) -> None:
        """What is certain before DNS: refuses addresses outside the networks and names that nothing can allow.

        Raises StepFailed (PERMISSION_DENIED, EGRESS_DENIED). Names that pass are decided on when they are resolved.
        """
        address = literal(host)
        if address is not None:
            if not self.allows(host, address):
                raise denied(host, [address])
        elif _is_odd_number(host):
            raise StepFailed(
                f"host {host!r} is not allowed: it is a number but not an IP address in its usual spelling",
                code="PERMISSION_DENIED",
                reason="EGRESS_DENIED",
            )
        elif not self._networks and not self._lists(host):
            raise denied(host, [])

    def _lists(self, host: str) -> bool:
        name = _plain_name(host)
        return name in self._names or any(name.endswith(suffix) for suffix in self._suffixes)


def denied(host: str, addresses: Sequence[Address]) -> StepFailed:
    """The error for a host, with the addresses that it has."""
    special = any(address in network for address in map(_plain, addresses) for network in _SPECIAL)
    where = f" ({', '.join(map(str, addresses))})" if addresses and literal(host) is None else ""
    what = "an address of a private or special network, add that network (CIDR)" if special else "add it"
    return StepFailed(
        f"host {host!r}{where} is not allowed: {what} to tools.egress_allow", code="PERMISSION_DENIED", reason="EGRESS_DENIED"
    )


class CheckedResolver(AbstractResolver):
    """Resolves names and gives the connector only addresses that the allow-list accepts.

    Raises StepFailed (EGRESS_DENIED) when none is left.
    """

    def __init__(self, egress: Egress, resolver: AbstractResolver | None = None) -> None:
        self._egress = egress
        self._resolver = resolver or ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        allowed = [entry for entry in found if self._egress.allows(host, ip_address(entry["host"]))]
        if not allowed:
            raise denied(host, [ip_address(entry["host"]) for entry in found])
        return allowed

    async def close(self) -> None:
        await self._resolver.close()
