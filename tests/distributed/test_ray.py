"""Ray actors: the results of this process, a killed actor survived, a token asked for, nothing open to the network."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from fake_ray import FakeRay
from hotpath.distributed import ray_cluster, ray_pool
from hotpath.distributed.jobs import BadMap
from hotpath.distributed.mapping import run_map
from hotpath.distributed.pool import Advanced, Died, Finished, Ready
from hotpath.distributed.ray_cluster import ClusterOptions, connected, is_loopback, make_token, token_environment
from hotpath.distributed.ray_pool import RayPool
from hotpath.distributed.worker import WorkerSettings
from hotpath.host import Interrupted
from map_workflows import listed, made, picture

pytestmark = pytest.mark.xdist_group("ray")
needs_ray = pytest.mark.skipif(ray_cluster.missing() is not None, reason="Ray is not installed")


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has no connection yet, whatever the tests before have made."""
    monkeypatch.setattr(ray_cluster, "_standing", lambda: None)


class Killer:
    """Kills the first actor it sees at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool: RayPool | None = None
        self.killed: int | None = None
        start = RayPool.start

        def watched(pool: RayPool) -> None:
            self.pool = pool
            start(pool)

        monkeypatch.setattr(RayPool, "start", watched)

    def changed(self, status) -> None:
        assert self.pool is not None
        if self.killed is None and status.done and status.running:
            self.killed = self.pool._ray.get(self.pool._actors[next(iter(status.running))].pid.remote())
            os.kill(self.killed, signal.SIGKILL)


@needs_ray
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
def test_actors_one_of_which_is_killed_give_what_this_process_gives(ray, pictures, request_for, monkeypatch):
    for i in range(3):
        picture(pictures / f"slow{i}.png", 50 + i, 1000)
    (pictures / "bad.png").write_text("no picture")
    killer = Killer(monkeypatch)
    actors = run_map(request_for(pictures, "ray", executor="ray", workers=2), killer)
    assert killer.killed is not None
    assert (actors.status.done, actors.status.failed) == (8, 1) and actors.status.retried >= 1
    assert "2 Ray actors with 1 CPU each" in actors.report()
    alone = run_map(request_for(pictures, "one"))
    assert made(actors.folder) == made(alone.folder)
    assert [(line["name"], line["status"], line["files"]) for line in listed(actors.folder)] == [
        (line["name"], line["status"], line["files"]) for line in listed(alone.folder)
    ]


@pytest.mark.long
@needs_ray
def test_an_interrupt_ends_the_actors_work(ray, pictures, request_for, monkeypatch):
    for i in range(3):
        picture(pictures / f"slow{i}.png", 50 + i, 2500)
    stopped_at: list[float] = []
    running: dict[int, float] = {}

    class Watch:
        def changed(self, status) -> None:
            running.update(status.running)

    def interrupted() -> None:
        if len(running) and not stopped_at:
            stopped_at.append(time.monotonic())
            raise Interrupted("Stopped on request.")

    request = request_for(pictures, executor="ray", workers=1)
    with pytest.raises(Interrupted):
        run_map(request, Watch(), interrupted)
    assert time.monotonic() - stopped_at[0] < 30.0  # not the minutes that Ray would wait for the actors
    assert not (request.output_folder / ".hotpath-map" / "staging").exists()
    assert len([line for line in listed(request.output_folder) if line["status"] == "done"]) == len(
        made(request.output_folder)
    )


@needs_ray
def test_only_this_machine_reaches_it_and_only_with_the_token(ray):
    address = ray.get_runtime_context().gcs_address
    assert is_loopback(address)
    code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print('let in')"
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # The last one keeps the stranger from looking for the cluster at this machine's address in its network.
    stranger |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_NUM_REDIS_GET_RETRIES": "1",  # of twenty, a second each
    }
    done = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "let in" not in done.stdout
    assert "token" in done.stderr


@pytest.mark.long
@needs_ray
def test_an_actor_that_does_not_see_the_files_says_so(ray, tmp_path):
    pool = RayPool(ray, WorkerSettings(str(tmp_path), sees=[str(tmp_path / "nothing")]), 1, 0.0, 0.5)
    pool.start()
    events: list = []
    end = time.monotonic() + 90
    while not events and time.monotonic() < end:
        events += pool.wait(0.2)
    pool.close()
    assert isinstance(events[0], Died) and events[0].final
    assert events[0].reason.startswith("The worker on ") and "shared storage" in events[0].reason


@needs_ray
def test_a_cluster_without_room_or_with_failing_actors():
    settings = WorkerSettings(".")
    full = RayPool(FakeRay({}), settings, 2, 1.0, 0.0, patience=0.0)
    full.start()
    assert [(e.final, "no room" in e.reason) for e in full.wait(0)] == [(True, True)] * 2
    broken = RayPool(FakeRay({"pid": RuntimeError("gone")}), settings, 1, 0.0, 1.0)
    broken.start()
    ends = [broken.wait(0)[0] for _ in range(ray_pool.STARTS)]
    assert [e.final for e in ends] == [False, False, True] and "before it was ready" in ends[-1].reason
    fine = RayPool(FakeRay({"pid": 1, "begin": {}, "run": {"status": "done"}, "fraction": 0.5}), settings, 1, 0.0, 1.0)
    fine.start()
    assert fine.wait(0) == [] and fine.wait(0) == [Ready(0)]
    fine.submit(0, {"id": "j"})
    fine._asked_at[0] = -10.0
    assert fine.wait(0) == [Finished(0, "j", {"status": "done"})]
    working = RayPool(FakeRay({"pid": 1, "begin": {}, "fraction": 0.5}), settings, 1, 0.0, 1.0)
    working.start()
    assert [*working.wait(0), *working.wait(0)] == [Ready(0)]
    working.submit(0, {"id": "j"})
    working._asked_at[0] = -10.0
    assert working.wait(0) == [Advanced(0, 0.5)]


def test_which_addresses_are_this_machine():
    for address in ("127.0.0.1:6379", "localhost", "ray://localhost:10001", "[::1]:6379", "127.3.2.1", "::1"):
        assert is_loopback(address), address
    for address in ("10.0.0.5:6379", "example.org:1", "ray://192.168.0.2:10001", "127.0.0.1.example.org", "0.0.0.0:1"):
        assert not is_loopback(address), address


@needs_ray
def test_an_address_where_nobody_is_and_one_that_is_none(tmp_path, monkeypatch, unconnected):
    """Said before Ray is asked, which would take a minute."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BadMap, match=f"Nobody answers at {nobody}.*is the cluster started"):
            connected(ClusterOptions(nobody), tmp_path).__enter__()
    monkeypatch.setenv(ray_cluster.TOKEN, "a" * 64)
    for address in ("", "10.0.0.5", "10.0.0.5:0", "[::1]", ":6379", "10.0.0.5:x"):
        with pytest.raises(BadMap, match="is no address of a cluster; give HOST:PORT"):
            connected(ClusterOptions(address), tmp_path).__enter__()


