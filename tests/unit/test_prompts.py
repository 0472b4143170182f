import pytest
from sefi_ide.sefi_core.errors import SeFiError, raised_by
from sefi_ide.sefi_core.text.placeholders import (
    check_class_word,
    check_name,
    expand_template,
    find_placeholders,
    placeholder_of,
)


@pytest.mark.parametrize(
    "name",
    [
        "anna",
        "Anna_2",
        "a-b",
        "1",
        "José",
        "анна",
        "安娜",
        "अन्ना",
        "แอนนา",
        "x" * 64,
        "\u0639\u0644\u06cc\u200c\u0631\u0636\u0627",  # Persian Ali-Reza
        "\u0dc1\u0dca\u200d\u0dbb\u0dd3",  # Sinhala Shri
        "\u09b0\u200d\u09cd\u09af\u09be\u09ac",  # Bengali, before the virama
        "\u0d05\u0d35\u0d28\u0d4d\u200d",  # Malayalam, at the end
        "\u0646\u0648\u0631\u0650\u200c\u0627",  # behind a vowel sign
    ],
)
def test_names_and_their_placeholders(name):
    assert check_name(name) == name
    text = f"({placeholder_of(name)}:1.2), smiling"
    (found,) = find_placeholders(text, {name})
    assert text[found.start : found.end] == placeholder_of(name)


def test_an_accent_may_be_a_character_of_its_own():
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    assert check_name(decomposed) == composed
    text = f"{placeholder_of(decomposed)} and {placeholder_of(composed)}"
    found = find_placeholders(text, {composed})
    assert [p.name for p in found] == [composed, composed]
    assert [text[p.start : p.end] for p in found] == text.split(" and ")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "an na",
        "anna\n",
        "<anna>",
        "a:b",
        "../anna",
        "a/b",
        "a.b",
        "x" * 65,
        "a\0b",
        None,
        "\u200c",
        "\u200danna",
        "an\u200cna",
        "anna\u200d",
        "\u200c\u0dca",
        "\u06cc\u200c",
        "\u0639\u200c\u200c\u0644",
        "\u0dca\u200d\u200d\u0dbb",
        "an\u200ena",
        "an\u2060na",
    ],
)
def test_impossible_names_are_refused(name):
    with pytest.raises(SeFiError, match="name"):
        check_name(name)


def test_only_the_wanted_placeholders_are_found_in_order():
    text = "<bob>,<anna><bob> <carl> <lora:anna:1> < anna> <Anna> <<anna>> anna"
    found = find_placeholders(text, {"anna", "bob"})
    assert [p.name for p in found] == ["bob", "anna", "bob", "anna"]
    assert all(text[p.start : p.end] == f"<{p.name}>" for p in found)
    assert find_placeholders("", {"anna"}) == []
    assert find_placeholders(text, set()) == []


def test_class_words():
    assert check_class_word(" old man ") == "old man"
    for bad in ["", "  ", "...", "<anna>", "(man:1.2)", "man\nwoman", "a\0b", "w" * 65, None]:
        with pytest.raises(SeFiError, match="class word"):
            check_class_word(bad)


def test_templates_become_prompts():
    assert expand_template("a photo of <name>, smiling", "anna") == "a photo of <anna>, smiling"
    assert expand_template("a photo of <anna>", "anna") == "a photo of <anna>"
    assert expand_template("<name>", "name") == "<name>"
    assert expand_template("<bob> and <name>", "anna") == "<bob> and <anna>"


@pytest.mark.parametrize(
    "template, count",
    [("a photo of anna", 0), ("", 0), ("<name> and <name>", 2), ("<name> and <anna>", 2)],
)
def test_templates_need_the_placeholder_exactly_once(template, count):
    with pytest.raises(SeFiError, match=f"{count} times: write <name> .* exactly once"):
        expand_template(template, "anna")


def test_an_error_can_name_its_node():
    with pytest.raises(SeFiError, match="^SeFi Save Identity: too long$"):
        with raised_by("SeFi Save Identity"):
            raise SeFiError("too long")
    with pytest.raises(KeyError):
        with raised_by("SeFi Save Identity"):
            raise KeyError("not ours")
