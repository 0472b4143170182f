"""Writes ``locales/en`` from the schemas of the nodes and from the settings in ``js/``.

    python tools/locales.py

ComfyUI's frontend takes the texts of ``locales/<language>`` before those of the schemas, in English
too, so English is never written by hand. ``locales/zh`` is: where a key is new or gone there, this
says so, and ``tests/comfy/test_locales.py`` fails. A help page in a language that has none of its
own is ``js/docs/<node id>.md``, a copy of the English one, which is made here as well.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy_api.latest import io

REPOSITORY = Path(__file__).resolve().parent.parent
LOCALES = REPOSITORY / "locales"
HELP = REPOSITORY / "js" / "docs"
FILES = ("main.json", "nodeDefs.json", "settings.json")

_SETTINGS = re.compile(r"^ {4}settings: \[\n(.*?)^ {4}\],$", re.DOTALL | re.MULTILINE)
_SETTING = re.compile(r"^ {8}\{\n(.*?)^ {8}\},$", re.DOTALL | re.MULTILINE)
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')


def english(nodes: list[type[io.ComfyNode]]) -> dict[str, dict[str, Any]]:
    """File name -> content of ``locales/en``.

    Raises ``ValueError`` where a setting of ``js/`` cannot be read.
    """
    schemas = [node.GET_SCHEMA() for node in nodes]
    settings = list(_settings())
    categories = {word: word for _, (words, _) in settings for word in words}
    main: dict[str, Any] = {
        "nodeCategories": {schema.category: schema.category for schema in schemas},
        "settingsCategories": categories,
    }
    return {
        "main.json": main,
        "nodeDefs.json": {schema.node_id: _node(schema) for schema in schemas},
        "settings.json": {key.replace(".", "_"): texts for key, (_, texts) in settings},
    }


def written(content: dict[str, Any]) -> str:
    """A file of ``locales``, as text."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def texts_of(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, text) of every text in a file of ``locales``."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from texts_of(value, (*path, key))
    else:
        yield path, content


def _node(schema: io.Schema) -> dict[str, Any]:
    inputs, outputs = {}, {}
    for one in schema.inputs:
        # The id, as core has it in English: help pages and messages speak of it.
        inputs[one.id] = {"name": one.display_name or one.id, "tooltip": one.tooltip}
    for number, one in enumerate(schema.outputs):
        # Without a name it is called as its type, which the frontend translates.
        named = {"name": one.display_name} if one.display_name else {}
        outputs[str(number)] = {**named, "tooltip": one.tooltip}
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def _settings() -> Iterator[tuple[str, tuple[list[str], dict[str, str]]]]:
    """(id, (categories, texts)) of every setting that the pack's extensions register."""
    for file in sorted((REPOSITORY / "js").rglob("*.js")):
        script = file.read_text(encoding="utf-8")
        blocks = _SETTINGS.findall(script)
        found = [setting for block in blocks for setting in _SETTING.findall(block)]
        if len(found) != len(re.findall(r"\bdefaultValue:", script)):
            raise ValueError(f"{file.name}: a setting is not laid out as tools/locales.py reads it")
        for setting in found:
            name = _value(setting, "id")
            constant = re.search(rf'^const {name} = "(.*)"$', script, re.MULTILINE)
            categories = _TEXT.findall(_value(setting, "category"))
            # The last one is the setting's own, and shown nowhere.
            texts = {
                key: json.loads(_value(setting, key))
                for key in ("name", "tooltip")
                if re.search(rf"^ {{12}}{key}:", setting, re.MULTILINE)
            }
            key = constant.group(1) if constant else json.loads(name)
            yield key, (categories[:-1], texts)


def _value(setting: str, key: str) -> str:
    found = re.search(rf"^ {{12}}{key}:\s+(.*),$", setting, re.MULTILINE)
    if found is None:
        raise ValueError(f"{key} of a setting is not laid out as tools/locales.py reads it")
    return found.group(1)


def load_nodes() -> list[type[io.ComfyNode]]:
    """All nodes of the pack; ComfyUI must be importable. Raises ``RuntimeError`` if one is not."""
    from sefi_ide import nodes
    from sefi_ide.sefi_core.comfyui import face_adapters, face_encoders, library

    library.register_model_folder()
    face_encoders.register_model_folder()
    face_adapters.register_model_folder()
    loaded = nodes.load()
    if len(loaded) != len(nodes.NODES):
        raise RuntimeError("Not every node could be loaded, see the log.")
    return loaded


def main() -> None:
    comfyui = runpy.run_path(str(REPOSITORY / "tools" / "comfyui.py"))
    comfyui["start"](cpu=True, prefix="sefi-locales-")
    for name, content in english(load_nodes()).items():
        (LOCALES / "en" / name).write_text(written(content), encoding="utf-8")
        print(f"locales/en/{name} written")
        keys = {path for path, _ in texts_of(content)}
        chinese = json.loads((LOCALES / "zh" / name).read_text(encoding="utf-8"))
        for path in keys.symmetric_difference(path for path, _ in texts_of(chinese)):
            print(f"locales/zh/{name} {'lacks' if path in keys else 'has still'} {'.'.join(path)}")
    for page in sorted(HELP.glob("*/en.md")):
        (HELP / f"{page.parent.name}.md").write_bytes(page.read_bytes())


if __name__ == "__main__":
    main()
