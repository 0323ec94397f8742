"""What the nodes say of themselves, written where people read it: help pages, and locales/en and locales/zh.

    python -m hotpath.demo.node_texts        write the lists in web/docs, English and Chinese, and both languages' locales
    python -m hotpath.demo.node_texts --zh   print the sentences that locales/zh.json has no Chinese for

A help page's prose is written by hand; the list between its two marks comes from the class, so that neither can go stale.
Chinese is kept by sentence in locales/zh.json: a sentence that changes in English is missing there, and named. The prose of
a Chinese page, web/docs/<NodeId>/zh.md, is kept whole, with a hash of the English prose that it was translated from.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parent.parent
HELP = PACK / "web" / "docs"
LOCALES = PACK / "locales"
CHINESE = LOCALES / "zh.json"
BEGIN, END = "<!-- from the node: begin -->", "<!-- from the node: end -->"
TRANSLATED = re.compile(r"<!-- translated from the English prose ([0-9a-f]{12}) -->")
LONGEST_CHOICES = 90  # letters; longer lists of choices are left out of a page
SECTIONS = ("required", "optional")
# Outputs that have the name of their type are looked up here by the front end, and so are categories.
DATA_TYPES = {
    "INSTANTID": "InstantID adapter",
    "FACEANALYSIS": "face models",
    "FACE_EMBEDS": "face tokens",
    "FACES": "faces",
    "FACE_CROPS": "crop places",
    "HOTPATH_IDENTITY": "identity",
    "HOTPATH_VLM": "vision-language model",
    "HOTPATH_COLOR_STATE": "color state",
    "HOTPATH_TELEMETRY": "block telemetry",
    "HOTPATH_BLOCK_PROFILE": "block profile",
}
# Names of inputs and outputs that mean another thing here than on other nodes: languages have a word of their own for each.
HOMONYMS = {
    "input after of Caption Folder",
    "output answers of Ask Vision-Language Model",
    "input negative of Z-Image",
    "input table of Precision",
    "output profile of Profile",
    "input profile of Profile Report",
    "input profile of Speed Profile",
}


@dataclass(frozen=True)
class Wording:
    """The words and signs of a page's list, and `say`, which puts a name or sentence into the page's language."""

    say: Callable[[str], str] = str
    inputs: str = "Inputs"
    outputs: str = "Outputs"
    none: str = "None."
    choice: str = "choice"
    default: str = "default"
    to: str = "to"
    optional: str = "optional"
    comma: str = ", "
    brackets: str = " ({})"
    colon: str = ": "


ENGLISH = Wording()


def chinese_wording() -> Wording:
    words = chinese()
    return Wording(
        lambda text: words.get(text, text),
        *("输入", "输出", "无。", "选项", "默认", "到", "可选", "，", "（{}）", "："),
    )


@dataclass(frozen=True)
class InputText:
    """One input as people see it."""

    name: str
    kind: str  # a type, or "choice"
    optional: bool
    options: dict[str, Any]
    choices: tuple[str, ...] = ()

    @property
    def tooltip(self) -> str:
        return str(self.options.get("tooltip", ""))

    def described(self, wording: Wording = ENGLISH) -> str:
        """Type, default and range in brackets, as a page shows them."""
        parts = [wording.choice if self.kind == "choice" else self.kind]
        if self.choices and len(shown := " / ".join(self.choices)) <= LONGEST_CHOICES:
            parts = [shown]
        default = self.options.get("default")
        if default not in (None, "") and not (isinstance(default, str) and len(default) > 40):
            parts.append(f"{wording.default} {str(default).lower() if isinstance(default, bool) else default}")
        if self.kind in ("INT", "FLOAT") and {"min", "max"} <= self.options.keys():
            parts.append(f"{self.options['min']} {wording.to} {self.options['max']}")
        if self.optional:
            parts.append(wording.optional)
        return wording.brackets.format(wording.comma.join(parts))


@dataclass(frozen=True)
class NodeText:
    """All texts of one node."""

    node_id: str
    display_name: str
    description: str
    category: str
    inputs: tuple[InputText, ...]
    outputs: tuple[tuple[str, str], ...]  # name, tooltip
    aliases: tuple[str, ...]
    deprecated: bool

    def list(self, wording: Wording = ENGLISH) -> str:
        """The list of inputs and outputs of a help page."""
        say, colon = wording.say, wording.colon

        def named(side: str, name: str) -> str:
            """The name that programs use, and behind it what the node shows, where that is another."""
            shown = self.shown(side, name, say)
            return f"**{name}**" if shown == name else f"**{name}** {shown}"

        inputs = [f"- {named('input', i.name)}{i.described(wording)}{colon}{say(i.tooltip)}" for i in self.inputs]
        outputs = [f"- {named('output', name)}{colon}{say(tooltip)}" for name, tooltip in self.outputs]
        none = [wording.none]
        return "\n".join(
            [f"## {wording.inputs}", "", *(inputs or none), "", f"## {wording.outputs}", "", *(outputs or none)]
        )

    def names(self) -> Iterator[tuple[str, str]]:
        """Side and name of every input and output."""
        yield from (("input", one.name) for one in self.inputs)
        yield from (("output", name) for name, _ in self.outputs)

    def place(self, side: str, name: str) -> str:
        return f"{side} {name} of {self.display_name}"

    def shown(self, side: str, name: str, say: Callable[[str], str]) -> str:
        """`name` through `say`, by its place if it is a homonym that the language has a word for."""
        place = self.place(side, name)
        return said if place in HOMONYMS and (said := say(place)) != place else say(name)

    def sentences(self) -> Iterator[str]:
        yield self.display_name
        yield self.description
        for one in self.inputs:
            yield from (one.name, one.tooltip)
        for name, tooltip in self.outputs:
            yield from (name, tooltip)
        yield from (place for side, name in self.names() if (place := self.place(side, name)) in HOMONYMS)

    def definition(self, say: Callable[[str], str]) -> dict[str, Any]:
        """The entry of nodeDefs.json, every text through `say`."""
        return {
            "display_name": say(self.display_name),
            "description": say(self.description),
            "inputs": {
                key(i.name): {"name": self.shown("input", i.name, say), "tooltip": say(i.tooltip)} for i in self.inputs
            },
            "outputs": {
                str(n): {"name": self.shown("output", name, say), "tooltip": say(tooltip)}
                for n, (name, tooltip) in enumerate(self.outputs)
            },
        }


def key(name: str) -> str:
    """As the front end writes a name in a path of keys."""
    return name.replace(".", "_")


def text_of(node_id: str, node_class: Any) -> NodeText:
    declared = node_class.INPUT_TYPES()
    inputs = []
    for section in SECTIONS:
        for name, spec in declared.get(section, {}).items():
            kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
            # "" stands where there is no file yet.
            choices = tuple(str(one) for one in kind if one != "") if isinstance(kind, list | tuple) else ()
            named = "choice" if isinstance(kind, list | tuple) else str(kind)
            inputs.append(InputText(name, named, section == "optional", options, choices))
    names = getattr(node_class, "RETURN_NAMES", None) or node_class.RETURN_TYPES
    tooltips = getattr(node_class, "OUTPUT_TOOLTIPS", ()) or ("",) * len(names)
    return NodeText(
        node_id,
        getattr(node_class, "DISPLAY_NAME", node_id),
        getattr(node_class, "DESCRIPTION", ""),
        node_class.CATEGORY,
        tuple(inputs),
        tuple(zip(map(str, names), tooltips, strict=True)),
        tuple(getattr(node_class, "SEARCH_ALIASES", ())),
        bool(getattr(node_class, "DEPRECATED", False)),
    )


def all_nodes() -> dict[str, NodeText]:
    """Every node of the pack, as it looks where no model file is, so that every machine writes the same texts."""
    from .. import host
    from ..host.headless import HeadlessHost
    from ..nodes import NODE_CLASS_MAPPINGS

    with tempfile.TemporaryDirectory() as nothing:
        empty = Path(nothing)
        before = host.use(
            HeadlessHost(models=empty, input_folder=empty, output_folder=empty, device="cpu", show_progress=False)
        )
        try:
            return {node_id: text_of(node_id, found) for node_id, found in NODE_CLASS_MAPPINGS.items()}
        finally:
            host.use(before)


def with_list(page: str, node: NodeText, wording: Wording = ENGLISH) -> str:
    """`page` with the list of `node` between its marks; a page without marks gets them at its end."""
    block = f"{BEGIN}\n\n{node.list(wording)}\n\n{END}"
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{block}\n"
    return re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: block, page, flags=re.DOTALL)


def prose(page: str) -> str:
    """What somebody wrote on a page: all but its list and the mark of its translation."""
    written = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), "", page, flags=re.DOTALL)
    return TRANSLATED.sub("", written).strip()


def prose_hash(page: str) -> str:
    """12 hexadecimal digits of a page's prose; where its lines break does not count."""
    return hashlib.sha256(" ".join(prose(page).split()).encode()).hexdigest()[:12]


