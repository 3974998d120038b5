"""A proxy in the environment: this machine is reached without it, other addresses through it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from urllib.request import urlopen

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from websockets.proxy import get_proxy
from websockets.uri import parse_uri

from flows.proxies import check_socks, spare_loopback
from msif_core.errors import InputError

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
DEAD = "http://127.0.0.1:9"


class Echo(BaseHTTPRequestHandler):
    """Answers with what was asked for: a path, or a whole address where it is taken for a proxy."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Echo) as listening:
        Thread(target=listening.serve_forever).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies, put back at the end."""
    for name in (*NAMES, *(name.upper() for name in NAMES)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@contextmanager
def client(url: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as opened:
        yield opened


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("exceptions", [{}, {"no_proxy": "a.example"}, {"NO_PROXY": "a.example, b.example"}])
def test_loopback_is_reached_directly(
    environ: pytest.MonkeyPatch, echo: str, name: str, exceptions: dict[str, str]
) -> None:
    environ.setenv(name, DEAD)
    for key, value in exceptions.items():
        environ.setenv(key, value)
    spare_loopback()
    with client(f"{echo}/api") as prefect:
        assert prefect.api_healthcheck() is None
    with urlopen(f"{echo}/api/health", timeout=10) as answer:
        assert answer.read() == b"/api/health"
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert get_proxy(parse_uri(f"ws://{host}:4200/api")) is None
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"]
    assert os.environ["no_proxy"].startswith("a.example" if exceptions else "localhost")


def test_other_addresses_go_through_the_proxy(environ: pytest.MonkeyPatch, echo: str) -> None:
    environ.setenv("http_proxy", echo)
    spare_loopback()
    with client("http://prefect.example/api") as prefect:
        assert prefect.hello().text == "http://prefect.example/api/hello"


def test_a_configured_server_on_this_machine_by_another_of_its_addresses(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("http_proxy", DEAD)
    spare_loopback("http://127.0.0.2:4200/api")
    assert os.environ["no_proxy"] == "localhost,127.0.0.1,::1,127.0.0.2"
    spare_loopback("http://prefect.example/api")
    assert "prefect.example" not in os.environ["no_proxy"]


def test_what_needs_no_change_stays(environ: pytest.MonkeyPatch) -> None:
    spare_loopback()
    assert "no_proxy" not in os.environ
    environ.setenv("http_proxy", DEAD)
    environ.setenv("no_proxy", "*")
    spare_loopback()
    assert os.environ["no_proxy"] == "*"


def test_a_socks_proxy_without_its_package_is_named(environ: pytest.MonkeyPatch) -> None:
    check_socks()
    environ.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    environ.setattr("flows.proxies.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^all_proxy is socks5://127\.0\.0\.1:9: a SOCKS proxy needs `pip install"):
        check_socks()
