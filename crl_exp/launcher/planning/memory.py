"""How much memory a run needs, before anything is loaded: an estimate, with where it comes from.

Weights are counted; what a run keeps beside them (prompts, keys and values, Python and its
libraries) is allowed for by constants that hold for the shipped sweeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from omegaconf import DictConfig

from crl_exp.config.errors import UserError
from crl_exp.config.files import home
from crl_exp.config.machine.devices import SPREAD, gpus_named
from crl_exp.config.option_names import OFF
from crl_exp.config.paths import here_or_shipped
from crl_exp.launcher.settings import AUTO, Settings, SlurmSettings
from crl_exp.models.sizes import BYTES, QUANTIZED, Size, model_size, n_values
from crl_exp.saes.config import TINY_PREFIX

GIB = 2**30
# Python, torch and the hub's libraries, and what a run keeps of prompts and answers beside
# engine.keep_gib: on a GPU most of that lies there.
BESIDE_CPU, BESIDE_GPU_HOST, BESIDE_GPU = 4 * GIB, 8 * GIB, 2 * GIB
# A run of a pack has a policy, an optimiser and answers of its own.
EACH_OF_A_PACK = GIB // 2
STEP = 4
"""GiB that a job's memory is rounded up to."""
FILLED = 0.9
"""Share of a GPU that a spread model's layers and what is kept beside them may take."""
WIDEST = 32
"""Times d_model: features of SAEs whose width nothing tells."""


@dataclass(frozen=True)
class Need:
    """Bytes of one run's model and SAEs, the rest that it keeps on the CPU, and in words where the
    numbers come from."""

    weights: int
    saes: int
    kept: int
    cuda: bool
    told: str

    @property
    def gpu(self) -> int:
        """At least so much of one GPU; batches, keys and values take what is left."""
        return self.weights + self.saes + BESIDE_GPU if self.cuda else 0

    def gpus(self, gib: float) -> int | None:
        """How many GPUs of so much memory a model takes that is spread evenly over them, each with
        room for keys and values, the first with all SAEs; None: these fill it already."""
        room = FILLED * gib * GIB - BESIDE_GPU - self.saes
        return math.ceil(self.weights / room) if room > 0 else None

    def host(self, packed: int) -> int:
        """GiB of a job of so many runs, rounded up."""
        more = BESIDE_GPU_HOST if self.cuda else BESIDE_CPU + self.kept
        # Weights pass through the CPU's memory on their way to a GPU.
        whole = self.weights + self.saes + more + (packed - 1) * EACH_OF_A_PACK
        return math.ceil(whole / GIB / STEP) * STEP


def need(config: DictConfig) -> Need | None:
    """What a composed config's run needs; None where nothing here tells the model's size.

    Raises `UserError` as `model_size` does.
    """
    model = config.model
    size = model_size(str(model.path), model.get("revision"))
    if size is None:
        return None
    each = QUANTIZED.get(str(model.quantization), BYTES.get(str(model.dtype), 4.0))
    how = model.quantization or model.dtype
    saes, of_saes = _sae_bytes(config, size)
    kept = int(float(config.engine.keep_gib) * GIB)
    told = (
        f"{size.parameters / 1e9:.3g} billion parameters ({size.source}) × {each:g} bytes ({how})"
    )
    cuda = str(model.device).startswith("cuda")
    return Need(int(size.parameters * each), saes, kept, cuda, told + of_saes)


def _sae_bytes(config: DictConfig, size: Size) -> tuple[int, str]:
    """Of all layers at once, in float32, and words for it."""
    sae = config.sae
    if sae.name == OFF or (sae.folder is None and sae.release is None):
        return 0, ""
    n_layers, said = _n_layers(config, size)
    if sae.folder is not None:
        if str(sae.folder).startswith(TINY_PREFIX):
            return 0, ""
        one = _largest_on_disk(str(sae.folder))
        return n_layers * one * 4, f", SAEs of {said} {one * 4 / GIB:.2f} GiB each (their files)"
    d_model = size.d_model or 4096
    features, how = _features(f"{sae.id_template} {sae.release}", d_model)
    each = 2 * features * d_model * 4
    return (
        n_layers * each,
        f", SAEs of {said} {each / GIB:.2f} GiB each ({features:,} features{how})",
    )


def _largest_on_disk(folder: str) -> int:
    """Numbers of the largest SAE in a folder; 0 where there is none yet."""
    root = here_or_shipped(home(folder, "sae.folder"))
    return max((n_values(path) for path in root.glob("*/*.safetensors")), default=0)


