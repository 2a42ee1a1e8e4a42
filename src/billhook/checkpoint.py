"""Checkpoints in and out: refuse what cannot be pruned before anything is computed; write plain ones and prove them."""

import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from billhook import demo
from billhook.atomic import folder
from billhook.errors import BillhookError, one_of
from billhook.families import family_of
from billhook.progress import Tick, quiet
from billhook.surgery import cast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
AGAIN = "fetch or copy the model again"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


@dataclass
class Opened:
    """A model ready to work on, and what its checkpoint was."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    name: str  # as the user wrote it
    folder: Path | None  # None for a model that came in memory
    dtype: torch.dtype  # of the checkpoint; the model may compute in another


def open_model(name: str, *, device: str = "auto", dtype: str = "auto", tick: Tick = quiet) -> Opened:
    """Load MODEL: a Hugging Face folder, a hub id, a .gguf file or `demo`.

    `dtype="auto"` computes in float32 on a CPU, where half precision is slow or emulated, and in the checkpoint's own
    dtype elsewhere.

    Raises:
        BillhookError: it does not exist, is damaged, is of a kind or family that billhook does not support, or holds NaN.
    """
    where = resolve_device(device)
    path = _locate(name, tick)
    if path.suffix == ".gguf":
        model, tokenizer = _load_gguf(path)
        model.to(where)
        return Opened(model, tokenizer, name, None, torch.float32)
    stored = check_folder(path, name)
    compute = {"auto": torch.float32 if where.type == "cpu" else stored, **DTYPES}[
        one_of("dtype", dtype, ("auto", *DTYPES))
    ]
    tick("loading", 0, 1)
    model = _load(path, name, compute).to(where)
    for (
        param
    ) in model.parameters():  # off the mapped file, which would stay in memory whole until its last tensor is cut
        param.data = param.data.clone()
    tick("loading", 1, 1)
    return Opened(model, load_tokenizer(path, name), name, path, stored)


def open_skeleton(name: str, tick: Tick = quiet) -> Any:
    """The model without its weights, on the meta device: shapes and config, whatever the model's size."""
    path = _locate(name, tick)
    if path.suffix == ".gguf":
        return _load_gguf(path)[0]
    check_folder(path, name)
    try:
        with torch.device("meta"), _quiet_transformers():
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # a config that the class refuses: transformers raises many kinds
        raise BillhookError(f"{name}: transformers could not build it ({_first_line(error)})") from error


def resolve_device(device: str) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU."""
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch adds paragraphs
        raise BillhookError(f"device {device!r} cannot be used here: {why}; try --device auto") from error
    if where.type == "meta":
        raise BillhookError(f"device {device!r} cannot be used here: it holds no data; try --device auto")
    return where


def load_tokenizer(path: Path, name: str) -> Any:
    """The checkpoint's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds for a missing or broken file
        raise BillhookError(
            f"{name}: no tokenizer could be loaded ({_first_line(error)}): copy its tokenizer files into the folder"
        ) from error


def check_folder(path: Path, name: str) -> torch.dtype:
    """Refuse a folder that is not a whole, plain, supported causal LM; return the dtype that most of it is stored in."""
    if not path.is_dir():
        raise BillhookError(f"{name} is not a model folder")
    if not any(path.iterdir()):
        raise BillhookError(f"{name} is an empty folder: expected config.json and *.safetensors")
    if (path / "adapter_config.json").exists():
        raise BillhookError(
            f"{name} is a PEFT adapter: merge it into its base model first (merge_and_unload, then save_pretrained)"
        )
    check_config(_json(path / "config.json", name), name)
    return _check_weights(path, name)


def check_config(config: dict[str, Any], name: str) -> None:
    """Refuse a config that is not a plain causal LM of a supported family."""
    kind, built = config.get("model_type"), config.get("architectures") or []
    built = [built] if isinstance(built, str) else built
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise BillhookError(
            f"{name} is quantised ({method}): prune the full-precision checkpoint, or dequantise it and save it first"
        )
    if config.get("is_encoder_decoder"):
        raise BillhookError(f"{name} is an encoder-decoder ({kind}): billhook prunes decoder-only causal LMs")
    if built and not any(str(architecture).endswith(("ForCausalLM", "LMHeadModel")) for architecture in built):
        raise BillhookError(
            f"{name} is a {built[0]}, not a causal LM: billhook prunes decoder-only causal LMs (…ForCausalLM)"
        )
    try:
        family_of(kind if kind is None else str(kind))
    except BillhookError as error:
        raise BillhookError(f"{name}: {error}") from None
    if config.get("num_hidden_layers") == 0:
        raise BillhookError(f"{name} has no decoder layers: there is nothing to prune")


