"""A connection to Ray: a cluster of this machine's own that only this machine can reach, or one that runs elsewhere.

Whoever can talk to a Ray cluster can run any code on it. So a cluster that is started here listens on the loopback
address and asks for a token, and another machine's is spoken to only with one (Ray's token authentication, from 2.52 on).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import ipaddress
import logging
import os
import secrets
import socket
import stat
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..host.errors import first_line
from .devices import VISIBLE
from .jobs import BadMap

log = logging.getLogger("hotpath.distributed")

FIRST_WITH_TOKENS = "2.52"
TOKEN_FILE = "ray_auth_token"
ANSWER = 5.0  # seconds to wait for somebody to answer at an address
OBJECT_STORE = 80 << 20  # bytes; jobs are a few kilobytes of JSON, files never go through Ray
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
SETTINGS = {
    # Ray would hide the GPUs of actors that ask for none, and say so at length.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class ClusterOptions:
    """address: of a cluster, such as 10.0.0.5:6379; None starts one here. token_file: None looks in Ray's own places.

    cpus, gpus: of a cluster that is started here; None lets Ray count.
    """

    address: str | None = None
    token_file: Path | None = None
    cpus: int | None = None
    gpus: int | None = None


def missing() -> str | None:
    """Why Ray cannot be used here, as a sentence; None when it can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed: `pip install 'ray>=2.52'` brings it; the executor local needs none."
    return None


def without_tokens(version: str) -> bool:
    """Whether this Ray knows no token authentication: it would ignore what asks for it and let everybody in."""
    from packaging.version import Version

    return Version(version) < Version(FIRST_WITH_TOKENS)


def host_and_port(address: str) -> tuple[str, int | None]:
    """The parts of HOST, HOST:PORT or ray://HOST:PORT; an IPv6 host may stand in brackets."""
    place = address.partition("://")[2] or address
    host, port = place, ""
    if place.startswith("["):
        host, _, port = place[1:].partition("]")
        port = port.removeprefix(":")
    elif place.count(":") == 1:
        host, _, port = place.partition(":")
    return host, int(port) if port.isdecimal() and 0 < int(port) < 1 << 16 else None


def is_loopback(address: str) -> bool:
    """Whether HOST, HOST:PORT or ray://HOST:PORT is this very machine."""
    host, _ = host_and_port(address)
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_token(folder: Path) -> Path:
    """The file with this user's own token, made when it is not there; only the user can read it.

    Raises BadMap when somebody else could.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKEN_FILE
    if not path.exists():
        # Whole or not at all, and never in place of another's: runs that start together must agree on it.
        unfinished = folder / f"{TOKEN_FILE}.{secrets.token_hex(4)}"
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(unfinished, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links: two first starts at the same moment may disagree there
                unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    check_token_file(path)
    return path


def check_token_file(path: Path) -> None:
    """Raises BadMap unless the file is there, holds something, and is the user's alone."""
    if not path.is_file():
        raise BadMap(f"There is no token file {path}.")
    if os.name == "posix":
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise BadMap(f"Others can read the token in {path}; close it with `chmod 600 {path}`.")
    if not path.read_text(encoding="ascii", errors="replace").strip():
        raise BadMap(f"The token file {path} is empty.")


def token_environment(options: ClusterOptions, own_folder: Path) -> dict[str, str]:
    """The environment Ray authenticates with. Raises BadMap for another machine's address without a token."""
    if options.token_file is not None:
        check_token_file(options.token_file)
        return {MODE: "token", TOKEN_PATH: str(options.token_file.resolve())}
    if os.environ.get(TOKEN):
        return {MODE: "token"}
    named = os.environ.get(TOKEN_PATH)
    usual = Path(named or os.path.expanduser("~/.ray/auth_token"))  # noqa: PTH111 - no home: as is, and none is there
    if named or (options.address is not None and usual.is_file()):
        check_token_file(usual)
        return {MODE: "token", TOKEN_PATH: str(usual)}
    if options.address is None:
        return {MODE: "token", TOKEN_PATH: str(make_token(own_folder))}
    if is_loopback(options.address):
        # A cluster that this machine's users share may have been started without; Ray refuses if it wants a token.
        return {}
    raise BadMap(
        f"{options.address} is another machine, and there is no token: whoever reaches a Ray cluster without one can run "
        f"anything on it. Start the cluster with {MODE}=token and give its token with --token-file, {TOKEN_PATH} or {TOKEN}."
    )


