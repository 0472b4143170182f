"""A real ComfyUI server in a directory of its own, driven through its HTTP API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .comfyui import REPOSITORY, comfyui_path
from .workflow import Prompt

PACK = "comfyui-sefi-ide"
"""Folder name of the pack below ``custom_nodes``."""

MINI_SD_NODE = REPOSITORY / "tests" / "mini_sd" / "comfy_node"


# A proxy of the user's environment does not lead back to this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not start, or refused or failed a prompt; says where and why."""


class ComfyServer:
    """Context manager around ``main.py`` with the pack and the miniature's node installed.

    ``directory`` becomes ComfyUI's base directory: models, input, output and log live there.
    ``checkpoints`` are linked into its models folder; ``arguments`` go to ``main.py`` and
    ``environment`` is added to the process's own.
    """

    def __init__(
        self,
        directory: Path,
        checkpoints: list[Path],
        arguments: tuple[str, ...] = ("--cpu",),
        environment: Mapping[str, str] | None = None,
    ):
        self.directory = directory
        self.log = directory / "server.log"
        self._arguments = arguments
        self._environment = {**os.environ, **(environment or {})}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        for folder in ("custom_nodes", "models", "input", "output"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        _link(directory / "custom_nodes" / PACK, REPOSITORY)
        _link(directory / "custom_nodes" / "mini_sd", MINI_SD_NODE)
        for checkpoint in checkpoints:
            self.add_model("checkpoints", checkpoint.name, checkpoint)

    def add_model(self, folder: str, name: str, file: Path) -> None:
        """Link a file under a name into one of the folders of ``models``."""
        link = self.directory / "models" / folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        _link(link, file.resolve())

    def __enter__(self) -> ComfyServer:
        command = [sys.executable, str(comfyui_path() / "main.py")]
        command += ["--listen", "127.0.0.1", "--port", str(self._port)]
        command += ["--base-directory", str(self.directory), "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        # In front of the folders that the user's extra_model_paths.yaml names.
        folders = self.directory / "model_paths.yaml"
        own = {"base_path": str(self.directory / "models"), "is_default": True, "sefi": "sefi"}
        folders.write_text(json.dumps({"server": own}), encoding="utf-8")  # JSON is YAML
        command += ["--extra-model-paths-config", str(folders), *self._arguments]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_up(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise ServerError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def get(self, path: str) -> Any:
        """The JSON at ``path``."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        """The body at ``path``; raises urllib's HTTPError for a status of 400 and above."""
        with _OPENER.open(self.url + path, timeout=60) as response:
            return response.read()

    def post(self, path: str, content: Any) -> Any:
        """Send JSON and return the answer's."""
        return self._send(path, json.dumps(content).encode(), "application/json")

    def upload(self, picture: Path) -> str:
        """Put a picture into the input folder; returns the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
            f'filename="{picture.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        body = head.encode() + picture.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return self._send("/upload/image", body, f"multipart/form-data; boundary={boundary}")[
            "name"
        ]

    def queue(self, prompt: Prompt, stop_at: tuple[str, ...] = ()) -> str:
        """Queue a prompt; returns its id. Raises ServerError if the server refuses it.

        With ``stop_at``, only output nodes of these classes and what they need are executed.
        """
        content: dict[str, Any] = {"prompt": prompt}
        if stop_at:
            content["partial_execution_targets"] = [
                node_id for node_id, node in prompt.items() if node["class_type"] in stop_at
            ]
        try:
            return self.post("/prompt", content)["prompt_id"]
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
            raise ServerError(_refusal(answer, prompt)) from None

    def wait(self, prompt_id: str, seconds: float = 3600) -> Run:
        """Wait until a queued prompt has ended; raises ServerError if a node failed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI has died:\n{self.log.read_text()[-4000:]}")
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return Run(self, entry)
            time.sleep(0.2)
        raise ServerError(f"The prompt has not ended within {seconds:.0f} seconds.")

    def run(self, prompt: Prompt, stop_at: tuple[str, ...] = ()) -> Run:
        """Queue a prompt and wait for its end."""
        return self.wait(self.queue(prompt, stop_at))

    def _send(self, path: str, body: bytes, content_type: str) -> Any:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": content_type}
        )
        with _OPENER.open(request, timeout=60) as response:
            return json.loads(response.read() or "null")


class Run:
    """A prompt that has run: what was executed and what came out."""

    def __init__(self, server: ComfyServer, entry: dict[str, Any]):
        self._server = server
        self.prompt: Prompt = entry["prompt"][2]
        self.outputs: dict[str, dict[str, list]] = entry["outputs"]
        messages = dict(entry["status"]["messages"])
        error = messages.get("execution_error")
        if error is not None:
            raise ServerError(
                f"{error['node_type']} ({error['node_id']}): {error['exception_message'].strip()}"
            )
        if not entry["status"]["completed"]:
            raise ServerError("The prompt was interrupted.")
        self._cached = set(messages["execution_cached"]["nodes"])

    def executed(self, class_type: str) -> bool:
        """Whether any node of the class has run, rather than come from the server's cache."""
        return any(
            node["class_type"] == class_type and node_id not in self._cached
            for node_id, node in self.prompt.items()
        )

    def pictures(self, class_type: str) -> list[bytes]:
        """The encoded pictures that nodes of the class have shown or saved.

        They are in the order of the nodes in the prompt, whichever ran first.
        """
        return [
            self._server.get_bytes("/view?" + urllib.parse.urlencode(picture))
            for node_id, node in self.prompt.items()
            if node["class_type"] == class_type
            for picture in self.outputs.get(node_id, {}).get("images", [])
        ]


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target)


def _refusal(answer: dict[str, Any], prompt: Prompt) -> str:
    """One line for each thing that the server's validation found wrong."""
    lines = [answer["error"]["message"]]
    for node_id, node in (answer.get("node_errors") or {}).items():
        for error in node["errors"]:
            where = f"{prompt[node_id]['class_type']} ({node_id})"
            lines.append(f"{where}: {error['message']}: {error['details']}")
    return "\n".join(lines)