def _features(template: str, d_model: int) -> tuple[int, str]:
    """Of an SAE of a release, from its id and name: `width_16k`, `l{layer}r_8x`, `…-w32k-…`."""
    if width := re.search(r"width_(\d+)k|-w(\d+)k", template):
        return int(width[1] or width[2]) * 1024, ""
    if times := re.search(r"_(\d+)x", template):
        return int(times[1]) * d_model, ""
    return WIDEST * d_model, ", at most: its id doesn't tell"


def _n_layers(config: DictConfig, size: Size) -> tuple[int, str]:
    """Layers whose SAEs are in memory together, at most."""
    section = config.layers
    if "layer" in section:
        return 1, "1 layer"
    if section.get("layers"):
        return len(section.layers), f"{len(section.layers)} layers"
    if "first" in section:
        n = len(range(int(section.first), int(section.last) + 1, int(section.get("step", 1))))
        return n, f"{n} layers"
    if section.get("among"):
        return len(section.among), f"{len(section.among)} layers"
    n = size.n_layers or 64
    return n, f"all {n} layers"


def with_gpus(settings: Settings, config: DictConfig) -> Settings:
    """Settings with the number of GPUs made plain.

    Raises `UserError` where a model is to be spread and nothing tells over how many.
    """
    model = config.model
    plain = settings.for_device(str(model.device))
    device_map = model.get("device_map")
    if settings.gpus is not None or not plain.gpus:  # given, as gpus or gres, or none asked for
        return plain
    if isinstance(device_map, DictConfig):
        numbers = [one.rpartition(":")[2] for one in gpus_named(dict(device_map))]
        return replace(
            settings, gpus=1 + max((int(n) for n in numbers if n.isdecimal()), default=0)
        )
    if device_map != SPREAD:
        return plain
    key = f"model.device_map={device_map}"
    if settings.gpu_gib is None:
        raise UserError(
            f"{key}: over how many GPUs? Set hydra.launcher.gpus=2, or the memory of one GPU, such "
            "as hydra.launcher.gpu_gib=80, and their number is estimated from the model"
        )
    found = need(config)
    if found is None:
        raise UserError(
            f"{key}: nothing on this machine tells how large model.path={model.path} is. Fetch it "
            "first (`python -m crl_exp prefetch …`), or set hydra.launcher.gpus=2"
        )
    gpus = found.gpus(settings.gpu_gib)
    if gpus is None:
        raise UserError(
            f"{key}: the SAEs ({found.saes / GIB:.1f} GiB), which lie on one GPU, fill "
            f"hydra.launcher.gpu_gib={settings.gpu_gib:g} by themselves; steer fewer layers"
        )
    return replace(settings, gpus=gpus)


def gpu_lines(points: Iterable[tuple[DictConfig, Settings]]) -> list[str]:
    """How many GPUs jobs of spread models ask for, with where it comes from; for the plan."""
    told: dict[str, None] = {}
    for config, settings in points:
        if config.model.get("device_map") != SPREAD or settings.gpu_gib is None:
            continue
        if (found := need(config)) is not None:
            told[
                f"model.device_map=auto: {settings.gpus_asked} GPUs of {settings.gpu_gib:g} GiB "
                f"for each job: {found.told}"
            ] = None
    return list(told)


def with_memory(settings: Settings, config: DictConfig) -> Settings:
    """Settings of a job in which `mem=auto` is a number.

    Raises `UserError` where nothing tells how large the model is.
    """
    if not isinstance(settings, SlurmSettings) or settings.mem != AUTO:
        return settings
    found = need(config)
    if found is None:
        raise unknown_size(str(config.model.path))
    return replace(settings, mem=f"{found.host(settings.pack)}GB")


def memory_lines(points: Iterable[tuple[DictConfig, Settings]]) -> list[str]:
    """What jobs ask for, each sum once, with where it comes from; for the plan."""
    told: dict[str, None] = {}
    for config, settings in points:
        if isinstance(settings, SlurmSettings) and (found := need(config)) is not None:
            beside = (
                "8 GiB" if found.cuda else f"4 GiB and engine.keep_gib={config.engine.keep_gib}"
            )
            told[f"mem=auto: {settings.mem} of each job: {found.told}, {beside} beside"] = None
    return list(told)


def unknown_size(path: str) -> UserError:
    return UserError(
        f"hydra.launcher.mem=auto: nothing on this machine tells how large model.path={path} is. "
        "Fetch it first (`python -m crl_exp prefetch …`), or set hydra.launcher.mem=32GB"
    )
