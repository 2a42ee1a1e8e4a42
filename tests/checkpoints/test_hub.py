"""A result goes to a hub: here one of our own, on this machine, that takes what it is given."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            return self._answer(200, {"url": "https://huggingface.co/me/small"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            regular = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
            return self._answer(200, {"files": regular})
        if "/commit/" not in self.path:
            return self._answer(200, {"warnings": [], "errors": []})
        if self.refuses:
            return self._answer(403, {"error": "no"})
        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "file":
                self.files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
        self._answer(200, {"commitUrl": "https://huggingface.co/me/small/commit/1", "commitOid": "1", "success": True})

    def do_GET(self) -> None:
        self._answer(200, {"id": "me/small", "siblings": [], "sha": "0"})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    kind = type("OwnHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def result(folder: Path) -> Any:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return billhook.prune(folder, method="layerchop", layers=2, preset="middle", quiet=True)


def test_a_result_goes_to_the_hub(hub: tuple[str, type[Hub]], result: Any) -> None:
    address, kind = hub
    assert "/commit/1" in result.push_to_hub("me/small", token="t", endpoint=address)
    card = kind.files["README.md"].decode()
    assert "license: apache-2.0" in card and "--method layerchop --preset middle --layers 2" in card
    assert {"config.json", "model.safetensors", "tokenizer.json", "billhook.json"} <= set(kind.files)


def test_a_hub_that_refuses_is_said_in_one_line(hub: tuple[str, type[Hub]], result: Any) -> None:
    address, kind = hub
    kind.refuses = True
    with pytest.raises(billhook.BillhookError, match=r"me/small: the hub refuses: .*403"):
        result.push_to_hub("me/small", token="t", endpoint=address)


def test_a_first_look(result: Any, tmp_path: Path) -> None:
    assert isinstance(result.generate("once", new_tokens=4), str)
    assert (result.save_pretrained(tmp_path / "out") / "model.safetensors").is_file()


def test_auto_classes_load_layers_that_differ_once_told(tmp_path: Path, text_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    how = dict(ratio=0.2, layout="per_layer", allocation="skip:1,0", multiple_of=4, samples=4, seq_len=32)
    billhook.prune(folder, method="fasp", calibration=str(text_file), quiet=True, **how).save(tmp_path / "out")
    billhook.register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(tiny.tokens(1, 8)).logits.shape == (1, 8, 258)
