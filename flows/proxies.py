"""Proxies of the environment: other addresses go through them, those of this machine never."""

from __future__ import annotations

import os
from importlib.util import find_spec
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import getproxies_environment

from msif_core.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def spare_loopback(url: str | None = None) -> None:
    """Have this process and its children reach this machine, and `url` where it is on it, without a proxy.

    The list of exceptions has two names (`no_proxy` and `NO_PROXY`); libraries differ in which they read.
    """
    if not (proxies := getproxies_environment()):
        return
    exceptions = [name.strip() for name in proxies.get("no", "").split(",") if name.strip()]
    host = urlsplit(url or "").hostname
    ours = (*LOOPBACK, host) if host and _is_loopback(host) else LOOPBACK
    if "*" not in exceptions:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*exceptions, *ours]))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_socks() -> None:
    """Refuse a SOCKS proxy that Prefect's client cannot use, and without which it does not even reach this machine.

    Raises:
        InputError: the package for it is missing; names the variable.
    """
    for kind, proxy in getproxies_environment().items():
        if kind in ("http", "https", "all") and proxy.startswith("socks") and find_spec("socksio") is None:
            raise InputError(f"{kind}_proxy is {proxy}: a SOCKS proxy needs `pip install socksio`; or unset it")