@contextmanager
def connected(options: ClusterOptions, own_folder: Path, gpus: Sequence[str] = ()) -> Iterator[Any]:
    """The module `ray`, connected; what was started here is shut down afterwards. A connection that stands is used.

    own_folder: where the token of clusters that are started here lies. gpus: those that such a cluster may use.
    Raises BadMap when Ray is missing, the address is refused, or nobody answers there.
    """
    if (standing := _standing()) is not None:
        # Whoever made it has given the token, and its address may be one that is not reached from here.
        log.info("Ray: the connection that this program has already is used")
        yield standing
        return
    if (why := missing()) is not None:
        raise BadMap(why)
    if options.address is not None and options.address.lower() in ("auto", "local"):
        raise BadMap("Give the address as HOST:PORT, or none to start a cluster of this machine's own.")
    if without_tokens(version := importlib.metadata.version("ray")):
        raise BadMap(
            f"Ray {version} has no token authentication, so anybody who reaches it could run code here: install "
            f"{FIRST_WITH_TOKENS} or later."
        )
    settings = {**SETTINGS, **token_environment(options, own_folder)}
    if options.address is not None:
        _find(options.address)
    elif gpus:
        settings[VISIBLE] = ",".join(gpus)
    with _environment(settings):
        import ray

        _read_environment()
        try:
            _connect(ray, options)
            listens = str(ray.get_runtime_context().gcs_address)
            if options.address is None and not is_loopback(listens):
                log.warning("Ray listens at %s, which other machines may reach; they need the token.", listens)
            yield ray
        finally:
            # Also after a second Ctrl-C in the middle of the start, which has processes running by then.
            ray.shutdown()
    _read_environment()  # what it says is what the program around has set


def _read_environment() -> None:
    """Ray reads once for a process whether a token is asked for, and which: another's import of it, or a cluster before."""
    raylet = importlib.import_module("ray._raylet")
    # Neither is of Ray's public side, which has nothing for it; both are what Ray itself calls after it has made a token.
    if (config := getattr(raylet, "Config", None)) is not None:
        config.initialize("")
    if (loader := getattr(raylet, "AuthenticationTokenLoader", None)) is not None:
        loader.instance().reset_cache()


def _standing() -> Any:
    """The module `ray` when this program is connected to a cluster already, else None."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


def _connect(ray: Any, options: ClusterOptions) -> None:
    common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": "error"}
    try:
        if options.address is None:
            with _loopback_only():
                ray.init(
                    address="local",
                    num_cpus=options.cpus,
                    num_gpus=options.gpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE,
                    _node_ip_address="127.0.0.1",
                    **common,
                )
        else:
            _knock(options.address)
            ray.init(address=options.address, **common)
    except Exception as error:  # of a node that does not start in time, Ray raises no more special one
        raise BadMap(_refused(error, options.address)) from error


def _find(address: str) -> None:
    """Raises BadMap at once when nobody listens at HOST:PORT; Ray would take a minute to say less."""
    host, port = host_and_port(address)
    if not host or port is None:
        raise BadMap(f"{address!r} is no address of a cluster; give HOST:PORT, such as 10.0.0.5:6379.")
    try:
        socket.create_connection((host, port), ANSWER).close()
    except OSError as error:
        raise BadMap(f"Nobody answers at {address} ({error}): is the cluster started, and reached from here?") from None


def _knock(address: str) -> None:
    """Raises Ray's AuthenticationError at once for a wrong token; `ray.init` would try it twenty times, and say so."""
    if "://" in address:
        return
    client = getattr(importlib.import_module("ray._raylet"), "GcsClient", None)
    if client is None:  # it is not of Ray's public side; without it the same is found out later
        return
    host, port = host_and_port(address)
    client(address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def _refused(error: BaseException, address: str | None) -> str:
    """Why Ray could not be used, as a sentence; Ray says it in the causes of what it raises."""
    if address is None:
        return f"Ray on this machine cannot be used: {first_line(error)}"
    told = "".join(traceback.format_exception(error))
    if "InvalidAuthToken" in told:
        return f"The cluster at {address} refuses the token: give the one it was started with (--token-file)."
    if "No node info found" in told:
        return (
            f"This machine is no node of the cluster at {address}, and Ray takes work only from its nodes: run "
            f"`ray start --address={address} --num-cpus=0` here first, with {MODE}=token and the same token."
        )
    return f"Ray at {address} cannot be used: {first_line(error)}"


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let Ray take the loopback address as that of this machine, as it does on Windows and macOS.

    On Linux it would replace it by the address of a network, and its servers would listen on all of them.
    """
    from ray._private import ray_constants

    name = "ENABLE_RAY_CLUSTER"
    before = getattr(ray_constants, name, None)
    if before is None:
        yield
        return
    setattr(ray_constants, name, False)
    try:
        yield
    finally:
        setattr(ray_constants, name, before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
