"""Fetching a model folder from the hub: resumed when interrupted, stopped on request, local files when offline."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import host
from ..host import downloads, hub
from ..host.downloads import safe_target
from ..host.errors import first_line
from ..host.interruption import interruptibly, is_stop
from . import folders, gguf_fetching
from .folders import ModelFolder, revision_folder
from .gguf_fetching import Choose
from .unusable import UnusableModel

log = logging.getLogger("hotpath.vision_language")

# Code of a repository is never fetched, so it can never run.
SETTINGS = ["*.json", "*.txt", "*.jinja", "*.model", "merges.txt"]
WANTED = [*SETTINGS, "*.safetensors"]
AT_A_TIME = 4  # files of weights

REVISION = re.compile(r"[A-Za-z0-9]([\w-]|\.(?!\.)|/(?=[A-Za-z0-9]))*", re.ASCII)

ABANDONED = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # half files with a name for every try

STEPS = 1000  # of the host's bar
TEXT_EVERY = 1.0  # seconds between two looks at how much has come
WEIGHTS = 1 << 24  # bytes; while less is known of, the small files are counted and the weights are still to come


class TransferStopped(BaseException):
    """Ends the hub's threads. No Exception, which their retries would take for a fault of the network."""


class Transfer:
    """A download as the hub's bars tell it, and the way to end it: from `stop` on, whatever moves a bar gets an exception.

    The hub's threads must not ask the host themselves: one of them would take the stop, and the others would go on. Its
    newer transport drops exceptions of a bar, so that one is ended by what the hub has for Ctrl-C.
    """

    def __init__(self) -> None:
        self.done = self.total = 0.0
        self.running = False
        self._stopped = threading.Event()

    def bars(self) -> type[Any]:
        """The class that the hub is to make its bars of."""
        from tqdm import tqdm

        transfer = self

        class Bar(tqdm):  # type: ignore[type-arg,unused-ignore]
            def update(self, n: Any = 1) -> Any:
                transfer.moved(self)
                moved = super().update(n)
                transfer.moved(self)
                return moved

            def refresh(self, nolock: bool = False, *args: Any, **kwargs: Any) -> Any:
                if not nolock:  # so tqdm's own thread asks, which watches all bars and must go on
                    transfer.moved(self)  # the hub does this when it begins a file
                return super().refresh(nolock, *args, **kwargs)

        return Bar

    def moved(self, bar: Any) -> None:
        if self._stopped.is_set():
            raise TransferStopped
        if getattr(bar, "unit", "") == "B" and bar.n >= self.done:
            self.done, self.total = float(bar.n), float(bar.total or 0)

    @contextmanager
    def moving(self) -> Iterator[None]:
        """While inside, something moves."""
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def told(self, done: Mapping[str, int], total: int) -> None:
        """What has come of each file. Called while one comes."""
        if self._stopped.is_set():
            raise TransferStopped
        self.done, self.total = float(sum(done.values())), float(total)

    def stop(self) -> None:
        """End what still runs; nothing happens to a transfer that is over."""
        self._stopped.set()
        if not self.running:
            return
        try:
            from huggingface_hub.utils._xet import abort_xet_session
        except ImportError:  # a release without it: the file that is under way comes whole, unseen
            return
        abort_xet_session()


class Shown:
    """What has come of a transfer, on the host's bar and as text."""

    def __init__(self, bar: host.Progress, label: str) -> None:
        self._bar, self._label = bar, label
        self._steps, self._told = 0, time.monotonic()

    def update(self, transfer: Transfer) -> None:
        done, total = transfer.done, transfer.total
        if total < WEIGHTS:
            return
        # Files join the total while they begin, so it may grow: the bar waits then.
        steps = min(STEPS, int(STEPS * done / total))
        if steps > self._steps:
            self._bar.update(steps - self._steps)
            self._steps = steps
        if time.monotonic() - self._told >= TEXT_EVERY:
            self._told = time.monotonic()
            host.current().show_text(f"{self._label}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")


def locate(name: str, revision: str = "", must_see: bool = True) -> ModelFolder:
    """The whole, checked folder for a widget value; fetched from the hub when it is not on the disk.

    revision: branch, tag or commit for a fetch. A named revision has its own folder, so that a local folder of another
    revision never answers for it. Raises UnusableModel.
    """
    if revision and not REVISION.fullmatch(revision):
        # Without a network, the library takes a revision for the name of a file of its own, and reads all of that.
        raise UnusableModel(f"{revision[:80]!r} is no revision: give a branch, a tag or a commit, such as main.")
    local = local_folder(name, revision)
    if local is not None and local.gguf is None and not folders.missing_files(local):
        return folders.check(local, must_see)
    if (local is not None and local.gguf is not None) or (local is None and gguf_fetching.is_meant(name)):
        return gguf_fetching.locate(name, local, revision, must_see, fetch)
    if local is None and name.strip().lower().endswith(".safetensors"):
        raise UnusableModel(
            f"{name!r} is a single file, and a model is a whole folder here, with config.json: take one such as "
            "Qwen3-VL-4B-Instruct, with quantization int4 where memory is short."
        )
    repository = folders.repository(name)
    target = local.path if local is not None else target_folder(name, revision)
    try:
        fetch(repository, target, revision)
    except UnusableModel as error:
        if local is None:
            raise
        return folders.check_unfetched(local, must_see, error)
    config = folders.read_config(target)
    if config is None:
        raise UnusableModel(f"{repository} was fetched to {target}, but it has no config.json of a model.")
    return folders.check(ModelFolder(target, target.name, config), must_see)


