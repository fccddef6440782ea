"""The address that the server may listen on."""

from __future__ import annotations

import ipaddress

from server.settings import Settings


class UnsafeBind(ValueError):
    """The server would be open to everybody who can reach the machine."""


def require_safe_bind(settings: Settings, *, locked: bool = False) -> None:
    """Raises UnsafeBind for any address but loopback, unless there are API keys or LENSRACK_ALLOW_OPEN is set.

    `locked`: there are or have been keys, and requests need one.
    """
    if not locked and not settings.allow_open and not is_loopback(settings.host):
        raise UnsafeBind(
            f"listening on {settings.host} would serve everybody who can reach this machine, without API keys: "
            "expected a key (`python -m server keys create`), a loopback address such as 127.0.0.1, "
            "or LENSRACK_ALLOW_OPEN=true"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def is_address(host: str) -> bool:
    """Whether `host` is an IP address without port and brackets, rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
