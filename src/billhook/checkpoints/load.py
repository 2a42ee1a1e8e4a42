"""Load checkpoints, and refuse those that cannot be pruned before anything is computed."""

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from billhook import demo
from billhook.checkpoints import compressed, refused
from billhook.checkpoints.around import decoder_tensors
from billhook.checkpoints.configs import check_layers, check_values
from billhook.checkpoints.contents import Contents
from billhook.checkpoints.gguf import read
from billhook.checkpoints.gguf.file import alone
from billhook.checkpoints.names import is_gguf, local_path
from billhook.checkpoints.save import save
from billhook.checkpoints.shards import AGAIN, read_json
from billhook.checkpoints.streaming import give_settings, open_paged, read_contents
from billhook.checkpoints.tokenizers import load_tokenizer
from billhook.errors import BillhookError, ModelError, first_line, one_of, reason
from billhook.models import given, proof
from billhook.models.experts import unfuse
from billhook.models.families import check_known, family_of
from billhook.models.layout import register
from billhook.models.multimodal import around, decoder_config
from billhook.runtime.atomic import folder
from billhook.runtime.headers import shown
from billhook.runtime.memory import free_bytes
from billhook.runtime.offload import check_finite
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.quiet import quiet_transformers

LOG = logging.getLogger("billhook")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FETCHED = [  # patterns of the files that are fetched from the hub
    *("*.json", "*.safetensors", "*.txt", "*.model"),
    *("*.jinja", "*.tiktoken", "*.bpe", "tokenizer.model.v*"),
]
ROOM = 0.8  # share of the free memory that a model loaded whole may take


@dataclass
class Opened:
    """A model that is ready to be worked on, and its checkpoint."""

    model: Any  # a transformers PreTrainedModel
    tokenizer: Any
    name: str  # the name that the user gave
    folder: Path | None  # the checkpoint's folder; None for a model in memory
    dtype: torch.dtype  # the checkpoint's dtype; the model may compute in another one
    file: Path | None = None  # the .gguf file that it was read from


def open_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool | None = False,
    tick: Tick = quiet,
    packed: bool = False,
    family_row: str = "",
) -> Opened:
    """Load MODEL: a Hugging Face folder, a hub id, a .gguf file or `demo`.

    Args:
        family_row: a file with the row of its model type, where billhook has none (billhook.models.given).
        packed: whether a folder may hold packed integers (billhook.checkpoints.compressed); they become float32.
        dtype: what the model computes in.  `auto` is float32 on a CPU, where half precision is slow or emulated, and
            the checkpoint's own dtype elsewhere.
        stream: whether weights stay in their files, with one layer at a time in memory (billhook.runtime.offload).
            None: where the model would take more than `ROOM` of the free memory.

    Raises:
        BillhookError: it does not exist, is damaged, is of a kind or family that billhook does not support, or holds
            NaN.
    """
    target = resolve_device(device)
    use_row(family_row, [name], tick)
    path = locate(name, tick)
    if is_gguf(path):
        if stream:
            raise ModelError(f"{name}: a GGUF is dequantised whole: --stream-weights wants a folder of safetensors")
        model, tokenizer = read.open_gguf(path)
        _take_apart(model).to(target)
        return Opened(model, tokenizer, name, None, torch.float32, path)
    if packed and compressed.is_compressed(path):
        if stream:
            raise ModelError(f"{name}: packed integers are dequantised whole: leave out --stream-weights")
        with compressed.plain(path, name) as folder:
            opened = open_model(str(folder), device=device, dtype=dtype, tick=tick)
        opened.model.name_or_path = opened.model.config._name_or_path = str(path)
        return replace(opened, name=name, folder=path)
    contents = check_folder(path, name)
    stored = contents.dtype
    say_unused(contents)
    compute = {"auto": torch.float32 if target.type == "cpu" else stored, **DTYPES}[
        one_of("dtype", dtype, ("auto", *DTYPES))
    ]
    if stream is None:
        stream = too_large(contents, compute, target)
    if stream:
        return Opened(open_paged(contents, compute, target), load_tokenizer(path, name), name, path, stored)
    tick("loading", 0, 1)
    model = _load(contents, compute).to(target)
    if compute == stored and target.type == "cpu":  # in all other cases every weight has been copied
        _copied(model)  # a mapped file stays in memory until none of its tensors is left
    _take_apart(model)
    tick("loading", 1, 1)
    return Opened(model, load_tokenizer(path, name), name, path, stored)


