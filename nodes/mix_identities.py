"""Node that makes a new identity of two."""

from __future__ import annotations

from comfy_api.latest import io

from ..sefi_core.errors import raised_by
from ..sefi_core.identity.identity import Identity
from ..sefi_core.identity.mixing import mix
from .types import CATEGORY, SEFI_IDENTITY, TEXT, check_identity, check_input

DISPLAY_NAME = "SeFi Mix Identities"


class SeFiMixIdentities(io.ComfyNode):
    """Two identities of one family in, one between them out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeFiMixIdentities",
            display_name=DISPLAY_NAME,
            category=CATEGORY,
            description=(
                "Makes a new identity between two that were learned for the same kind of "
                "checkpoint, such as a child of two people. Keys (where in the picture) and values "
                "(what it looks like) are mixed apart."
            ),
            search_aliases=["mix identities", "blend faces", "merge identities", "interpolate"],
            inputs=[
                SEFI_IDENTITY.Input("first", tooltip="The identity at a ratio of 0."),
                SEFI_IDENTITY.Input("second", tooltip="The identity at a ratio of 1."),
                *(
                    io.Float.Input(
                        f"ratio_{letter}",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip=(
                            f"How much of the second goes into the attention's {role}, as a share: "
                            "0 is the first identity, 1 the second."
                        ),
                    )
                    for letter, role in (
                        ("k", "keys, which decide where in the picture the person is drawn"),
                        ("v", "values, which decide what the person looks like"),
                    )
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="Write <name> in prompts later. Empty: both names, such as anna_ben.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The general word that it stands for. Empty: that of both; needed where "
                        "theirs differ."
                    ),
                ),
            ],
            outputs=[
                SEFI_IDENTITY.Output(
                    display_name="identity",
                    tooltip="The new identity, for SeFi Apply Identity and SeFi Save Identity.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        first: Identity,
        second: Identity,
        ratio_k: float,
        ratio_v: float,
        name: str | None = "",
        class_word: str | None = "",
    ) -> io.NodeOutput:
        with raised_by(DISPLAY_NAME):
            check_identity(first, "first")
            check_identity(second, "second")
            called = check_input("name", "" if name is None else name, TEXT)
            word = check_input("class_word", "" if class_word is None else class_word, TEXT)
            return io.NodeOutput(mix(first, second, ratio_k, ratio_v, called, word))
