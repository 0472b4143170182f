"""What the page says has a translation, and nothing else has."""

from __future__ import annotations

import re

from sefi_ide.tools.comfyui import REPOSITORY

TEXTS = REPOSITORY / "js" / "lib" / "texts.js"
SCRIPTS = {file: file.read_text(encoding="utf-8") for file in (REPOSITORY / "js").rglob("*.js")}
KEY = re.compile(r'^ {4}(?:"([^"]+)"|(\w+)):', re.MULTILINE)
TRANSLATED = re.compile(r'^ {4}(?:"([^"]+)"|(\w+)):\s+"([^"]+)",$', re.MULTILINE)
SAID = re.compile(r"""\bsay\(\s*(["`])(.*?)\1""")
WORDS = re.compile(r"\{\w+\}")
OF_THE_SERVER = (
    REPOSITORY / "sefi_core" / "comfyui" / "learning" / "live.py",
    REPOSITORY / "sefi_core" / "comfyui" / "learning" / "progress.py",
)


def translations() -> dict[str, str]:
    table = SCRIPTS[TEXTS].split("CHINESE = {")[1].split("\n}")[0]
    found = {first or second: text for first, second, text in TRANSLATED.findall(table)}
    assert len(found) == len(KEY.findall(table)) > 40
    return found


def test_everything_that_is_said_is_translated():
    keys = translations()
    said = [
        re.sub(r"\$\{\w+\}", "#", text)
        for file, script in SCRIPTS.items()
        if file != TEXTS
        for _, text in SAID.findall(script)
    ]
    assert len(said) > 10
    assert [text for text in said if text not in keys] == []


def test_every_translation_is_of_something_that_is_said():
    texts = [script for file, script in SCRIPTS.items() if file != TEXTS]
    texts += [file.read_text(encoding="utf-8") for file in OF_THE_SERVER]
    plain = re.sub(r"\$?\{[^{}:\n]*\}", "#", "\n".join(texts))
    unused = []
    for key in translations():
        # The server puts some together.
        parts = re.split(r" (?=at step|before the first)|(?<=#)(?=[,;])|(?<=step)(?=[,;])", key)
        wanted = [re.sub(WORDS, "#", part).removeprefix(", ") for part in parts]
        if not all(part in plain for part in wanted):
            unused.append(key)
    assert unused == []


def test_names_and_numbers_stay():
    for english, chinese in translations().items():
        assert sorted(WORDS.findall(english)) == sorted(WORDS.findall(chinese)), english
        assert english.count("#") == chinese.count("#"), english
