"""The texts of the nodes in other languages: ``locales``, the help pages and their pictures."""

import json
import re
from collections import Counter
from io import BytesIO

import pytest
from PIL import Image
from sefi_ide import nodes
from sefi_ide.tools.locales import FILES, HELP, LOCALES, english, load_nodes, texts_of, written

LANGUAGES = ("en", "zh")
CHINESE = re.compile("[\u4e00-\u9fff]")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
KEPT = re.compile(
    r"<\w+>|[\w/*]*\.(?:safetensors|onnx|pt)\b|models/[\w/]*\w|(?<![\w.])-?\d+(?:\.\d+)?(?![\w.]*\w)"
)
"""What is the same in every language: placeholders, files, folders and numbers."""
SAME = {"SeFi-IDE", "CLIP", "VAE", "Latent", "ID", "ID(P)"}
"""Texts that Chinese takes as they are."""


@pytest.fixture(scope="module")
def loaded():
    return load_nodes()


def read(language, name):
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def page(node_id, language):
    return (HELP / node_id / f"{language}.md").read_text(encoding="utf-8")


def test_english_is_what_the_schemas_say(loaded):
    stale = [
        name
        for name, content in english(loaded).items()
        if (LOCALES / "en" / name).read_text(encoding="utf-8") != written(content)
    ]
    assert not stale, "run: python tools/locales.py"


@pytest.mark.parametrize("name", FILES)
def test_chinese_says_all_that_english_says(name):
    chinese, original = dict(texts_of(read("zh", name))), dict(texts_of(read("en", name)))
    assert list(chinese) == list(original)
    for keys, text in original.items():
        assert chinese[keys].strip(), keys
        assert CHINESE.search(chinese[keys]) or chinese[keys] in SAME, keys
        # The frontend takes these for its own: variables, links and plurals.
        assert not set("{}@|") & set(chinese[keys] + text), keys
        if keys[-1] in ("tooltip", "description"):
            assert Counter(KEPT.findall(chinese[keys])) == Counter(KEPT.findall(text)), keys


def test_chinese_names_options_as_they_are_shown(loaded):
    """The frontend translates no options of nodes, so a text must name them as they are."""
    chinese = read("zh", "nodeDefs.json")
    named = 0
    for node in loaded:
        schema = node.GET_SCHEMA()
        for one in schema.inputs:
            told = chinese[schema.node_id]["inputs"][one.id]["tooltip"]
            for option in getattr(one, "options", None) or ():
                if re.search(rf"(?<!\w){re.escape(option)}(?=:| is | and )", one.tooltip):
                    assert option in told, (schema.node_id, one.id, option)
                    named += 1
    assert named > 10


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", nodes.NODES)
def test_a_help_page_has_title_inputs_and_a_small_picture(loaded, node_id, language):
    texts = read(language, "nodeDefs.json")[node_id]
    text = page(node_id, language)
    assert text.startswith(f"# {texts['display_name']}\n")
    assert not [name for name in texts["inputs"] if f"`{name}`" not in text]
    if language != "en":
        assert not [one["name"] for one in texts["inputs"].values() if one["name"] not in text]
    pictures = IMAGE.findall(text)
    assert pictures
    for said, path in pictures:
        assert said, "words for those who do not see it"
        # The frontend sets the address of js/docs before it, whatever the language.
        content = (HELP / path).read_bytes()
        assert len(content) <= 60 * 1024
        assert Image.open(BytesIO(content)).width >= 200
    assert not re.search(r"(?<!!)\[[^\]]*\]\((?!https://)", text), "the frontend mends no links"


@pytest.mark.parametrize("node_id", nodes.NODES)
def test_help_pages_of_all_languages_are_of_one_build(node_id):
    """Other languages are asked for the page without a language, which is the English one."""
    original = page(node_id, "en")
    copy = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
    assert copy == original, f"a copy of {node_id}/en.md: run python tools/locales.py"
    for language in LANGUAGES[1:]:
        other = page(node_id, language)
        assert [path for _, path in IMAGE.findall(other)] == [p for _, p in IMAGE.findall(original)]
        for mark in ("\n## ", "\n- ", "\n|"):
            assert other.count(mark) == original.count(mark), (language, mark)
