"""Connections to HTTP servers, kept from one request to the next: a pool a process for each proxy, shared by threads.

A new connection costs one round trip to the server, with TLS two or three: more than a small tensor does.
"""

import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers, parse_url

TIMEOUT_S: Final = 20.0
MAX_REDIRECTS: Final = 10
# Idle connections to one server: no fewer than there are threads that read.
_KEPT: Final = 64
# Bytes of an unwanted body that are read, so that its connection can be used again.
_READ_AWAY: Final = 1 << 16
# (process, address of the proxy): a child that was forked must not write to its parent's connections.
_pools: Final[dict[tuple[int, str], PoolManager]] = {}


def get(address: str, headers: Mapping[str, str], first: Mapping[str, str]) -> BaseHTTPResponse:
    """The answer to a GET, its body still to be read, and closed; `MAX_REDIRECTS` are followed.

    first: further headers, for the address itself and not for where it redirects to. Proxies are the environment's.
    An answer whose body was read to its end leaves its connection to the next request. Raises urllib3's `HTTPError`,
    and `ValueError` where that address, one that it redirects to, or the proxy's is none.
    """
    sent = {**headers, **first}
    for left in reversed(range(MAX_REDIRECTS + 1)):
        answer = _pool(_proxy(address)).request(
            "GET", address, headers=sent, timeout=TIMEOUT_S, retries=False, redirect=False, preload_content=False,
            decode_content=False, enforce_content_length=False,
        )  # fmt: skip
        there = answer.get_redirect_location()
        if not there or not left:
            break
        close(answer)
        address, sent = urljoin(address, there), {**headers}
    return answer


def close(answer: BaseHTTPResponse) -> None:
    """Close an answer whose body is not wanted; where that is short, its connection is kept."""
    with suppress(HTTPError, OSError):
        answer.read(_READ_AWAY)
    answer.close()


def _proxy(address: str) -> str:
    """The address of the proxy that the environment has for an address, "" for none."""
    parts = urlsplit(address)
    proxy = "" if proxy_bypass(parts.netloc.rpartition("@")[2]) else getproxies().get(parts.scheme, "")
    return proxy if "://" in proxy or not proxy else f"http://{proxy}"


def _pool(proxy: str) -> PoolManager:
    key = os.getpid(), proxy
    return _pools.get(key) or _pools.setdefault(key, _new_pool(proxy))


def _new_pool(proxy: str) -> PoolManager:
    secure = ssl.create_default_context()
    if not proxy:
        return PoolManager(maxsize=_KEPT, ssl_context=secure)
    user = parse_url(proxy).auth
    return ProxyManager(
        proxy,
        maxsize=_KEPT,
        ssl_context=secure,
        proxy_headers=make_headers(proxy_basic_auth=unquote(user)) if user else None,
    )
