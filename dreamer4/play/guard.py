"""Who may speak to the server: pages that it served itself, under a name that is its own, with the token if it has one.

A page of another site can open sockets to 127.0.0.1 in its visitor's browser, and by DNS rebinding (a name of its own
that comes to mean 127.0.0.1) can even pass for the server's own page. The first betrays itself by its Origin, the
second by its Host.
"""

import dataclasses
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}
"""That a scheme means where none is said."""


def is_local(host: str) -> bool:
    """Whether only this machine reaches what listens at ``host``."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


@dataclasses.dataclass(frozen=True)
class Guard:
    """``names`` are the server's own, beside its addresses; without a ``token`` only this machine's count."""

    names: Sequence[str] = ()
    token: str | None = None

    def knows_host(self, hosts: Sequence[str]) -> bool:
        """Whether a request with these Host headers means this server: one, with a name of its own or, where a token
        is asked for, any address, since a name that was made to mean another machine is none."""
        name = host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None:
            return False
        return is_local(name) or name in self.names or (self.token is not None and _address(name) is not None)

    def knows_origin(self, origins: Sequence[str], hosts: Sequence[str]) -> bool:
        """Whether a socket is opened by a page that came from where the socket leads: the same name and port, where a
        scheme's own port may be said or not, since a proxy may add it to the Host."""
        if len(origins) != 1 or len(hosts) != 1:
            return False
        scheme, mark, page = origins[0].lower().partition("://")
        if not mark or scheme not in PORTS:
            return False
        place = _place(page, PORTS[scheme])
        return place is not None and place == _place(hosts[0].lower(), PORTS[scheme])

    def knows_token(self, tokens: Sequence[str]) -> bool:
        """Whether it brings the token; any will do where none is asked for."""
        if self.token is None:
            return True
        return len(tokens) == 1 and hmac.compare_digest(tokens[0].encode(), self.token.encode())


def host_name(host: str) -> str | None:
    """``localhost`` of ``LOCALHOST:8000``, and ``::1`` of ``[::1]:8000``; None of what is no Host."""
    place = _place(host, None)
    return None if place is None else place[0]


def _place(host: str, default: int | None) -> tuple[str, int | None] | None:
    """The name and the port of a Host, the ``default`` where it says none; None of what is no Host."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port  # which raises where it is no number
    except ValueError:
        return None
    if parts.hostname is None or parts.netloc != host or "@" in host:
        return None
    return parts.hostname, default if port is None else port


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