def save(model: Any, tokenizer: Any, to: Path, source: Path | None) -> None:
    """Write weights, config and tokenizer into the existing folder `to`; tokenizer files are copied from `source` if given."""
    try:
        with _quiet_transformers():
            model.save_pretrained(to)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if source is None:
        tokenizer.save_pretrained(to)
        return
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, to / file.name)


@torch.no_grad()
def verify(path: Path, model: Any) -> dict[str, Any]:
    """Reload a written folder with stock transformers and compare it with the model in memory.

    Returns what was seen.  Raises BillhookError if the logits differ by a bit, the tensors on disk are not as many as the
    model's, a tied embedding came back untied, or generation with a cache goes another way than without.
    """
    written = stored_parameters(path)
    expected = sum(p.numel() for p in model.parameters())
    again = _load(path, str(path), "auto").to(next(model.parameters()).device)
    ids = _probe(model)
    same = torch.equal(model(ids).logits, again(ids).logits)
    drift = _cache_drift(again, ids)
    tied = (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == bool(
        again.config.tie_word_embeddings
    )
    problems = {
        f"the tensors on disk hold {written:,} parameters, the model {expected:,}": written != expected,
        "logits after reloading differ from the model in memory (one cast by .to(dtype) has rounded rotary frequencies: "
        "load it with dtype=…)": not same,
        "the embedding is not tied as the config says": not tied,
        f"logits with and without cache differ by {drift:.1e} of their size": drift > _cache_tolerance(again.dtype),
    }
    if found := [text for text, wrong in problems.items() if wrong]:
        raise BillhookError(f"{path} did not survive reloading: {'; '.join(found)}")
    return {"client": "transformers", "logits": "equal", "parameters_on_disk": written, "cache_drift": drift}


def stored_parameters(path: Path) -> int:
    """Elements of all tensors in a folder's safetensors files."""
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            total += sum(torch.Size(shard.get_slice(key).get_shape()).numel() for key in shard.keys())  # noqa: SIM118
    return total


def demo_folder(tick: Tick = quiet) -> Path:
    """The demo model as a Hugging Face folder in the cache, dequantised to float32 on the first call."""
    out = demo.cache_folder() / "SmolLM2-135M-Instruct"
    if not out.is_dir():
        gguf = demo.model_gguf(tick)
        tick("dequantising", 0, 1)
        with folder(out) as work:
            save(*_load_gguf(gguf), work, None)
        tick("dequantising", 1, 1)
    return out


def _locate(name: str, tick: Tick) -> Path:
    if name == "demo":
        return demo_folder(tick)
    path = Path(os.path.expanduser(name))  # Path's own raises for a user that is not known
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise BillhookError(f"{name} is a file: give the model's folder, a hub id, a .gguf file or 'demo'")
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or path.suffix == ".gguf":
        raise BillhookError(
            f"model {name} does not exist: give a folder, a hub id (owner/name), a .gguf file or 'demo'"
        )
    return _download(name, tick)


def _download(name: str, tick: Tick) -> Path:
    from huggingface_hub import (  # imported here: it reads its offline setting on import
        hf_hub_download,
        snapshot_download,
    )

    tick(f"fetching {name}", 0, 1)
    try:
        check_config(_json(Path(hf_hub_download(name, "config.json")), name), name)  # refuse before the weights come
        found = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except BillhookError:
        raise
    except Exception as error:  # the hub client raises dozens of kinds, offline ones among them
        raise BillhookError(
            f"model {name} is no folder here, and could not be fetched from the hub ({_first_line(error)})"
        ) from error
    tick(f"fetching {name}", 1, 1)
    return Path(found)


def _load_gguf(path: Path) -> tuple[Any, Any]:
    """Dequantise a GGUF; what is left of its quantisation would keep transformers from saving it."""
    try:
        with _quiet_transformers(), redirect_stderr(io.StringIO()):  # its own bar, which no setting turns off
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # gguf and transformers raise many kinds for a file they cannot read
        raise BillhookError(f"{path}: transformers could not read it as GGUF ({_first_line(error)})") from error
    family_of(model.config.model_type)
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = [type(model).__name__]
    vars(model)["hf_quantizer"] = None
    cast(model, torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def _load(path: Path, name: str, dtype: torch.dtype | str) -> Any:
    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            model, info = loaded
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError… for a bad folder
        raise BillhookError(f"{name}: transformers could not load it ({_first_line(error)})") from error
    other = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]  # (name, shape, shape)
    if missing := sorted(info["missing_keys"]) + sorted(other):
        raise BillhookError(
            f"{name}: {len(missing)} tensors are missing or of another shape than config.json says, first {missing[0]}: {AGAIN}"
        )
    if extra := sorted(info["unexpected_keys"]):
        raise BillhookError(
            f"{name}: {len(extra)} tensors have no place in the model that config.json describes, first {extra[0]}: {AGAIN}"
        )
    for tensor, param in model.named_parameters():
        if not param.isfinite().all():
            raise BillhookError(f"{name}: tensor {tensor} holds NaN or infinite values")
    return model.eval().requires_grad_(False)


def _check_weights(path: Path, name: str) -> torch.dtype:
    index = path / "model.safetensors.index.json"
    if index.exists():
        mapped = _json(index, name).get("weight_map")
        if not isinstance(mapped, dict):
            raise BillhookError(f"{name}: {index.name} holds no weight_map: {AGAIN}")
        files = sorted({path / file for file in mapped.values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        if pickles := [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]:
            raise BillhookError(
                f"{name} holds pickled weights ({pickles[0].name}), which can run code when opened: convert them where you trust them, "
                "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
            )
        raise BillhookError(f"{name} holds no *.safetensors: {AGAIN}")
    found: Counter[str] = Counter()
    for file in files:
        if not file.exists():
            raise BillhookError(f"{name}: shard {file.name} is missing, though {index.name} names it: {AGAIN}")
        try:
            with safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118
                    piece = shard.get_slice(key)
                    found[piece.get_dtype()] += torch.Size(piece.get_shape()).numel()
        except (SafetensorError, OSError) as error:
            raise BillhookError(
                f"{name}: shard {file.name} is damaged or truncated ({_first_line(error)}): {AGAIN}"
            ) from error
    if strange := set(found) - set(STORED):
        raise BillhookError(
            f"{name} stores weights as {', '.join(sorted(strange))}: dequantise to float32, bfloat16 or float16 first"
        )
    return STORED[found.most_common(1)[0][0]]


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BillhookError(f"{name} has no {path.name}: give a folder that holds a whole model") from error
    except (ValueError, OSError) as error:
        raise BillhookError(f"{name}: {path.name} cannot be read ({_first_line(error)}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise BillhookError(f"{name}: {path.name} is not a JSON object")
    return content


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Two rows of fixed token ids, within the model's vocabulary and positions."""
    length = min(64, getattr(model.config, "max_position_embeddings", 64))
    ids = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return ids.to(next(model.parameters()).device)


def _cache_drift(model: Any, ids: torch.Tensor) -> float:
    """Relative difference of the logits when the second half goes token by token through the cache.

    A stale `layer_idx` shows here, and nowhere else.
    """
    half = ids.shape[1] // 2
    whole = model(ids).logits[:, half:]
    step = model(ids[:, :half], use_cache=True)
    stepped = []
    for n in range(half, ids.shape[1]):
        step = model(ids[:, n : n + 1], past_key_values=step.past_key_values, use_cache=True)
        stepped.append(step.logits)
    return float((torch.cat(stepped, 1) - whole).float().norm() / whole.float().norm())


def _cache_tolerance(dtype: torch.dtype) -> float:
    """A hundred roundings of the dtype: loose in bfloat16, where only a gross fault shows (tests/test_laws.py has one)."""
    return 100 * torch.finfo(dtype).eps


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers draws bars of its own and warns in passing; billhook speaks for both."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
