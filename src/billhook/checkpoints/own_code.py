"""Which code in a checkpoint folder a client may run: only the modelling file that billhook wrote."""

import hashlib
from pathlib import Path

from billhook.errors import ModelError
from billhook.models import layout
from billhook.models.families import stock_type
from billhook.runtime.documents import read_bytes, read_object

WRITTEN = {  # SHA-256 of every modelling file that billhook has written, the newest first, and its date
    "9529a8a49bc6852aad6d020091cf1f997645ec76f14c384f80e8778d803a8275": "2026-11-30",
    "023efd3da2478914d61ab153b790f872c16578890ce677445ec39e094a68aefb": "2026-11-30",
    "2e2413a881281e123e7b68d8dd6e8c4b18465fc2f9e0a1104b4f04adcd8ffc4c": "2026-11-30",
    "074015d2e6c0086dbe741a8f3f523eb002a17634deebe24cec1bdca2af9dd5ef": "2026-11-30",
    "1a91e98c089b852050cfb0734a0177a4b6b0015187e39bac2dade3f5b3e88db7": "2026-11-30",
    "5155d632ce08bd4bea3402b7358a1088b197191fd31f9b337e94ec9adef07a26": "2026-11-30",
    "ab55d34244ec3d445c5d1928107b263bfb0f776937c045e742b0e3a4cb60ff26": "2026-11-30",
    "213e346efcce69cc0a2ba84d7e5560ed9789108a57a50b446b1f4c18ad4c8c84": "2026-11-29",
    "10c6d771120c1629084489c6149959086294275a12d84d1c9b18e66c453c73cb": "2026-11-23",
    "540374679cfac197cd82a3e47b7c19f456f5aa61bd5e77c1b5283ba6a18a19b6": "2026-11-23",
    "009e8cf87c76d6c54113872901da420ac38a2a4fc5b2d0433295c76612eeb045": "2026-11-23",
    "33ef8cf25e8246ea4d777ccc12679c495c0cd5a93929d5a71c44204cf3eb7630": "2026-11-23",
    "e79366bae136b811ef2b307c6c0e0206b5e190b0d9574de2d44733990d138444": "2026-11-23",
    "4b81409db68a8707c94559bcde0c92c5fffdc362c178c224b6a8395f451f42f7": "2026-11-22",
    "c0a4d382233a0db8c59c819923ed2b9418b0c3b3fc21d3a349ddb75a59a53519": "2026-11-22",
}
ALLOW = "--trust-remote-code runs it all the same"
GENERATES = "custom_generate"  # a folder whose code transformers runs in place of `generate` where code is trusted
LARGEST = 2**20  # the most bytes of a modelling file


def needed(folder: Path) -> bool:
    """Whether a client must run the folder's modelling file to load its model; then billhook wrote that file.

    A stock type's model is loaded by the client's own class, whatever code lies beside it.

    Raises:
        BillhookError: it must, but the file's text is not billhook's, or other code would run with it.
    """
    config = read_object(folder / "config.json", f"{folder}: config.json", "it cannot be checked")
    stock = stock_type(str(config.get("model_type")))
    if "auto_map" not in config or stock == config["model_type"]:
        return False
    if config["auto_map"] != layout.auto_map(stock):
        raise ModelError(f"{folder}: config.json names code that is not billhook's (auto_map): {ALLOW}")
    file = folder / layout.CODE.name
    try:
        text = read_bytes(file, str(file), ALLOW, LARGEST)
    except FileNotFoundError:
        raise ModelError(f"{folder} lacks {file.name}, which its config.json names: copy {layout.CODE}") from None
    if hashlib.sha256(text).hexdigest() not in {*WRITTEN, hashlib.sha256(layout.CODE.read_bytes()).hexdigest()}:
        raise ModelError(
            f"{file} is not as billhook writes it, and is not run: put back the text of {layout.CODE}; {ALLOW}"
        )
    if (folder / GENERATES).exists():
        raise ModelError(f"{folder / GENERATES} holds code that would run with the model's: remove it; {ALLOW}")
    return True
