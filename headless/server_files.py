"""Files to and from a ComfyUI server: pictures and films that inputs name go up, results come down.

What the server says is not trusted with paths: a file it names is only ever written inside the output folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..host.whole_files import named, unfinished_file
from .files import inside
from .graph import Graph
from .server_answers import ServerError

UPLOAD_FOLDER = "hotpath"
PREVIEWS = "preview"  # sub-folder of the output folder for what a workflow only shows
BLOCK = 1 << 20
TOO_LARGE = 413


class ServerFiles:
    """session: aiohttp's. at_hand: the server's own folders that are on this machine, by kind ("output", "temp"); what
    lies in them stays there and is not fetched."""

    def __init__(self, session: Any, url: str, output_folder: Path, at_hand: Mapping[str, Path]) -> None:
        self.session, self.url = session, url
        self.output_folder, self.at_hand = output_folder, at_hand

    async def upload_inputs(self, graph: Graph, prompt: dict[str, Any], folder: Path) -> None:
        """Upload the files in `folder` that inputs with an upload button name, and put their names on the server into
        `prompt`: each lies under a folder made of its content's hash."""
        for node in graph.nodes.values():
            named = {name: value for name, value in node.inputs.items() if isinstance(value, str) and value.strip()}
            local = {name: path for name, value in named.items() if (path := _local(folder, value)) is not None}
            if not local:
                continue
            for name in local.keys() & await self._upload_buttons(node.class_type):
                prompt[node.id]["inputs"][name] = await self._upload(local[name])

    async def _upload_buttons(self, class_type: str) -> set[str]:
        async with self.session.get(f"{self.url}/object_info/{class_type}") as response:
            entry = (await response.json()).get(class_type) if response.status == 200 else None
        found: set[str] = set()
        for section in ((entry or {}).get("input") or {}).values():
            for name, declaration in section.items() if isinstance(section, dict) else ():
                options = declaration[1] if isinstance(declaration, list) and len(declaration) > 1 else {}
                if isinstance(options, dict) and any(k.endswith("_upload") and v is True for k, v in options.items()):
                    found.add(name)
        return found

    async def _upload(self, path: Path) -> str:
        import aiohttp

        digest = await asyncio.to_thread(_md5, path)
        with path.open("rb") as content:
            # As browsers do: quoted, a name in another script is three times as long, and no name any more.
            form = aiohttp.FormData(quote_fields=False)
            # The file itself, which is sent block by block: a film need not fit into memory.
            form.add_field("image", content, filename=path.name, content_type="application/octet-stream")
            form.add_field("subfolder", f"{UPLOAD_FOLDER}/{digest[:12]}")
            form.add_field("overwrite", "true")
            async with self.session.post(f"{self.url}/upload/image", data=form) as response:
                if response.status != 200:
                    cure = "; start it with a larger --max-upload-size (in MB)" if response.status == TOO_LARGE else ""
                    raise ServerError(
                        f"{self.url} refused the upload of {path.name}: {response.status} {response.reason}{cure}."
                    )
                answer = await response.json()
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    async def download(self, record: Mapping[str, Any]) -> Path:
        """Fetch what a result's record names; returns where it is now, which is never in place of another file."""
        name, subfolder = str(record["filename"]), str(record.get("subfolder") or "")
        kind = str(record.get("type", "output"))
        root = self.output_folder / PREVIEWS if kind == "temp" else self.output_folder
        try:
            target = inside(root, f"{subfolder}/{name}" if subfolder else name)
        except ValueError as error:
            raise ServerError(f"The server names a result {subfolder}/{name}, which is refused: {error}") from None
        if kind in self.at_hand:
            written = inside(self.at_hand[kind], f"{subfolder}/{name}" if subfolder else name)
            if written.is_file():
                return written
        params = {"filename": name, "subfolder": subfolder, "type": kind}
        async with self.session.get(f"{self.url}/view", params=params) as response:
            if response.status != 200:
                raise ServerError(f"The result {name} could not be fetched: {response.status} {response.reason}.")
            with unfinished_file(target) as part:
                with part.open("wb") as file:
                    async for chunk in response.content.iter_chunked(BLOCK):
                        file.write(chunk)
                return named(part, _names(target))


def _local(folder: Path, value: str) -> Path | None:
    try:
        path = inside(folder, value)
        # A prompt may be longer than any file's name, which the system answers with an error.
        return path if path.is_file() else None
    except (ValueError, OSError):
        return None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _names(path: Path) -> Iterator[Path]:
    """`path`, then name-2, name-3 and so on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
