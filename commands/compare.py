"""`hotpath compare`: the same seeds in two settings of a workflow, or two folders of pictures, and how alike they are."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import __version__, comparison, face, host
from ..comparison import (
    ComparisonFolder,
    FolderError,
    Pair,
    Thresholds,
    compare_pair,
    folders,
    incomparable,
    pair_files,
    read_picture,
)
from ..headless.executor import NodeFailed
from ..headless.graph import Graph, WorkflowError
from ..headless.launcher import LaunchError
from ..headless.outcome import OutputFile
from ..headless.server_answers import ServerError
from ..host import Host
from ..host.errors import kind_and_line
from ..host.held import held
from ..host.system_errors import sentence
from .console import complain, note, say
from .models_folder import headless_host
from .render_grid import SEED, STRENGTH, WEIGHT, Grid, Point
from .rendering import Place, rendering

log = logging.getLogger("hotpath.compare")

PASSED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
MARK = ".hotpath-comparison"  # in a folder that this command made and may empty again
UNFINISHED = ".unfinished"  # in it, while a comparison is made
AT_WORK = ".at-work"  # in it: held by the run that makes one
PARTIAL = "partial"  # in it, what was done of one that was stopped while an earlier one was there
RESULTS = "results.json"
MIN_COSINE = 0.98


class Refused(ValueError):
    """What was asked for cannot be compared; the message says why."""


REFUSALS = (Refused, FolderError, WorkflowError, FileNotFoundError, face.FaceError)


@dataclass(frozen=True)
class Side:
    """One of the two: a folder of pictures, or a workflow with what is changed in it."""

    label: str
    folder: Path | None = None
    graph: Graph | None = None


@dataclass(frozen=True)
class Judges:
    """What measures beside SSIM."""

    thresholds: Thresholds
    faces: Any
    perceptual: comparison.Perceptual | None
    notes: list[str]


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 every pair passed, 1 a threshold was missed or a render failed, 2 refused, 130 stopped."""
    try:
        sides = _sides(options)
        judges = _judges(options)
        needed = [path for path in (options.a, options.b, options.input_folder, options.models) if path is not None]
        with _prepared(options.output_folder.resolve(), needed) as work:
            writer = ComparisonFolder(work, sides[0].label, sides[1].label)
            unfinished = _fill(writer, sides, judges, options)
            made = writer.finish(judges.thresholds, judges.notes, {"Hotpath": __version__})
            place = _put_in_place(work, whole=unfinished is None)
    except REFUSALS as error:
        complain(str(error))
        return REFUSED
    say(comparison.describe(made))
    say(str(place / writer.page.name), "bold")
    if unfinished is not None:
        return unfinished
    if made.count(comparison.REFUSED):
        return REFUSED
    return PASSED if made.passed else FAILED


def _fill(
    writer: ComparisonFolder, sides: tuple[Side, Side], judges: Judges, options: argparse.Namespace
) -> int | None:
    """Compare pair after pair; the exit code when it could not be done to the end, so that what is done is not lost."""
    try:
        if sides[0].folder is not None and sides[1].folder is not None:
            files, remark = pair_files(sides[0].folder, sides[1].folder)
            judges.notes.extend(filter(None, [remark]))
            for name, first, second in files:
                writer.add(_judged(name, first, second, judges))
        else:
            for pair in _rendered_pairs(sides, options, writer.folder, judges):
                writer.add(pair)
        return None
    except (ServerError, LaunchError, NodeFailed) as error:
        complain(str(error))
        judges.notes.append(f"Not all was rendered: {error}")
        return FAILED
    except KeyboardInterrupt:
        note("Stopped.", "yellow")
        judges.notes.append("Stopped before the end.")
        return INTERRUPTED
    except Exception as error:
        if not len(writer):
            raise
        refused = isinstance(error, REFUSALS)
        said = str(error) if refused else sentence(error) or kind_and_line(error)
        complain(said)
        log.info("the comparison ended early", exc_info=error)
        judges.notes.append(f"Not all was compared: {said}")
        return REFUSED if refused else FAILED


def _sides(options: argparse.Namespace) -> tuple[Side, Side]:
    if options.b is None and options.a.is_dir():
        raise Refused(f"{options.a} is a folder of pictures: name another one, or a workflow, to compare it with.")
    second = options.b if options.b is not None else options.a
    common = options.set or []
    sides = (_side(options.a, [*common, *(options.set_a or [])]), _side(second, [*common, *(options.set_b or [])]))
    rendered = [side for side in sides if side.graph is not None]
    asked = [n for n in ("seeds", "weights", "controlnet_strengths", "set", "set_a", "set_b") if getattr(options, n)]
    if asked and not rendered:
        raise Refused(f"--{asked[0].replace('_', '-')} is for workflows, and both sides are folders of pictures.")
    prompts = [side.graph.prompt() for side in rendered if side.graph is not None]
    if len(prompts) == 2 and prompts[0] == prompts[1]:
        raise Refused("Both sides are the same workflow in the same setting: change something with --set-b.")
    return sides


