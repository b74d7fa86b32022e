"""What the bench measures on: a model, an SAE at every layer, prompts, and policies.

SAEs and statistics are random: how long steering takes doesn't depend on what they hold.
Shapes: D d_model, F d_sae, C features that may be steered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from crl_exp.config.paths import REPO
from crl_exp.experiments.config import Experiment, experiment
from crl_exp.experiments.config import build as build_section
from crl_exp.generation.controller import Controller
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.launcher.command_line import register
from crl_exp.models.language_model import LanguageModel, load_model
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.policy.agent import AgentSetting, LayerAgent
from crl_exp.steering.stages.base import Pipeline, Stage
from crl_exp.tasks.base import Item

SUBJECTS = ("smollm2", "gemma", "tiny")
OVERRIDES = {"smollm2": [], "gemma": [], "tiny": ["+debug=tiny"]}
D_SAE = {"smollm2": 4096, "gemma": 16_384, "tiny": 64}
GEMMA_PROMPT = 150
"""Tokens of the random prompts of the model that has no tokenizer."""
SCALE = 20
OFF = ["tracking=none", "algorithm.validate_every=0"]


class Subject:
    """Everything is made when it is first asked for. name: one of `SUBJECTS`. scale: whole runs are
    this many times smaller than those of the goals, in prompts and updates alike."""

    def __init__(self, name: str, scale: int = SCALE):
        self.name, self.scale = name, scale
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Prompts and new tokens of the decoding rows.
        self.n_prompts, self.new_tokens = (64, 64) if name == "gemma" else (16, 16)
        self.long_tokens = 32

    def config(self, *overrides: str) -> DictConfig:
        """The default experiment on this model."""
        register()
        with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
            here = [*OVERRIDES[self.name], *OFF, f"model.device={self.device.type}"]
            return compose("config", overrides=[*here, *overrides])

    @cached_property
    def exp(self) -> Experiment:
        return experiment(self.config())

    @cached_property
    def lm(self) -> LanguageModel:
        return gemma_shaped(self.device) if self.name == "gemma" else load_model(self.exp.model)

    @cached_property
    def engine(self) -> Engine:
        return Engine(
            self.lm, EngineConfig(batch_size=128, keep_gib=self.exp.engine.keep_gib, decode="eager")
        )

    @cached_property
    def saes(self) -> dict[int, LayerSAE]:
        """A random JumpReLU SAE at each layer's output."""
        return {
            layer: LayerSAE(
                layer, f"blocks.{layer}.hook_resid_post",
                random_sae(layer, self.lm.d_model, D_SAE[self.name], self.lm.name).to(self.device),
            )
            for layer in range(self.lm.n_layers)
        }  # fmt: skip

    @cached_property
    def sae_folder(self) -> Path:
        """The SAEs on disk, for whole runs."""
        if self.name == "tiny":
            from crl_exp.models.tiny import tiny_saes

            return tiny_saes("llama")
        self._kept = tempfile.TemporaryDirectory()
        for layer, sae in self.saes.items():
            sae.sae.save_model(Path(self._kept.name) / sae.hook_name)  # type: ignore[operator]
            assert layer == sae.layer
        return Path(self._kept.name)

    @property
    def layer(self) -> int:
        return self.lm.n_layers // 2

    @cached_property
    def items(self) -> list[Item]:
        """The task's training items."""
        return list(self.exp.task.splits().train)

    def prompts(self, n: int) -> list[list[int]]:
        """Token ids of the task's prompts, or random ones where there is no tokenizer."""
        if self.name == "gemma":
            draw = torch.Generator().manual_seed(0)
            return torch.randint(10, 1000, (n, GEMMA_PROMPT), generator=draw).tolist()
        chat = self.exp.task.chat_template
        texts = [self.items[i % len(self.items)].user for i in range(n)]
        return [self.lm.prompt_ids(text, chat) for text in texts]

    @cached_property
    def choices(self) -> list[int]:
        asked = self.exp.task.constrained_to
        return [20, 21] if self.name == "gemma" or asked is None else self.lm.choice_ids(asked)

    def fixed(self, layers: list[int]) -> Controller:
        """One feature at each of these layers, so weak that the answers hardly change."""
        steers = [Steer(layer, 0, 1e-3) for layer in layers]
        return FixedFeatures(steers, self.saes, self.exp.decay)

    def agent(self, mask: str) -> LayerAgent:
        """The default policy at the middle layer, half of the features allowed."""
        stages: dict[str, Any] = dict(self.exp.stages)
        stages["mask"] = build_section(self.config(f"mask={mask}").mask, "mask", Stage)
        sae = self.saes[self.layer]
        exp, statistics = self.exp, random_statistics(self.layer, self.lm.d_model, sae.d_sae)
        allowed_C = torch.arange(0, sae.d_sae, 2)
        setting = AgentSetting(exp.policy, exp.warmup, self.long_tokens, True, False)
        return LayerAgent(
            sae, statistics, allowed_C, torch.full((sae.d_sae,), 1e-3),
            Pipeline(stages, exp.order), setting,
        )  # fmt: skip

    def policy(self, mask: str, explore: bool = False, seed: int = 0) -> PolicyController:
        return self.acting(self.agent(mask), explore, seed)

    def acting(self, agent: LayerAgent, explore: bool = False, seed: int = 0) -> PolicyController:
        draw = torch.Generator(self.device).manual_seed(seed) if explore else None
        return PolicyController({self.layer: agent}, self.exp.decay, draw)