def load(
    path: str | os.PathLike[str], *, dtype: str | torch.dtype = "auto", device: str = "cpu", stream: bool = False
) -> Any:
    """Load the model of a checkpoint folder, of either layout, without running code that came with it.

    Packed integers (billhook.checkpoints.compressed) become their values.

    Args:
        stream: whether weights stay in their files, with one layer at a time in memory (billhook.runtime.offload).

    Raises:
        BillhookError: the folder is not a whole, plain, supported causal LM.
    """
    name = os.fspath(path)
    if compressed.is_compressed(Path(name)):
        with compressed.plain(Path(name), name) as folder:
            return _copied(load(folder, dtype=dtype, device=device))
    contents = check_folder(Path(name), name)
    compute = {"auto": contents.dtype, **DTYPES}[dtype] if isinstance(dtype, str) else dtype
    if stream:
        return open_paged(contents, compute, resolve_device(device))
    return _load(contents, compute).to(resolve_device(device))


def _copied(model: Any) -> Any:
    """The model without mapped files, which are about to go."""
    for param in model.parameters():
        param.data = param.data.clone()
    return model


def too_large(contents: Contents, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a folder's weights would take more than `ROOM` of the memory that is free."""
    return sum(stored.elements for stored in contents.tensors.values()) * dtype.itemsize > ROOM * free_bytes(device)


def check_positions(opened: Opened, seq_len: int) -> None:
    """Refuse windows longer than the positions that the model has."""
    limit = getattr(opened.model.config, "max_position_embeddings", seq_len)
    if seq_len > limit:
        raise ModelError(f"seq-len {seq_len} is beyond the {limit} positions of {opened.name}: lower --seq-len")


def open_skeleton(name: str, tick: Tick = quiet, family_row: str = "") -> Any:
    """The model without its weights, on the meta device: shapes and config, for models of any size."""
    use_row(family_row, [name], tick)
    path = locate(name, tick)
    if is_gguf(path):
        return _take_apart(read.open_gguf(path)[0])
    if compressed.is_compressed(path):
        with compressed.plain(path, name) as folder:
            return open_skeleton(str(folder), tick)
    contents = check_folder(path, name)
    say_unused(contents)
    model = refused.build(contents.config)  # the config may have been corrected when the contents were read
    model.stands_in = contents.around
    return _take_apart(model)


def use_row(file: str, names: Sequence[str], tick: Tick = quiet) -> None:
    """Take a row from a file, if there is one, for every model of its type that is opened from now on.

    Args:
        names: the models that are about to be opened.

    Raises:
        BillhookError: it is no row, or none of the models is of its type.
    """
    if not file:
        return
    wanted, found = given.use(file), {}
    for name in names:
        path = locate(name, tick)
        found[name] = "" if is_gguf(path) else str(read_json(path / "config.json", name).get("model_type"))
    if wanted not in found.values():
        told = [f"{name} is {f'of {shown(kind)!r}' if kind else 'a GGUF'}" for name, kind in found.items()]
        raise ModelError(f"family row {file} is of {wanted!r}, and {', '.join(told)}: leave out --family-row")


def _take_apart(model: Any) -> Any:
    """Make experts modules of their own, and refuse modules in the layers that the family's row does not know."""
    unfuse(model)
    check_known(model)
    return model


def open_tokenizer(name: str, tick: Tick = quiet) -> Any:
    """The tokenizer of MODEL, without its weights where it is a folder."""
    path = locate(name, tick)
    return read.read_tokenizer(path) if is_gguf(path) else load_tokenizer(path, name)


def resolve_device(device: str) -> torch.device:
    """`auto` is the accelerator if there is one, else the CPU."""
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch adds paragraphs
        raise ModelError(f"device {device!r} cannot be used here: {why}; try --device auto") from error
    if resolved.type == "meta":
        raise ModelError(f"device {device!r} cannot be used here: it holds no data; try --device auto")
    return resolved


def check_folder(path: Path, name: str) -> Contents:
    """Refuse a folder that is not a whole, plain, supported causal LM; return what its files hold."""
    if not path.is_dir():
        raise ModelError(f"{name} is not a model folder")
    if not any(path.iterdir()):
        raise ModelError(f"{name} is an empty folder: expected config.json and *.safetensors")
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{name} is a PEFT adapter: merge it into its base model first (merge_and_unload, then save_pretrained)"
        )
    config = check_config(read_json(path / "config.json", name), name)
    check_layers(config, decoder_tensors(path, name), name)
    return read_contents(path, name)


def check_loadable(path: Path, name: str) -> None:
    """Refuse as `check_folder` does, but not packed integers, whose values have no files to be looked at."""
    if not compressed.is_compressed(path):
        check_folder(path, name)