def _side(path: Path, assignments: Sequence[str]) -> Side:
    if path.is_dir():
        return Side(str(path), folder=path)
    if path.suffix.lower() in folders.SUFFIXES:
        raise Refused(f"{path} is a single picture: put it into a folder of its own, and name the folder.")
    graph = Graph.load(path)
    for assignment in assignments:
        graph.set_input(assignment)
    return Side(", ".join([path.name, *assignments]), graph=graph)


def _judges(options: argparse.Namespace) -> Judges:
    for name in ("min_ssim", "min_cosine", "max_lpips"):
        if not math.isfinite(getattr(options, name) or 0.0):
            raise Refused(f"--{name.replace('_', '-')} is no finite number, and every pair would pass it.")
    notes = []
    perceptual, why = comparison.load_perceptual()
    if perceptual is None and options.max_lpips is not None:
        raise Refused(f"--max-lpips was given. {why}.")
    notes.append(why)
    analyser, why = _face_finder(options)
    if analyser is None and options.min_cosine is not None:
        raise Refused(f"--min-cosine was given, but {why}")
    notes.append(why)
    cosine = MIN_COSINE if options.min_cosine is None else options.min_cosine
    thresholds = Thresholds(options.min_ssim, cosine, options.max_lpips)
    return Judges(thresholds, analyser, perceptual, notes)


def _face_finder(options: argparse.Namespace) -> tuple[Any, str]:
    """The face models, or None and a sentence about why not. Only models that were named have to be there and whole."""
    if options.faces == "off":
        return None, "faces are not compared: --faces off."
    here = headless_host(options.models, device=options.device, show_progress=False)
    folders = here.model_folders("insightface")
    if options.faces != "auto":
        return _face_models(here, folders, options.faces), f"Faces: {options.faces}."
    names = face.model_names(folders)
    if not names:
        return None, "faces are not compared: there are no face models (`hotpath models download` brings antelopev2)."
    wanted = "antelopev2" if "antelopev2" in names else names[0]
    try:
        return _face_models(here, folders, wanted), f"Faces: {wanted}."
    except Exception as error:  # nobody asked for faces, so nothing about them may end the comparison
        said = str(error) if isinstance(error, face.FaceError) else kind_and_line(error)
        return None, f"faces are not compared: {said}"


def _face_models(here: Host, folders: Sequence[Path], name: str) -> Any:
    """Detector and recogniser, both loaded: what is wrong with them is said before anything is rendered."""
    before = host.use(here)
    try:
        analyser = face.load_analyser(folders, name, device=here.device())
        _ = analyser.recogniser
    finally:
        host.use(before)
    return analyser


@contextlib.contextmanager
def _prepared(output: Path, needed: Sequence[Path]) -> Iterator[Path]:
    """An empty folder in `output`, which is one that this command made or nobody, and never one that holds what is `needed`:
    the comparison that is there goes when the new one is whole. For one run at a time; it is gone at the end, unless there is
    a whole comparison in it."""
    for path in needed:
        if path.resolve().is_relative_to(output):
            raise Refused(f"{path} lies in the output folder, which is emptied; choose another --output-folder.")
    if output.exists() and not output.is_dir():
        raise Refused(f"{output} is a file; name a folder with --output-folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).is_file():
        raise Refused(f"{output} holds files that `hotpath compare` did not make; choose another --output-folder.")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("Made by `hotpath compare`, which empties this folder when it has run again.\n")
    work = output / UNFINISHED
    with held(output / AT_WORK) as ours:
        if ours is None:
            raise Refused(
                f"Another comparison is made in {output} at this moment: wait for it, or choose another --output-folder."
            )
        _empty(work)
        try:
            yield work
        finally:
            if not (work / RESULTS).is_file():
                shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: Path, whole: bool) -> Path:
    """Where the comparison in `work` now is: in the output folder in place of what was there, or in a folder of that when it
    is not whole and an earlier comparison is there."""
    place = work.parent
    if not whole and (place / RESULTS).is_file():
        place = place / PARTIAL
        note(f"The earlier comparison in {work.parent} stays; what was done of this one is in {place}.", "yellow")
    try:
        _empty(place, but=(MARK, UNFINISHED, AT_WORK))
        # What says that the comparison is there comes last.
        for entry in sorted(work.iterdir(), key=lambda entry: entry.name == RESULTS):
            entry.rename(place / entry.name)
    except OSError as error:  # such as Windows' where somebody looks at it
        said = (sentence(error) or kind_and_line(error)).removesuffix(".")
        note(
            f"The earlier comparison was not replaced ({said}): the new one is in {work}, until the next run.", "yellow"
        )
        return work
    return place


