"""Which IP addresses a picture may come from."""

from __future__ import annotations

import ipaddress

# Azure's wire server: an address like any other that answers each virtual machine there with its secrets.
_METADATA = ipaddress.IPv4Address("168.63.129.16")


def is_public(address: str) -> bool:
    """Whether an IP address is globally routable; addresses that embed an IPv4 one count as that one."""
    if "%" in address:
        return False
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = embedded(address)
        if inner is not None:
            return is_public(str(inner))
        # Global unicast (RFC 4291, section 2.4); leaves out the old site-local range, which Python counts as global.
        if ip not in ipaddress.ip_network("2000::/3"):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip != _METADATA


def embedded(address: str) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, Teredo, NAT64), if any."""
    try:
        ip = ipaddress.IPv6Address(address)
    except ValueError:
        return None
    if ip in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def is_dotted_quad(host: str) -> bool:
    """Whether a host is an IPv4 address in its one usual spelling."""
    try:
        return str(ipaddress.IPv4Address(host)) == host
    except ValueError:
        return False