def with_source(page: str, english: str) -> str:
    """`page`, marked as a translation of `english`; a mark that is there stays, since only a translator knows better."""
    if TRANSLATED.search(page):
        return page
    return f"{page.rstrip()}\n\n<!-- translated from the English prose {prose_hash(english)} -->\n"


def chinese() -> dict[str, str]:
    return dict(json.loads(CHINESE.read_text("utf-8"))) if CHINESE.is_file() else {}


def categories(nodes: dict[str, NodeText]) -> list[str]:
    return sorted({part for node in nodes.values() for part in node.category.split("/")})


def sentences(nodes: dict[str, NodeText]) -> list[str]:
    """All that needs Chinese, without repeats, in the order of the nodes."""
    found = [sentence for node in nodes.values() for sentence in node.sentences()]
    found += [*categories(nodes), *DATA_TYPES.values()]
    return list(dict.fromkeys(sentence for sentence in found if sentence and not _needs_no_translation(sentence)))


def _needs_no_translation(sentence: str) -> bool:
    return sentence in ("*", "seed") or not re.search("[A-Za-z]", sentence)


def node_definitions(nodes: dict[str, NodeText], words: dict[str, str] | None = None) -> dict[str, Any]:
    def say(text: str) -> str:
        return text if words is None else words.get(text, text)

    found: dict[str, Any] = {}
    for node in nodes.values():
        found[key(node.node_id)] = node.definition(say)
        # The front end asks for a node's title by its id as it is, where a point begins a deeper key.
        first, point, rest = node.node_id.partition(".")
        if point:
            title = {"display_name": say(node.display_name), "description": say(node.description)}
            found.setdefault(first, {})[rest] = title
    return found