def _empty(folder: Path, but: Sequence[str] = ()) -> None:
    """Make `folder` an empty one, except for the names in `but`."""
    folder.mkdir(exist_ok=True)
    for entry in folder.iterdir():
        if entry.name not in but:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _judged(name: str, first: Path, second: Path, judges: Judges, point: Point | None = None) -> Pair:
    """The pair in two files; one that cannot be read makes a pair that cannot be compared, and the next may go on."""
    at = point.values if point is not None else None
    pictures: list[Tensor | None] = []
    problems = []
    for side, file in (("A", first), ("B", second)):
        try:
            pictures.append(read_picture(file))
        except FolderError as error:
            pictures.append(None)
            problems.append(f"{side}: {error}")
    a, b = pictures
    if a is None or b is None:
        return incomparable(name, a, b, " ".join(problems), at)
    return compare_pair(name, a, b, judges.thresholds, judges.faces, judges.perceptual, at)


def _rendered_pairs(
    sides: tuple[Side, Side], options: argparse.Namespace, output: Path, judges: Judges
) -> Iterator[Pair]:
    grid = _grid(options)
    points = list(grid.points())
    graphs = [[grid.at(side.graph, point) for point in points] if side.graph is not None else [] for side in sides]
    # What an earlier run lacks is said before hours of rendering.
    before = [[_made_before(side.folder, p) for p in points] if side.folder is not None else [] for side in sides]
    total = sum(map(len, graphs))
    done = 0
    with tempfile.TemporaryDirectory(dir=output, prefix=".renders-") as work:
        place = Place(
            folder=Path(work),
            server=options.server,
            comfyui=options.comfyui,
            headless=options.headless,
            input_folder=options.input_folder,
            models=options.models,
            device=options.device,
        )
        first = [side[0] for side in graphs if side]
        with rendering(place, first, lambda text: note(text, "dim")) as render:
            for number, point in enumerate(points):
                both = []
                try:
                    for side, rendered, made in zip(sides, graphs, before, strict=True):
                        if side.folder is not None:
                            both.append(made[number])
                            continue
                        done += 1
                        if not options.quiet:
                            note(f"[{done}/{total}] {side.label}: {point.name}", "dim")
                        both.append([file.path for file in _pictures(render(rendered[number]).files, side, options)])
                    _check_counts(point, both[0], both[1])
                except Refused as refused:
                    # The setting itself may be wrong; later it is this point's own.
                    if number == 0:
                        raise
                    yield incomparable(point.name, None, None, str(refused), point.values)
                    continue
                yield from _paired(point, both[0], both[1], judges)


def _check_counts(point: Point, a: Sequence[Path], b: Sequence[Path]) -> None:
    if len(a) != len(b):
        raise Refused(f"At {point.name}, A has {len(a)} pictures and B has {len(b)}: each needs a counterpart.")


def _paired(point: Point, a: Sequence[Path], b: Sequence[Path], judges: Judges) -> Iterator[Pair]:
    for number, (first, second) in enumerate(zip(a, b, strict=True)):
        name = point.name if len(a) == 1 else f"{point.name}, picture {number + 1}"
        yield _judged(name, first, second, judges, point)


def _pictures(files: Sequence[OutputFile], side: Side, options: argparse.Namespace) -> list[OutputFile]:
    """What a run saved, or, where it saved no picture, what it showed."""
    pictures = [file for file in files if file.kind == "image"]
    if options.picture_from is not None:
        assert side.graph is not None
        wanted = side.graph.find(options.picture_from).id
        pictures = [file for file in pictures if file.node.id == wanted]
    found = [file for file in pictures if not file.temporary] or pictures
    if not found:
        raise Refused(f"{side.label} gave no picture; save one with SaveImage, or name the node with --picture-from.")
    return found


def _made_before(folder: Path, point: Point) -> list[Path]:
    """The pictures of an earlier comparison for this point of the grid; for a workflow as it is, all of the folder."""
    found = comparison.pictures_in(folder)
    if not point.values:
        return list(found.values())
    wanted = comparison.file_name(point.name)
    chosen = [
        path
        for path in found.values()
        if (plain := path.stem.lstrip("0123456789").lstrip("_")) == wanted or plain.startswith(f"{wanted}_picture_")
    ]
    if not chosen:
        raise Refused(f"{folder} has no picture for {point.name}: its name would end in {wanted}.")
    return chosen


def _grid(options: argparse.Namespace) -> Grid:
    axes = {SEED: options.seeds or [], WEIGHT: options.weights or [], STRENGTH: options.controlnet_strengths or []}
    inputs = {SEED: options.seed_input, WEIGHT: options.weight_input, STRENGTH: options.strength_input}
    return Grid(axes, {axis: named for axis, named in inputs.items() if named})
