"""Films shot by shot: each shot is an item, the references travel along in the workflow, and the coloured parts are put
in a row, in the order of the film, with its sound beside them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import content_key, file_fingerprint
from ..colorization.file_job import FileJob
from ..colorization.shot_job import PART_SUFFIX, find_shots, merge_shots
from ..colorization.shots import THRESHOLD, ShotDetector
from ..colorization.video_file import read_facts
from ..colorization.video_parts import check_container
from ..headless.catalog import declared_inputs
from ..headless.graph import Graph, Link, Node
from ..host.errors import is_full
from .items import Item, ItemSource
from .jobs import BadMap, Target
from .manifest import DONE, Manifest
from .results import ResultStore

log = logging.getLogger("hotpath.distributed")

SHOT_INPUT = "shot_frames"


@dataclass(frozen=True)
class FilmNode:
    """The node of a workflow that colours a film shot by shot. suffix: of the container that the workflow asks for;
    quality: of the pictures in it, as the node takes it."""

    id: str
    threshold: float
    suffix: str
    quality: int


def film_node(graph: Graph, catalog: Mapping[str, type[Any]], target: Target) -> FilmNode:
    """What is needed of the node that `target` belongs to. Raises BadMap when it cannot do single shots, or what finds
    them is not installed."""
    node = graph.nodes[target.node]
    node_class = catalog.get(node.class_type)
    if node_class is None or SHOT_INPUT not in declared_inputs(node_class):
        raise BadMap(f"{node} cannot colour single shots of a film; Colorize Video File (Hotpath) can.")
    shots = _constant(node, "shots", "off")
    if shots == "off":
        raise BadMap(f"{node} colours a film as one shot: set shots to reset or reference per shot there.")
    if any(_constant(node, name, 0) for name in ("start_seconds", "seconds")):
        raise BadMap(f"{node} colours a part of the film: for its shots set start_seconds and seconds to 0 there.")
    threshold = float(_constant(node, "shot_threshold", THRESHOLD))
    try:
        ShotDetector(threshold)
    except ImportError as error:
        raise BadMap(str(error)) from None
    suffix = Path(str(_constant(node, "output", "film.mp4"))).suffix
    quality = int(_constant(node, "quality", FileJob.quality))
    return FilmNode(node.id, threshold, suffix or ".mp4", quality)


def _constant(node: Node, name: str, otherwise: Any) -> Any:
    value = node.inputs.get(name, otherwise)
    if isinstance(value, Link):
        raise BadMap(f"Input {name!r} of {node} is linked to another node; to map over shots it must be a value.")
    return value


class ShotItems:
    """The shots of each film of `films`, found while the first ones are being coloured. whole: films to leave out.

    trials: a folder in which it is tried, before the shots of a film are done, whether its container will hold it.
    """

    kind = "video"

    def __init__(self, films: ItemSource, node: FilmNode, trials: Path, whole: Callable[[Item], bool]) -> None:
        self.films, self.node, self.trials, self.whole = films, node, trials, whole

    def __iter__(self) -> Iterator[Item]:
        for film in self.films:
            if self.whole(film):
                continue
            if film.file is None or film.problem is not None:
                yield film
                continue
            try:
                self._try_container(film.file)
                for shot in find_shots(film.file, self.node.threshold):
                    label = f"{film.label}/{shot.number + 1:05d}"
                    inputs = {
                        f"{self.node.id}.{SHOT_INPUT}": str(shot),
                        f"{self.node.id}.output": f"shot{PART_SUFFIX}",
                    }
                    content = content_key(film.content, str(shot))
                    yield Item(label, content, film.value, inputs, film.file, group=film.label)
            except (OSError, ValueError) as error:
                if is_full(error):
                    raise
                # Of the film's group, so that the shots before the place where it broke are not taken for all of it.
                yield Item(film.label, film.content, film.value, group=film.label, problem=str(error))

    def _try_container(self, film: Path) -> None:
        made = film.with_suffix(self.node.suffix)
        check_container(film, made, self.trials, read_facts(film), FileJob.codec, self.node.quality)

    def count(self) -> int | None:
        return None


@dataclass(frozen=True)
class Merged:
    """A film that is whole. failed: why it is not. notes: what it lacks, a sentence each."""

    film: str
    path: Path
    failed: str | None = None
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        return self.failed or " ".join((f"{self.film}: {self.path.name}", *self.notes))


def merge_films(
    films: ItemSource,
    store: ResultStore,
    manifest: Manifest,
    suffix: str,
    interrupted: Callable[[], None],
    workflow: Callable[[Item], Mapping[str, str]] = lambda film: {},
) -> Iterator[Merged]:
    """Put the shots of each film in order and remove the parts; a film of which a shot is missing stays in parts.

    A file of that name which this run did not make is left alone: the film's name gets a number. workflow: the texts that
    a film is to hold, as `assemble` takes them.
    """
    for film in films:
        interrupted()
        if film.file is None or film.problem is not None:
            continue
        done_with = store.work / "parts" / film.label
        if (finished := whole_film(film, store)) is not None:
            shutil.rmtree(done_with, ignore_errors=True)  # by a run that was killed before it could
            yield Merged(film.label, finished)
            continue
        parts: list[Path] = []
        missing = shots = broken = 0
        for item in manifest.items(film.label):
            shots += 1
            broken += item.label == film.label
            if item.job is None or item.job.state != DONE:
                missing += 1
            else:
                parts += [store.place(path) for path in item.files()]
        path = store.folder / f"{film.label}{suffix}"
        if broken or not shots:
            continue  # why is among the failures
        if missing:
            why = f"{missing} of {shots} shots are missing"
            yield Merged(film.label, path, f"{film.label}: {why}; the finished ones are kept, run the same again.")
            continue
        mark = f"film {film.label}"
        known = manifest.meta(mark)
        number = 2
        while path.exists() and path.relative_to(store.folder).as_posix() != known:
            path = store.folder / f"{film.label}-{number}{suffix}"
            number += 1
        # In this order a crash at any moment costs a second merge at most, and no second file.
        manifest.record(mark, path.relative_to(store.folder).as_posix())
        try:
            notes = merge_shots(parts, film.file, path, workflow(film))
        except Exception as error:  # whatever FFmpeg comes up with; the other films are put together all the same
            log.warning("%s was not put together", film.label, exc_info=error)
            why = f"{film.label}: its shots could not be put together ({error}); they are kept, run the same again."
            yield Merged(film.label, path, why)
            continue
        manifest.record(_whole_mark(film), file_fingerprint(path))
        shutil.rmtree(done_with, ignore_errors=True)
        yield Merged(film.label, path, notes=tuple(notes))


def whole_film(film: Item, store: ResultStore) -> Path | None:
    """The coloured film, when an earlier run finished it and it is unchanged."""
    known = store.manifest.meta(f"film {film.label}")
    if known is None or not (path := store.place(known)).is_file():
        return None
    return path if store.manifest.meta(_whole_mark(film)) == file_fingerprint(path) else None


def _whole_mark(film: Item) -> str:
    """Belongs to the content of the film, so that another film of the same name is not taken for it."""
    return f"whole {film.label} {film.content}"