def local_folder(name: str, revision: str = "") -> ModelFolder | None:
    """The folder for a widget value that is on the disk, whole or not. Raises UnusableModel for a name that is no name."""
    if not revision:
        return folders.find(name)
    file = gguf_fetching.revision_file(name, revision)
    return folders.find(file or revision_folder(name, revision))


def target_folder(name: str, revision: str) -> Path:
    """Where `name` is fetched to: `owner/name` keeps its owner, so that the next one of that name has its own place."""
    named = revision_folder(name, revision) if revision else name.strip()
    parts = named.replace("\\", "/").rstrip("/").split("/")
    return folders.roots()[0].joinpath(*parts[-2:])


def fetch(repository: str, target: Path, revision: str = "", choose: Choose | None = None) -> None:
    """Fetch `repository`, or the files of it that `choose` wants, into `target`; files that are there are kept, half files are
    continued.

    A stop is heard at once: what still transfers ends at its next move. Raises UnusableModel when the hub cannot be
    reached, does not have the repository, or asks for a licence.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    here = host.current()
    transfer = Transfer()

    asked: dict[str, Any] = {"revision": revision or None, "local_dir": target, "tqdm_class": transfer.bars()}

    def settings() -> None:
        with transfer.moving():
            snapshot_download(repository, allow_patterns=SETTINGS, **asked)

    def weights() -> None:
        with transfer.moving():
            if not fetch_weights(repository, target, revision, transfer, choose):
                wanted = WANTED if choose is None else choose(list_repo_files(repository, revision=revision or None))
                snapshot_download(repository, allow_patterns=wanted, **asked)

    log.info("fetching %s into %s", repository, target)
    here.show_text(f"Fetching {repository} ...")
    try:
        with host.tracked(here, STEPS, repository) as bar:
            shown = Shown(bar, f"Fetching {repository}")
            try:
                if choose is None:
                    interruptibly(settings, lambda: shown.update(transfer))
                if choose is not None or folders.missing_weights(target):
                    interruptibly(weights, lambda: shown.update(transfer))
            finally:
                transfer.stop()
        here.check_interrupt()
        forget_halves(target)
    except UnusableModel:
        raise
    except Exception as error:  # of the hub's transports, in all its forms: a connection that stalls is no OSError
        if is_stop(error):
            raise
        raise UnusableModel(_why_not(error, repository, target, revision)) from error


def _why_not(error: Exception, repository: str, target: Path, revision: str) -> str:
    """Why `repository` did not come, and the cure, in a sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if hub.refuses_token(error):  # some releases call this a repository that is not there
        return f"{repository} could not be fetched: {hub.TOKEN_REFUSED}"
    if isinstance(error, GatedRepoError):
        return f"{repository} asks to accept its licence: accept it on its page and run `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no model folder {target.name!r} under {folders.roots()[0]} and no repository {repository}: "
            "check the name (another owner's is owner/name), or put the folder there."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The repository {repository} has no revision {revision!r}: check the branch, tag or commit, or leave it empty."
    return (
        f"There is no whole model folder {target.name!r} under {folders.roots()[0]}, and {repository} could not be "
        f"fetched ({first_line(error)}): check the name, connect and run again, which continues where it stopped, "
        "or put the folder there. Where the hub cannot be reached, set HF_ENDPOINT to a mirror before ComfyUI starts."
    )


def fetch_weights(
    repository: str, target: Path, revision: str, transfer: Transfer, choose: Choose | None = None
) -> bool:
    """Fetch the weights of `repository`, or the files that `choose` wants, into `target` by the pack's own downloader, which goes
    on with a half file. Newer releases of the hub's library begin it anew.

    False where that does not go and nothing has come: a repository that asks who you are, a mirror that only the library takes.
    Raises DownloadError when it breaks off.
    """
    from huggingface_hub import HfApi, hf_hub_url

    stated = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=downloads.TIMEOUT)
    files = {file.rfilename: file for file in stated.siblings or ()}
    wanted = [name for name in files if name.endswith(".safetensors")] if choose is None else choose(list(files))
    weights = [files[name] for name in wanted]
    if stated.gated or stated.private or not all(file.size and file.lfs for file in weights):
        return False
    total, done = sum(file.size for file in weights), dict[str, int]()
    came = False

    def get(file: Any) -> None:
        path = safe_target(target, file.rfilename)

        def progress(so_far: int, _: int | None) -> None:
            nonlocal came
            came = True
            done[file.rfilename] = so_far
            transfer.told(done, total)

        if not path.is_file() or path.stat().st_size != file.size:
            downloads.fetch(
                hf_hub_url(repository, file.rfilename, revision=stated.sha), path, file.size, file.lfs.sha256, progress
            )
        done[file.rfilename] = file.size

    try:
        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="hotpath-weights") as pool:
            list(pool.map(get, weights))
    except downloads.DownloadError as error:
        if came:
            raise
        log.info("%s is left to the hub's library: %s", repository, first_line(error))
        return False
    return True


def forget_halves(target: Path) -> None:
    """Delete what downloads of a folder that is whole now had begun when their process ended: gigabytes each.

    Releases of the hub's library that continue a half file give it one name, and leave none of it.
    """
    for half in target.glob(".cache/huggingface/download/*.incomplete"):
        if ABANDONED.search(half.name):
            try:
                half.unlink(missing_ok=True)
            except OSError as error:  # another program reads it
                log.debug("%s stays, because %s", half.name, error)