@pytest.mark.long
@needs_ray
def test_a_wrong_token_is_one_sentence_at_once(ray, tmp_path):
    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys; from pathlib import Path\n"
        "from hotpath.distributed.jobs import BadMap\n"
        "from hotpath.distributed.ray_cluster import ClusterOptions, connected\n"
        f"try:\n    connected(ClusterOptions({address!r}), Path({str(tmp_path)!r})).__enter__()\n"
        "except BadMap as error:\n    sys.exit(str(error))\n"
    )
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_TOKEN": "0" * 64}
    done = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=120)
    assert f"The cluster at {address} refuses the token" in done.stderr
    assert done.stderr.count("InvalidAuthToken") <= 1  # of Ray's own log; it would try twenty times


@pytest.mark.long
@needs_ray
def test_clusters_one_after_the_other_have_their_own_tokens(tmp_path):
    """Also where another has imported Ray before, as another pack in ComfyUI may have."""
    code = (
        "import ray; from pathlib import Path\n"
        "from hotpath.distributed.ray_cluster import ClusterOptions, connected\n"
        f"for name in ('a', 'b'):\n    with connected(ClusterOptions(cpus=1, gpus=0), Path({str(tmp_path)!r}, name)) as there:\n"
        "        print(sorted(there.cluster_resources()))\n"
    )
    alone = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("CPU") == 2, done.stderr
    assert len({path.read_text() for path in tmp_path.glob("*/*token*")}) == 2


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("No node info found matching attributes: ''", r"is no node of the cluster at 10\.0\.0\.5:6379.*--num-cpus=0"),
        ("RPC error: InvalidAuthToken", "refuses the token"),
        ("something else", r"Ray at 10\.0\.0\.5:6379 cannot be used: Failed to connect"),
    ],
)
def test_why_a_cluster_cannot_be_used_is_found_in_the_causes(cause, said):
    try:
        raise ConnectionError("Failed to connect") from RuntimeError(cause)
    except ConnectionError as error:
        assert re.search(said, ray_cluster._refused(error, "10.0.0.5:6379"))


