"""How many parameters a model has, before its weights are loaded: from its files, or from its card.

Nothing is asked of a network, and nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.config.machine.assets import asset_path
from crl_exp.models.config import ASSET_PREFIX, TINY_PREFIX

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
QUANTIZED = {"int8": 1.0, "nf4": 0.55}
"""Bytes a parameter; embeddings stay as they are, which the remainder allows for."""
TINY = 2_000_000
"""No tiny model has more parameters."""
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""


@dataclass(frozen=True)
class Card:
    """What a model's card says: parameters, d_model, layers."""

    parameters: int
    d_model: int
    n_layers: int


_GEMMA_2B = Card(2_614_341_888, 2304, 26)
_GEMMA_9B = Card(9_241_705_984, 3584, 42)
_LLAMA_8B = Card(8_030_261_248, 4096, 32)
CARDS = {
    "google/gemma-2-2b": _GEMMA_2B,
    "google/gemma-2-2b-it": _GEMMA_2B,
    "google/gemma-2-9b": _GEMMA_9B,
    "google/gemma-2-9b-it": _GEMMA_9B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "google/gemma-2-27b": Card(27_227_128_320, 4608, 46),
    "google/gemma-3-270m-it": Card(268_098_176, 640, 18),
    "google/gemma-3-1b-it": Card(999_885_952, 1152, 26),
    "google/gemma-3-4b-it": Card(4_300_079_472, 2560, 34),
    "meta-llama/Llama-3.2-1B-Instruct": Card(1_235_814_400, 2048, 16),
    "meta-llama/Llama-3.2-3B-Instruct": Card(3_212_749_824, 3072, 28),
    "Qwen/Qwen3-1.7B-Base": Card(1_720_574_976, 2048, 28),
    "Qwen/Qwen3-8B-Base": Card(8_190_735_360, 4096, 36),
    "openai-community/gpt2": Card(124_439_808, 768, 12),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Card(134_515_008, 576, 30),
}
"""By hub id: the models of conf/model, whose size is so known before anything is downloaded."""


@dataclass(frozen=True)
class Size:
    """parameters: of the model. d_model, n_layers: where they are known too. source: of all that,
    in words."""

    parameters: int
    source: str
    d_model: int | None = None
    n_layers: int | None = None


def model_size(path: str, revision: str | None = None) -> Size | None:
    """The size of the model at a `model.path`; None where nothing on this machine tells it.

    Raises `UserError` for an asset that isn't there and for a damaged file.
    """
    if path.startswith(TINY_PREFIX):
        return Size(TINY, "a tiny model", 64, 24)
    if path.startswith(ASSET_PREFIX):
        return _of_folder(asset_path(path.removeprefix(ASSET_PREFIX)), "its files")
    if (folder := home(path, "model.path")).is_dir():
        return _of_folder(folder, "its files")
    if (snapshot := cached_model(path, revision)) is not None:
        return _of_folder(snapshot, "its files in the hub's cache")
    card = CARDS.get(path)
    return card and Size(card.parameters, "the model's card", card.d_model, card.n_layers)


def hub_cache() -> Path:
    """Where the hub's libraries keep what they fetched; it need not exist."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return home(cache, "HF_HUB_CACHE")
    if root := os.environ.get("HF_HOME"):
        return home(root, "HF_HOME") / "hub"
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return home(root, "XDG_CACHE_HOME") / "huggingface" / "hub"


def cached_model(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub's model whose weights are in the cache; None where they aren't."""
    root = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    ref = root / "refs" / (revision or "main")
    named = ref.read_text(encoding="utf-8").strip() if ref.is_file() else (revision or "")
    snapshot = root / "snapshots" / named
    whole = named and (snapshot / "config.json").is_file() and any(snapshot.glob("*.safetensors"))
    return snapshot if whole else None


def _of_folder(folder: Path, source: str) -> Size | None:
    """None where the folder has no safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    config = _config(folder)
    text = config.get("text_config") or config
    n_layers = text.get("num_hidden_layers") or text.get("n_layer")
    d_model = text.get("hidden_size") or text.get("n_embd")
    return Size(sum(map(n_values, files)), source, d_model, n_layers)


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); fetch the model again") from error


def n_values(path: Path) -> int:
    """Numbers in a safetensors file, by its header. Raises `UserError` where it has none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > LONGEST_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
        shapes = [one["shape"] for name, one in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is no safetensors file ({error}); fetch the model again"
        ) from error
    return sum(math.prod(shape) for shape in shapes)
