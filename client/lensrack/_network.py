"""How a client reaches its server: directly on this machine, elsewhere by the environment's proxies and certificates.

httpx reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR when a client is made, and
fails there with whatever its parts raise. Here that becomes one sentence, which names the variable.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.request import proxy_bypass

import httpx

from .errors import InvalidInput

H = TypeVar("H", httpx.Client, httpx.AsyncClient)

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_NO_PROXY = ("NO_PROXY",)
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_KEY_LOG = "SSLKEYLOGFILE"  # read by Python itself


def open_http(kind: Callable[..., H], base_url: str, transport: object | None) -> H:
    """Return an httpx client for a server, over `transport` if there is one. Raises InvalidInput."""
    if transport is not None:
        return kind(transport=transport)
    url = httpx.URL(base_url)
    try:
        if not is_loopback(url.host):
            return kind()
        return kind(trust_env=False, verify=httpx.create_ssl_context() if url.scheme == "https" else _no_tls())
    except Exception as error:
        name = _culprit(error)
        raise InvalidInput(f"the environment's {name} cannot be used: {str(error) or type(error).__name__}") from error


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: localhost, 127.0.0.0/8 or ::1."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")  # RFC 6761, section 6.3
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def proxy_variable(base_url: str) -> str:
    """Return the name of the variable whose proxy a server is reached by; empty for none."""
    url = httpx.URL(base_url)
    if is_loopback(url.host) or proxy_bypass(url.host):
        return ""
    return next(_set(f"{url.scheme.upper()}_PROXY", "ALL_PROXY"), "")


def _no_tls() -> ssl.SSLContext:
    """Return a context that trusts nobody, for plain HTTP: it reads no certificates."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _culprit(error: Exception) -> str:
    """Return the name of the variable that an httpx client could not be made for."""
    if isinstance(error, OSError):
        key_log = [_KEY_LOG] if error.filename is not None and error.filename == os.environ.get(_KEY_LOG) else []
        return next(iter([*key_log, *_set(*_CERTIFICATES), *_set(_KEY_LOG)]), _CERTIFICATES[0])
    return next(iter([*(name for name in _set(*_PROXIES) if _is_broken(name)), *_set(*_NO_PROXY)]), "proxy settings")


def _set(*names: str) -> Iterator[str]:
    """Yield the variables that are set; of a proxy's two spellings httpx prefers the lower-case one."""
    return (name for upper in names for name in (upper.lower(), upper) if os.environ.get(name))


def _is_broken(name: str) -> bool:
    proxy: Any = os.environ[name]
    try:
        httpx.HTTPTransport(proxy=proxy if "://" in proxy else f"http://{proxy}", verify=_no_tls()).close()
    except Exception:
        return True
    return False
