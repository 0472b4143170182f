"""What a message may hold, whatever the input was."""

import pytest
from sefi_ide.sefi_core.errors import LONGEST_QUOTE, SeFiError, quoted, raised_by
from sefi_ide.sefi_core.learning.settings import TrainingSettings
from sefi_ide.sefi_core.text.captions import check_captions
from sefi_ide.sefi_core.text.placeholders import check_class_word, check_name, expand_template

HOSTILE = ["\udce9t\udce9", "a\nb\tc", "\x00\x1b[31m", "\u2028", "x" * 100_000]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "ask",
    [
        lambda text: check_name(f"<{text}>"),
        lambda text: check_class_word(f"<{text}>"),
        lambda text: expand_template(text, "anna"),
        lambda text: check_captions([f"<{text}>"], 1),
        lambda text: TrainingSettings(dtype=text),
        lambda text: TrainingSettings(parametrisation=text),
    ],
    ids=["name", "class word", "template", "caption", "dtype", "parametrisation"],
)
def test_a_message_can_be_sent_and_read(ask, text):
    with pytest.raises(SeFiError) as caught, raised_by("SeFi Train Identity"):
        ask(text)
    message = str(caught.value)
    message.encode("utf-8")
    assert "\n" not in message and "\x1b" not in message and "\u2028" not in message
    assert len(message) < 3 * LONGEST_QUOTE


def test_what_is_quoted():
    assert quoted("anna") == "'anna'"
    assert quoted("x" * LONGEST_QUOTE) == repr("x" * LONGEST_QUOTE)
    assert len(quoted("x" * (LONGEST_QUOTE + 1))) == LONGEST_QUOTE + 2


def test_joiners_stay():
    name = "\u0646\u0627\u0645\u200c\u0647\u0627"
    assert name in str(SeFiError(f"the name {name} is taken"))
