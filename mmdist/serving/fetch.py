"""Pictures and videos behind http(s) addresses: of allowed hosts alone, from public addresses, within size and time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import quote, urlsplit

import httpcore2 as httpcore

from mmdist.serving.errors import ServeError

PORTS = {"http": 80, "https": 443}
HEADERS = [("User-Agent", "mmdist"), ("Accept", "image/*, video/*"), ("Accept-Encoding", "identity")]
GLOBAL_UNICAST = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address
Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """False for private, loopback, link-local, shared, multicast and reserved addresses, also inside an IPv6 one."""
    found = ip_address(address)
    inner = embedded(found) if isinstance(found, IPv6Address) else None
    if inner is not None:
        return is_public(str(inner))
    if isinstance(found, IPv6Address) and found not in GLOBAL_UNICAST:
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address behind a mapped, 6to4 or NAT64 one (Teredo's are not global)."""
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


async def resolve_host(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a host once and connects to the address that was checked: its name cannot point elsewhere a moment
    later. TLS and the Host header still see the name."""

    def __init__(self, resolve: Resolve = resolve_host, is_allowed: Callable[[str], bool] = is_public):
        self.resolve, self.is_allowed, self.network = resolve, is_allowed, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self.resolve(host, port)
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise ServeError(422, f"{host} is not at a public address")
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self.network.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
        assert failure is not None
        raise failure


@dataclass(frozen=True)
class Place:
    """Where an address points, read once: what is checked is what is asked for."""

    scheme: str
    host: str  # ASCII, lower case
    port: int
    target: str

    @property
    def names(self) -> set[str]:
        """How an allow-list may call it: the host alone stands for the usual ports."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return {f"{host}:{self.port}"} | ({host} if self.port in PORTS.values() else set())


def read_url(url: str) -> Place:
    """ValueError where it is none, or has a user in it."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme not in PORTS or not parts.hostname:
        raise ValueError("expected http://HOST/PATH or https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise ValueError("an address with a user in it")
    host = parts.hostname if ":" in parts.hostname else parts.hostname.encode("idna").decode()
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}")
    return Place(scheme, host.lower(), parts.port or PORTS[scheme], target.removesuffix("?"))


class Fetcher:
    """allowed: hosts as HOST (ports 80 and 443) or HOST:PORT, exactly; subdomains are hosts of their own.

    network and ssl_context: what tests replace; no config key does.
    """

    def __init__(
        self,
        allowed: Iterable[str],
        *,
        timeout_s: float,
        max_bytes: int,
        network: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: Any = None,
    ):
        self.allowed = {name.lower() for name in allowed}
        self.timeout_s, self.max_bytes = timeout_s, max_bytes
        self.network = network or PublicNetwork()
        if ssl_context is None and self.allowed:  # reading the authorities takes a while
            ssl_context = httpcore.default_ssl_context()
        self.ssl_context = ssl_context

    async def fetch(self, url: str, name: str) -> bytes:
        """name: for errors. ServeError 422, and 413 past max_bytes."""
        try:
            place = read_url(url)
        except (UnicodeError, ValueError) as error:
            raise ServeError(422, f"{name}: {error}") from error
        if not place.names & self.allowed:
            raise ServeError(422, f"{name}: {place.host} is not among server.allowed_media_domains of this server")
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._get(place, name)
        except TimeoutError as error:
            raise ServeError(422, f"{name}: did not arrive within {self.timeout_s:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise ServeError(422, f"{name}: could not be fetched ({error or type(error).__name__})") from error

    async def _get(self, place: Place, name: str) -> bytes:
        url = httpcore.URL(scheme=place.scheme, host=place.host, port=place.port, target=place.target)
        pool = httpcore.AsyncConnectionPool(ssl_context=self.ssl_context, network_backend=self.network)
        async with pool, pool.stream("GET", url, headers=HEADERS) as response:
            if 300 <= response.status < 400:
                raise ServeError(422, f"{name}: answered {response.status}; redirects are not followed")
            if response.status != 200:
                raise ServeError(422, f"{name}: answered {response.status}")
            chunks, size = [], 0
            async for chunk in response.aiter_stream():
                size += len(chunk)
                if size > self.max_bytes:
                    raise too_large(name, self.max_bytes)
                chunks.append(chunk)
            return b"".join(chunks)


def too_large(name: str, max_bytes: int) -> ServeError:
    return ServeError(413, f"{name}: larger than {max_bytes / 1e6:g} MB (server.max_media_mb)")
