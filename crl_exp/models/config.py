"""Which language model: the config section, and what its config.json says before weights load."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import home
from crl_exp.config.machine.assets import FETCH, asset_path
from crl_exp.config.machine.devices import (
    device_faults,
    device_map_faults,
    gpus_named,
    missing_device,
)
from crl_exp.config.machine.hub import hub_trouble, own_code

if TYPE_CHECKING:
    import torch

ASSET_PREFIX = "asset:"
TINY_PREFIX = "tiny:"
DTYPES = ("float32", "bfloat16", "float16")
"""Names of torch's; the config is read without torch."""
QUANTIZATIONS = ("int8", "nf4")
TEMPLATE_OURS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages",
    "padding", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip
"""Arguments of `apply_chat_template` that say what comes out, not what the template prints."""
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
OFFLINE = (
    "Without the hub: copy a folder with config.json, safetensors and the tokenizer's files here "
    f"and set model.path=/that/folder, or take model=smollm2_135m, which `{FETCH}` fetches"
)


@dataclass
class ModelConfig:
    """Which language model.

    name: what results are filed under, and what an SAE's metadata is compared with.
    path: a local folder, a hub id, `asset:NAME` for one fetched by `make assets`, or `tiny:KIND`
        for a tiny random one made on the spot.
    revision: hub revision (null: the default branch).
    dtype: float32, bfloat16 or float16.
    device: cpu, cuda, cuda:1, …, or mps.
    attn_implementation: sdpa, eager or null (transformers' own choice for the architecture).
    quantization: of the weights by bitsandbytes, on an NVIDIA GPU: int8 (LLM.int8, arXiv
        2208.07339), nf4 (QLoRA's 4 bits, arXiv 2305.14314) or null.
    device_map: null: all of the model on `device`. auto: its layers spread over all GPUs of the
        node, for a model that doesn't fit on one; or where each part lies, by names of modules:
        {model.embed_tokens: 0, model.layers: 1, …}, with cuda:N, N, cpu or disk. Then `device` is
        where SAEs, policies and kept residuals lie.
    chat_template_args: what the tokenizer's chat template is given besides the turns, as it names
        them: {enable_thinking: false} (Qwen3), {date_string: 26 Jul 2024} (Llama 3.2, whose
        template else prints the day of the run).
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    device: str
    attn_implementation: str | None
    quantization: str | None
    chat_template_args: dict[str, Any]
    device_map: Any = None  # a name or a mapping: OmegaConf has no such union

    def local_path(self) -> str:
        """Resolve `asset:` and `tiny:` names. Raises `UserError` where the asset is missing."""
        if self.path.startswith(ASSET_PREFIX):
            return str(asset_path(self.path.removeprefix(ASSET_PREFIX)))
        if self.path.startswith(TINY_PREFIX):
            from crl_exp.models.tiny import tiny_model

            return str(tiny_model(self.path.removeprefix(TINY_PREFIX)))
        return self.path

    def faults(self) -> list[str]:
        """What can be said to be wrong before anything is loaded."""
        found = device_faults("model.device", self.device)
        found += device_map_faults(self.device_map, self.device)
        ours = self.path.startswith((ASSET_PREFIX, TINY_PREFIX))
        if self.revision is not None and (ours or home(self.path, "model.path").is_dir()):
            found.append(
                f"model.revision={self.revision}: model.path={self.path} is a folder, which has no "
                "revisions; set model.revision=null, or model.path to the model's hub id"
            )
        if self.dtype not in DTYPES:
            near = did_you_mean(self.dtype, DTYPES)
            found.append(f"model.dtype={self.dtype}: must be one of {', '.join(DTYPES)}{near}")
        if self.attn_implementation not in (None, "sdpa", "eager"):
            found.append(
                f"model.attn_implementation={self.attn_implementation}: the engine builds its own "
                "masks, which sdpa, eager and null take"
            )
        if self.quantization not in (None, *QUANTIZATIONS):
            near = did_you_mean(self.quantization, QUANTIZATIONS)
            found.append(
                f"model.quantization={self.quantization}: must be one of "
                f"{', '.join(QUANTIZATIONS)} or null{near}"
            )
        elif self.quantization and not self.device.startswith("cuda"):
            found.append(
                f"model.quantization={self.quantization} needs an NVIDIA GPU; set "
                "model.device=cuda, or model.quantization=null"
            )
        if taken := sorted(TEMPLATE_OURS & self.chat_template_args.keys()):
            found.append(f"model.chat_template_args.{taken[0]}: is set by the framework itself")
        return found

    def machine_faults(self) -> list[str]:
        """What this machine lacks; asked where the model is loaded, as a login node has no GPU."""
        found = []
        found += missing_device("model.device", self.device)
        if isinstance(self.device_map, dict):
            for device in gpus_named(self.device_map):
                found += missing_device("model.device_map", device)
        if self.device_map is not None and importlib.util.find_spec("accelerate") is None:
            found.append(
                f"model.device_map={self.device_map}: accelerate is not installed; "
                "`pip install 'crl-exp[device_map]'`, or set model.device_map=null"
            )
        if self.quantization and importlib.util.find_spec("bitsandbytes") is None:
            found.append(
                f"model.quantization={self.quantization}: bitsandbytes is not installed; "
                "`pip install 'crl-exp[quantization]'`, or set model.quantization=null"
            )
        return found

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    def quantization_config(self) -> Any:
        """transformers' own config of the quantisation, or None."""
        if self.quantization is None:
            return None
        from transformers import BitsAndBytesConfig

        if self.quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=self.torch_dtype,
        )

    def read_config(self) -> Any:
        """The architecture's config, without weights. Raises `UserError` naming the mend."""
        from transformers import AutoConfig

        path = self.local_path()
        try:
            config = AutoConfig.from_pretrained(
                path, revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(cannot_load(self, path, error)) from error
        if pickled := pickled_only(path):
            raise UserError(f"model.path={self.path}: {pickled}")
        text = config.get_text_config()
        if self.attn_implementation == "sdpa" and getattr(text, "attn_logit_softcapping", None):
            raise UserError(
                f"model.attn_implementation=sdpa: {self.name} caps its attention scores, which "
                "sdpa can't; set model.attn_implementation=eager"
            )
        return config


def pickled_only(path: str) -> str | None:
    """What is wrong with a folder whose weights are pickled only, and how to convert them."""
    folder = Path(path).expanduser()
    if any(folder.glob("*.safetensors")) or not any((folder / n).is_file() for n in PICKLED):
        return None
    convert = (
        "from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained({path!r}, use_safetensors=False).save_pretrained({path!r})"
    )
    return (
        "its weights are in pytorch_model.bin only, a pickle, which may run code when it is read "
        "and is never loaded here. If you trust where it comes from, convert it once: "
        f'python -c "{convert}"'
    )


def cannot_load(config: ModelConfig, path: str, error: Exception) -> str:
    """The message for a model that can't be had, its id and the way without the hub named."""
    said = str(error).strip()
    if (Path(path) / "config.json").is_file() and (pickled := pickled_only(path)):
        return f"model.path={config.path}: {pickled}"
    if any(name in said for name in PICKLED) and "safetensors" in said:
        said = (
            f"its weights are not in safetensors: convert {path} at "
            "https://huggingface.co/spaces/safetensors/convert and set model.revision=refs/pr/N, "
            "the number that it tells"
        )
    why = own_code(error) or hub_trouble(error, path)
    why = why or (said.splitlines()[0] if said else repr(error))
    return f"model.path={config.path}: can't load a language model from {path!r} ({why}). {OFFLINE}"
