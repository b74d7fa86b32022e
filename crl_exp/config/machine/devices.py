"""Devices that a config names: whether there can be such a one, and whether it is here."""

from __future__ import annotations

import re

from crl_exp.config.errors import did_you_mean

DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


def device_faults(key: str, device: str) -> list[str]:
    """What is wrong with a device's name. key: of the config."""
    if DEVICE.fullmatch(device):
        return []
    near = did_you_mean(device.partition(":")[0], ("cpu", "cuda", "mps"))
    return [f"{key}={device}: must be cpu, cuda, cuda:N or mps{near}"]


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
