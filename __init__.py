"""SeFi-IDE for ComfyUI: learn a face from one picture, draw it from prompts."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./js"


class SeFiExtension(ComfyExtension):
    """What ComfyUI asks the pack for; everything heavy is imported only here."""

    async def on_load(self) -> None:
        from .sefi_core.comfyui import face_adapters, face_encoders, library
        from .sefi_core.comfyui.learning import routes

        library.register_model_folder()
        face_encoders.register_model_folder()
        face_adapters.register_model_folder()
        routes.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from . import nodes

        return nodes.load()


async def comfy_entrypoint() -> ComfyExtension:
    """Entry point of a V3 node pack (ComfyUI's ``nodes.load_custom_node``)."""
    return SeFiExtension()