@contextmanager
def never_ending(subject: Subject) -> Iterator[None]:
    """No token ends an answer, so that all are equally long."""
    lm = subject.lm
    kept = lm.model.generation_config.eos_token_id, lm.tokenizer.eos_token_id  # type: ignore[union-attr]
    lm.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    lm.tokenizer.eos_token_id = None
    try:
        yield
    finally:
        lm.model.generation_config.eos_token_id, lm.tokenizer.eos_token_id = kept  # type: ignore[union-attr]


def gemma_shaped(device: torch.device) -> LanguageModel:
    """A random model of Gemma-2-2B's shape in bfloat16: no weights need be at hand."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=4096,
        query_pre_attn_scalar=256, max_position_embeddings=8192, dtype=torch.bfloat16,
        eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model: Any = Gemma2ForCausalLM(config)
    model = model.to(torch.bfloat16)
    return LanguageModel(model, NoTokenizer(), "gemma-2-2b-shaped")


class NoTokenizer:
    """Stands where answers are turned into text; there is no text."""

    eos_token_id = None

    def batch_decode(self, tokens: list[list[int]], **_: Any) -> list[str]:
        return [""] * len(tokens)


def random_sae(layer: int, d_in: int, d_sae: int, model_name: str) -> torch.nn.Module:
    """Unit directions, the encoder's those of the decoder."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    draw = torch.Generator().manual_seed(layer)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=draw), dim=1)
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_post", model_name=model_name)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, metadata=metadata))
    sae.load_state_dict(
        {
            "W_dec": W_dec_FD, "W_enc": W_dec_FD.T.contiguous(), "b_enc": torch.zeros(d_sae),
            "b_dec": torch.zeros(d_in), "threshold": torch.full((d_sae,), 0.05),
        }
    )  # fmt: skip
    return sae.requires_grad_(False)


def random_statistics(layer: int, d_model: int, d_sae: int) -> LayerStatistics:
    """As if a hundred answers had been looked at."""
    draw = torch.Generator().manual_seed(layer)
    score_F = torch.rand(d_sae, generator=draw, dtype=torch.float64) - 0.5
    z_BF = torch.rand(10, d_sae, generator=draw)
    moments = Moments.of(z_BF, (torch.arange(10) % 2).float())
    ones_D = torch.ones(d_model, dtype=torch.float64)
    return LayerStatistics(
        layer, 100, 0.5, 1.0, 1.0, 1.0, 0 * ones_D, ones_D, moments,
        {"correlation": score_F, "score": score_F, "frequency": torch.ones(d_sae)},
    )  # fmt: skip
