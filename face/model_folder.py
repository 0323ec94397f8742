"""Which files of a model folder the engine uses, and what to say when the folder is not as it should be.

A face model such as antelopev2 is a folder of ONNX files, `<insightface folder>/models/<name>/`. Files are told apart
by their inputs and outputs, never by their names, with the first of each kind in alphabetical order winning, as
insightface has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..host.name_limits import can_be_a_name
from .faces import FaceError
from .onnx_outline import Outline, outline

# What people are told to look for; other names are found by their shapes.
KNOWN_FILES = {
    "antelopev2": ("scrfd_10g_bnkps.onnx", "glintr100.onnx"),
    "buffalo_l": ("det_10g.onnx", "w600k_r50.onnx"),
    "buffalo_m": ("det_2.5g.onnx", "w600k_r50.onnx"),
    "buffalo_s": ("det_500m.onnx", "w600k_mbf.onnx"),
}


@dataclass(frozen=True)
class ModelFolder:
    """The two networks of a face model; `recogniser` is None where the folder has none."""

    name: str
    path: Path
    detector: Outline
    recogniser: Outline | None
    notes: tuple[str, ...] = ()  # what was odd but did no harm

    def missing_recogniser(self) -> FaceError:
        wanted = KNOWN_FILES.get(self.name, ("", "the recognition file"))[1]
        found = ", ".join(sorted(p.name for p in self.path.glob("*.onnx")))
        why = f" ({' '.join(self.notes)})" if self.notes else ""
        return FaceError(
            f"{self.path} has no recogniser, so faces can be found but not identified: put {wanted} of {self.name} "
            f"there (found: {found}){why}."
        )


def model_names(folders: Sequence[Path]) -> list[str]:
    """Every folder below `<insightface folder>/models` that holds ONNX files, sorted."""
    found = {
        entry.name
        for folder in folders
        if (folder / "models").is_dir()
        for entry in (folder / "models").iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and (_onnx_files(entry) or _onnx_files(entry / entry.name))
    }
    return sorted(found, key=str.lower)


def find_model_folder(folders: Sequence[Path], name: str) -> ModelFolder:
    """The first complete folder of that name; one with only a detector if there is no complete one.

    Raises FaceError, one sentence with the cure, when there is none that can detect.
    """
    odd = any(c in name for c in '/\\:"') or name != name.strip() or not can_be_a_name(name)
    if not name or name in (".", "..") or odd:
        raise FaceError(f"{name!r} is not the name of a face model; use a folder name such as antelopev2.")
    if not folders:
        raise FaceError("No insightface folder is known; add one to the model paths.")
    places = [folder / "models" / name for folder in folders]
    problem: FaceError | None = None
    detector_only: ModelFolder | None = None
    for place in places:
        if not place.is_dir():
            continue
        try:
            found = _read(name, place)
        except FaceError as error:
            problem = problem or error
            continue
        if found.recogniser is not None:
            return found
        detector_only = detector_only or found
    if detector_only is not None:
        return detector_only
    raise problem or _missing(name, places)


def _onnx_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.onnx") if p.is_file()) if folder.is_dir() else []


def _missing(name: str, places: Sequence[Path]) -> FaceError:
    wanted = " and ".join(KNOWN_FILES.get(name, ("its detection", "recognition .onnx files")))
    looked = ", ".join(map(str, places))
    zipped = next((p for p in places if p.with_name(f"{name}.zip").is_file()), None)
    if zipped is not None:
        return FaceError(f"{name}.zip is there but not unpacked: unpack it so that {wanted} lie in {zipped}.")
    return FaceError(
        f"The face model {name!r} was not found: put {wanted} into {places[0]} (looked in: {looked}). "
        "The panel Hotpath in the sidebar, or `hotpath models`, says where each file comes from."
    )


def _read(name: str, place: Path) -> ModelFolder:
    notes: list[str] = []
    files = _onnx_files(place)
    if not files and (files := _onnx_files(place / name)):
        notes.append(f"The files lie one folder too deep, in {place / name}.")
        place = place / name
    if not files:
        wanted = " and ".join(KNOWN_FILES.get(name, ("its detection", "recognition .onnx files")))
        zipped = next((z for z in (place / f"{name}.zip", place.with_name(f"{name}.zip")) if z.is_file()), None)
        cure = f"put {wanted} there" if zipped is None else f"unpack {zipped} so that {wanted} lie there"
        raise FaceError(f"{place} holds no .onnx file: {cure}.")
    outlines: list[Outline] = []
    for file in files:
        try:
            outlines.append(outline(file))
        except FaceError as error:
            notes.append(str(error))
    detector = next((o for o in outlines if o.kind == "detection"), None)
    recogniser = next((o for o in outlines if o.kind == "recognition"), None)
    if detector is not None:
        return ModelFolder(name, place, detector, recogniser, tuple(notes))
    wanted = KNOWN_FILES.get(name, ("a detection file with key points",))[0]
    if notes and not notes[-1].startswith("The files lie"):
        raise FaceError(notes[-1])
    kinds = ", ".join(f"{o.path.name} is {_article(o.kind)}" for o in outlines)
    raise FaceError(f"{place} holds no face detector with key points: put {wanted} there ({kinds}).")


def _article(kind: str) -> str:
    return {
        "recognition": "a recogniser",
        "landmarks": "a landmark model",
        "attributes": "an age and gender model",
        "detection without key points": "a detector without key points",
    }.get(kind, "no face model")
