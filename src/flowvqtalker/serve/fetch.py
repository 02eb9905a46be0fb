"""Fetch media from hosts that the operator allowed, and from nowhere else.

A URL may name, or redirect to, a machine that only the server can reach. So the host must be on the list, its
addresses must be public, the connection goes to the address that was checked, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import tempfile
from fnmatch import fnmatch
from typing import BinaryIO
from urllib.parse import SplitResult, urlsplit

import httpx
from starlette.concurrency import run_in_threadpool

from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.settings import Settings

__all__ = ["fetch", "public_address"]

_TIMEOUT = 20.0  # seconds, of each step
_LONGEST = 300.0  # seconds in total


def public_address(host: str, port: int) -> str:
    """An address of a host, if all of them are on the public internet.

    Raises:
        OSError: if the name is unknown.
        ValueError: if an address is private, local or reserved.
    """
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        address = ipaddress.ip_address(text)
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not inner.is_global or inner.is_multicast:
            raise ValueError(f"{text} is not a public address")
    return found[0]


async def fetch(url: str, field: str, settings: Settings) -> BinaryIO:
    """Download a file.

    Arguments:
        url: http or https.
        field: of the form, for messages.
        settings: which hosts are allowed, and how many bytes.

    Returns:
        a temporary file, at its start.

    Raises:
        Problem: if the URL is not allowed or cannot be read.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise Problem("url_not_allowed", "This is not a URL.", field) from None
    if parts.scheme not in ("http", "https") or parts.username or parts.password:
        raise Problem("url_not_allowed", "Only http and https URLs without a password are fetched.", field)
    if not any(fnmatch(host, pattern) for pattern in settings.url_hosts):
        text = "The server does not fetch from this host; upload the file instead."
        raise Problem("url_not_allowed", text, field, allowed=list(settings.url_hosts))
    try:
        address = await run_in_threadpool(public_address, host, port)
    except (OSError, ValueError, UnicodeError) as error:
        raise Problem("url_not_allowed", f"{host} cannot be fetched from ({error}).", field) from error
    return await _download(parts, host, address, field, settings)


async def _download(parts: SplitResult, host: str, address: str, field: str, settings: Settings) -> BinaryIO:
    netloc = f"[{address}]" if ":" in address else address
    target = parts._replace(netloc=netloc if parts.port is None else f"{netloc}:{parts.port}", fragment="").geturl()
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it

    async def copy() -> None:
        async with (
            httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False) as client,
            client.stream("GET", target, headers={"Host": parts.netloc}, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.status_code != 200:
                raise Problem("invalid", f"{host} answered {answer.status_code} for the {field}.", field)
            async for piece in answer.aiter_bytes():
                file.write(piece)
                if file.tell() > settings.max_upload:
                    raise Problem("too_large", "The file is too large.", field, allowed=settings.max_upload)

    try:
        await asyncio.wait_for(copy(), _LONGEST)
    except BaseException as error:
        file.close()
        if isinstance(error, httpx.HTTPError | asyncio.TimeoutError):
            raise Problem("invalid", f"{host} cannot be read ({type(error).__name__}).", field) from error
        raise
    file.seek(0)
    return file