def test_another_machine_needs_a_token(tmp_path, monkeypatch):
    for name in (ray_cluster.TOKEN, ray_cluster.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    with pytest.raises(BadMap, match=r"10\.0\.0\.5:6379 is another machine, and there is no token"):
        token_environment(ClusterOptions("10.0.0.5:6379"), tmp_path)
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    if os.name == "posix":
        with pytest.raises(BadMap, match=r"Others can read the token in .*chmod 600"):
            token_environment(ClusterOptions("10.0.0.5:6379", token), tmp_path)
    token.chmod(0o600)
    found = token_environment(ClusterOptions("10.0.0.5:6379", token), tmp_path)
    assert found == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    (tmp_path / "empty").touch(0o600)
    with pytest.raises(BadMap, match="is empty"):
        token_environment(ClusterOptions("10.0.0.5:6379", tmp_path / "empty"), tmp_path)
    with pytest.raises(BadMap, match="There is no token file"):
        token_environment(ClusterOptions(None, tmp_path / "no"), tmp_path)


def test_the_token_is_made_once_and_is_the_users_alone(tmp_path):
    path = make_token(tmp_path / "cache")
    text = path.read_text()
    assert len(text) == 64 and make_token(tmp_path / "cache").read_text() == text
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o640)
        with pytest.raises(BadMap, match="Others can read"):
            make_token(tmp_path / "cache")


def test_runs_that_start_together_agree_on_the_token(tmp_path, monkeypatch):
    """Each sees a whole one or none, and the first one stays."""
    link = os.link

    def slower(source, target):
        Path(target).write_text("b" * 64)
        Path(target).chmod(0o600)
        link(source, target)

    monkeypatch.setattr(os, "link", slower)
    assert make_token(tmp_path / "cache").read_text() == "b" * 64
    monkeypatch.undo()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        make_token(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_token_is_made_where_files_have_one_name_only(tmp_path, monkeypatch):
    def refused(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    path = make_token(tmp_path / "cache")
    assert len(path.read_text()) == 64 and list(path.parent.iterdir()) == [path]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_connection_that_stands_is_used_whatever_the_address(tmp_path, monkeypatch):
    """Its node may have an address that this machine does not reach, and nobody asks for its token again."""
    standing = types.SimpleNamespace(is_initialized=lambda: True, init=None, shutdown=None)
    monkeypatch.setitem(sys.modules, "ray", standing)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "10.0.0.5:6379", None):
            with connected(ClusterOptions(address), tmp_path) as found:
                assert found is standing
    assert list(tmp_path.iterdir()) == []


@needs_ray
def test_a_ray_that_knows_no_tokens_is_refused(tmp_path, monkeypatch, unconnected):
    monkeypatch.setattr(ray_cluster.importlib.metadata, "version", lambda name: "2.51.3")
    with (
        pytest.raises(BadMap, match=r"Ray 2\.51\.3 has no token authentication.* install 2\.52 or later"),
        connected(ClusterOptions(), tmp_path),
    ):
        pass


def test_without_ray_one_sentence(pictures, request_for, monkeypatch, unconnected):
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadMap, match=r"Ray is not installed: .pip install 'ray"):
        run_map(request_for(pictures, executor="ray"))
