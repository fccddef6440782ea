"""What may come in: how large, of which type, and to which address the server may listen."""

from __future__ import annotations

import ipaddress

from server.settings import Settings


class UnsafeBind(ValueError):
    """The server would be open to everybody who reaches the machine."""


def require_safe_bind(settings: Settings, *, locked: bool = False) -> None:
    """Refuse any address but loopback, as long as there are no API keys and LENSRACK_ALLOW_OPEN is not given.

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
    """Whether it is written as an address, bare of port and brackets, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- sizes ------------------------------------------------------------------------------------------------------------
