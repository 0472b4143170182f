"""What drives the tests and the demo; part of the pack under its one name, ``sefi_ide``."""

from .comfyui import name_the_pack

name_the_pack()
