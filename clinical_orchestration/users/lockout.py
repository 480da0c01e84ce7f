"""When a login is refused because too many failed before it."""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from typing import Literal

Kind = Literal["user", "address"]

LOCKING_FAILURE: dict[Kind, int] = {"user": 5, "address": 20}
"""The failure in a row that locks first; many users may share an address."""

FIRST_LOCK = timedelta(seconds=30)
LONGEST_LOCK = timedelta(minutes=15)
FORGET_AFTER = timedelta(hours=1)
"""So long after the newest failure the count starts anew."""


def lock_time(kind: Kind, failures: int) -> timedelta:
    """Return for how long the next login is refused after so many failures: doubling from 30 s to 15 min."""
    beyond = failures - LOCKING_FAILURE[kind]
    if beyond < 0:
        return timedelta(0)
    return min(FIRST_LOCK * (1 << min(beyond, 16)), LONGEST_LOCK)


def address_group(address: str) -> str:
    """Return what is counted as one address: an IPv4 address, or an IPv6 network of 64 bits, which one host owns."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
