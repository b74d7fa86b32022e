"""Devices that a config names: whether there can be such a one, and whether it is here."""

from __future__ import annotations

import re
from typing import Any

from crl_exp.config.errors import did_you_mean

DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")
MAPPED = re.compile(r"cpu|disk|(cuda:)?\d{1,3}")
SPREAD = "auto"


def device_faults(key: str, device: str) -> list[str]:
    """What is wrong with a device's name. key: of the config."""
    if DEVICE.fullmatch(device):
        return []
    near = did_you_mean(device.partition(":")[0], ("cpu", "cuda", "mps"))
    return [f"{key}={device}: must be cpu, cuda, cuda:N or mps{near}"]


def device_map_faults(device_map: Any, device: str) -> list[str]:
    """What is wrong with `model.device_map` beside `model.device`, which then is where all but the
    model lies."""
    key = f"model.device_map={device_map}"
    if device_map is None:
        return []
    if device_map == SPREAD:
        if device.startswith("cuda"):
            return []
        return [
            f"{key} spreads the model over GPUs, and SAEs and policies lie on model.device={device}"
            "; set model.device=cuda, or model.device_map=null"
        ]
    if not isinstance(device_map, dict) or not device_map:
        return [f"{key}: must be null, auto, or a mapping such as {{model: 0, lm_head: 1}}"]
    if odd := [one for one in device_map.values() if not MAPPED.fullmatch(str(one))]:
        return [f"{key}: {odd[0]} must be cuda:N, N, cpu or disk"]
    named = set(map(_as_torch_says, device_map.values()))
    if len(named) == 1 and "disk" not in named:
        return [
            f"{key} names one device, which is what model.device is for; set "
            f"model.device={named.pop()} model.device_map=null"
        ]
    if device == "mps" or bool(gpus_named(device_map)) != device.startswith("cuda"):
        return [
            f"{key} and model.device={device}, where SAEs and policies lie: both must be on CUDA "
            "GPUs or both on the cpu; set model.device to a device of the mapping"
        ]
    return []


def _as_torch_says(device: Any) -> str:
    return f"cuda:{device}" if str(device).isdecimal() else str(device)


def gpus_named(device_map: dict[Any, Any]) -> list[str]:
    """The GPUs of a mapping, each once, as cuda:N."""
    found = dict.fromkeys(map(_as_torch_says, device_map.values()))
    return [one for one in found if one.startswith("cuda")]


def missing_device(key: str, device: str) -> list[str]:
    """What this machine lacks of a device."""
    import torch

    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return [f"{key}={device}: no CUDA device here; set {key}=cpu"]
        n, index = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
        if index >= n:
            return [f"{key}={device}: there are {n} CUDA devices here, cuda:0 to cuda:{n - 1}"]
    if device == "mps" and not torch.backends.mps.is_available():
        return [f"{key}=mps: no such device here; set {key}=cpu"]
    return []