def say_unused(contents: Contents) -> None:
    """Warn of stored tensors that are no part of the model; transformers leaves them out, too."""
    if contents.unused:
        LOG.warning(
            "%s: %d stored tensors are not used by its model, first %s: left out, as transformers leaves them",
            *(contents.name, len(contents.unused), contents.unused[0]),
        )


def check_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Refuse a config that is not a plain causal LM of a supported family, or has one as its text decoder.

    Returns:
        the config; of a multimodal model, that of its text decoder.
    """
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{name} is quantised ({shown(str(method))}): prune the full-precision checkpoint, or load it with "
            f"transformers, {refused.DEQUANTISED.get(str(method), 'model.dequantize(),')} and save_pretrained that first"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder ({shown(str(kind))}): billhook prunes decoder-only causal LMs")
    try:
        stands = around(config)
        config = decoder_config(config)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    kind, architectures = config.get("model_type"), [] if stands else architectures
    causal = ("ForCausalLM", "LMHeadModel")
    if architectures and not any(str(architecture).endswith(causal) for architecture in architectures):
        raise ModelError(
            f"{name} is a {shown(str(architectures[0]))}, not a causal LM: billhook prunes decoder-only causal LMs "
            "(…ForCausalLM)"
        )
    try:
        proof.ensure(config)
        family_of(kind if kind is None else shown(str(kind)))
        register(str(kind))
    except BillhookError as error:
        raise ModelError(f"{name}: {error}") from None
    check_values(config, name)
    if config.get("num_hidden_layers") == 0:
        raise ModelError(f"{name} has no decoder layers: there is nothing to prune")
    return config


def demo_folder(tick: Tick = quiet) -> Path:
    """The demo model as a Hugging Face folder in the cache, dequantised to float32 on the first call."""
    out = demo.cache_folder() / "SmolLM2-135M-Instruct-2"  # 2: since its tokenizer splits as the GGUF says
    if not out.is_dir():
        gguf = demo.model_gguf(tick)
        tick("dequantising", 0, 1)
        with folder(out) as work:
            save(*read.open_gguf(gguf), work, None)
        tick("dequantising", 1, 1)
    return out


def locate(name: str, tick: Tick = quiet) -> Path:
    """The folder or .gguf file of a model, fetched from the hub where it is not on this machine.

    Raises:
        BillhookError: there is none.
    """
    if name == "demo":
        return demo_folder(tick)
    if (path := local_path(name)) is None:
        return _download(name, tick)
    return alone(path) if path.is_dir() else path


def _download(name: str, tick: Tick) -> Path:
    from huggingface_hub import (  # imported late, since it reads its offline setting on import
        hf_hub_download,
        snapshot_download,
    )

    tick(f"fetching {name}", 0, 1)
    try:
        config = read_json(Path(hf_hub_download(name, "config.json")), name)
        check_config(config, name)  # refuse before the weights come
        fetched = snapshot_download(name, allow_patterns=FETCHED)
    except BillhookError:
        raise
    except Exception as error:  # the hub client raises many kinds of error
        raise ModelError(
            f"model {name} is no folder here, and could not be fetched from the hub ({first_line(error)})"
        ) from error
    tick(f"fetching {name}", 1, 1)
    return Path(fetched)


def _load(contents: Contents, dtype: torch.dtype) -> Any:
    """The model of a folder, whole: transformers is given the tensors of its contents and no others."""
    name = contents.name
    try:
        with quiet_transformers(), ExitStack() as opened:
            files = {
                stored.file: opened.enter_context(safe_open(stored.file, framework="pt"))
                for stored in contents.tensors.values()
            }
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(contents.config)]
            loaded: Any = kind.from_pretrained(
                None,
                config=contents.config,
                state_dict={key: files[stored.file].get_slice(stored.key) for key, stored in contents.tensors.items()},
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                generation_config=GenerationConfig(),  # so that a fault in the folder's own does not end the load
            )
            model, info = loaded
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError… for bad weights
        raise ModelError(f"{name}: transformers could not load it ({reason(error)})") from error
    # transformers gives mismatched keys as (name, shape, shape)
    misshapen = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    if missing := [*sorted(info["missing_keys"]), *sorted(misshapen), *sorted(info["unexpected_keys"])]:
        raise ModelError(
            f"{name}: {len(missing)} tensors are missing or of another shape than config.json says, first "
            f"{missing[0]}: "
            f"{AGAIN}"
        )
    give_settings(model, contents)
    model.name_or_path = model.config._name_or_path = str(contents.path)  # where peft looks for its base model
    for tensor, param in model.named_parameters():
        entry = contents.tensors.get(tensor)
        check_finite(param.detach(), tensor, entry.file if entry else name)
    return model.eval().requires_grad_(False)
