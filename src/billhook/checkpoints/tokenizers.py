"""The tokenizer of a checkpoint folder."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from billhook.errors import ModelError, reason
from billhook.runtime.quiet import quiet_transformers

# packages that SentencePiece tokenizers need, and the modules that they are imported as
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def load_tokenizer(path: Path, name: str) -> Any:
    """The checkpoint's own tokenizer."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a missing or broken file
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name}: its tokenizer is code in the folder (auto_map), which billhook does not run: save it as a "
                "tokenizer.json"
            ) from None
        lacking = [package for package, module in SENTENCEPIECE.items() if not _is_installed(module)]
        if lacking and any(path.glob("*.model")) and not (path / "tokenizer.json").exists():
            raise ModelError(
                f"{name}: its tokenizer is a SentencePiece model, which transformers reads by "
                f"{' and '.join(SENTENCEPIECE)}: "
                f"pip install {' '.join(lacking)}, or save the tokenizer as a tokenizer.json"
            ) from error
        raise ModelError(
            f"{name}: no tokenizer could be loaded ({reason(error)}): copy its tokenizer files into the folder"
        ) from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that the module is in
        return False