def main_texts(nodes: dict[str, NodeText], words: dict[str, str] | None = None) -> dict[str, Any]:
    """What main.json has of the nodes; texts of the panel stand there beside it and are kept."""
    say = (lambda text: text) if words is None else (lambda text: words.get(text, text))
    return {
        "nodeCategories": {part: say(part) for part in categories(nodes)},
        "dataTypes": {kind: say(name) for kind, name in DATA_TYPES.items()},
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_all() -> None:
    nodes = all_nodes()
    in_chinese = chinese_wording()
    for node in nodes.values():
        page, translated = HELP / f"{node.node_id}.md", HELP / node.node_id / "zh.md"
        if page.is_file():
            page.write_text(with_list(page.read_text("utf-8"), node), encoding="utf-8")
        if page.is_file() and translated.is_file():
            text = with_list(translated.read_text("utf-8"), node, in_chinese)
            translated.write_text(with_source(text, page.read_text("utf-8")), encoding="utf-8")
    for language, words in (("en", None), ("zh", chinese())):
        folder = LOCALES / language
        write_json(folder / "nodeDefs.json", node_definitions(nodes, words))
        main = folder / "main.json"
        kept = json.loads(main.read_text("utf-8")) if main.is_file() else {}
        write_json(main, {**kept, **main_texts(nodes, words)})


def main(arguments: list[str]) -> int:
    if "--zh" in arguments:
        words = chinese()
        print(json.dumps({s: "" for s in sentences(all_nodes()) if s not in words}, ensure_ascii=False, indent=2))
        return 0
    write_all()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
