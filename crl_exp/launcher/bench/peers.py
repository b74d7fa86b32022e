"""CorrSteer as a plain loop around `model.generate`, to be measured against and to agree with.

The algorithm is the paper's (arXiv 2508.12535), in our words and with nothing of the engine's:
forward hooks see the residual at each token of an answer, encode it and keep its maximum; sums of
products are kept over answers; the feature of the highest correlation is added at every token by
another hook. Prompts are read anew for every answer.
Shapes: B rows, T tokens, D d_model, F d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crl_exp.models.architecture import find_layers
from crl_exp.models.language_model import LanguageModel
from crl_exp.saes.layer_sae import LayerSAE

Addition = dict[int, Tensor]
"""By layer, what is added to its output at every token of an answer [D]."""


@dataclass
class Chosen:
    """The best feature of a layer, its correlation with the reward, and its coefficient: the mean
    of its pooled activation over rewarded answers."""

    layer: int
    feature: int
    r: float
    coefficient: float


class Sums:
    """Streaming sums for a correlation of every feature with the reward, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.y = self.yy = 0.0
        self.x_F = self.xx_F = self.xy_F = self.rewarded_F = torch.zeros(())
        self.active_F = torch.zeros(())

    def add(self, x_BF: Tensor, reward_B: Tensor) -> None:
        x_BF, y_B = x_BF.double(), reward_B.double()
        self.n += len(y_B)
        self.y += float(y_B.sum())
        self.yy += float((y_B**2).sum())
        self.x_F = self.x_F + x_BF.sum(0)
        self.xx_F = self.xx_F + (x_BF**2).sum(0)
        self.xy_F = self.xy_F + y_B @ x_BF
        self.rewarded_F = self.rewarded_F + x_BF[y_B > 0].sum(0)
        self.active_F = self.active_F + (x_BF > 0).sum(0)

    def correlation(self) -> Tensor:
        """Pearson's r of each feature with the reward [F]; 0 where either doesn't vary."""
        covariance_F = self.n * self.xy_F - self.y * self.x_F
        spread_F = (self.n * self.xx_F - self.x_F**2) * (self.n * self.yy - self.y**2)
        return torch.where(spread_F > 1e-12, covariance_F / spread_F.clamp(min=1e-12).sqrt(), 0.0)


class HookedLoop:
    """Answers in batches by `model.generate`, `n_tokens` each, greedily and without an end."""

    def __init__(
        self, lm: LanguageModel, saes: dict[int, LayerSAE], n_tokens: int, batch_size: int
    ):
        self.lm, self.saes = lm, saes
        self.n_tokens, self.batch_size = n_tokens, batch_size
        self.layers = find_layers(lm.model)

    def warm_up(
        self, prompts: Sequence[list[int]], reward: Callable[[int], float], min_frequency: float
    ) -> list[Chosen]:
        """The best feature of each layer among those active in that share of the answers."""
        sums = {layer: Sums() for layer in self.saes}
        for at in range(0, len(prompts), self.batch_size):
            batch = prompts[at : at + self.batch_size]
            with self._pooled() as pooled:
                self._generate(batch)
            reward_B = torch.tensor([reward(at + i) for i in range(len(batch))])
            for layer, x_BF in pooled.items():
                sums[layer].add(x_BF.cpu(), reward_B)
        return [self._best(layer, found, min_frequency) for layer, found in sums.items()]

    def _best(self, layer: int, found: Sums, min_frequency: float) -> Chosen:
        r_F = found.correlation()
        allowed_F = found.active_F / found.n >= min_frequency
        feature = int(r_F.masked_fill(~allowed_F, -2.0).argmax())
        mean = float(found.rewarded_F[feature]) / found.y
        return Chosen(layer, feature, float(r_F[feature]), mean)

    def addition(self, chosen: Sequence[Chosen]) -> Addition:
        """What steering by these features adds at each layer."""
        return {
            one.layer: one.coefficient * self.saes[one.layer].W_dec_FD[one.feature]
            for one in chosen
        }

    def answer(self, prompts: Sequence[list[int]], added: Addition) -> list[list[int]]:
        """Tokens of each answer, steered by an addition or, with none, not at all."""
        tokens: list[list[int]] = []
        for at in range(0, len(prompts), self.batch_size):
            with self._added(added):
                tokens += self._generate(prompts[at : at + self.batch_size])
        return tokens

    def _generate(self, batch: Sequence[list[int]]) -> list[list[int]]:
        device, width = self.lm.device, max(map(len, batch))
        ids_BT = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=device)
        mask_BT = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device
        )
        with torch.no_grad():
            out_BT = self.lm.model.generate(  # type: ignore[operator]
                input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=self.n_tokens,
                min_new_tokens=self.n_tokens, do_sample=False, pad_token_id=0,
            )  # fmt: skip
        return out_BT[:, width:].tolist()

    @contextmanager
    def _pooled(self) -> Iterator[dict[int, Tensor]]:
        """Filled while it generates: by layer, each feature's maximum over the answer [B, F]."""
        pooled: dict[int, Tensor] = {}

        def looks(layer: int) -> Callable[..., None]:
            def look(module: Any, inputs: Any, output: Any) -> None:
                acts_BF = self.saes[layer].encode(_hidden(output)[:, -1].float())
                before_BF = pooled.get(layer)
                pooled[layer] = acts_BF if before_BF is None else acts_BF.maximum(before_BF)

            return look

        with self._hooks({layer: looks(layer) for layer in self.saes}):
            yield pooled

    @contextmanager
    def _added(self, added: Addition) -> Iterator[None]:
        def adds(vector_D: Tensor) -> Callable[..., None]:
            def add(module: Any, inputs: Any, output: Any) -> None:
                hidden_BTD = _hidden(output)
                hidden_BTD[:, -1] += vector_D.to(hidden_BTD)

            return add

        with self._hooks({layer: adds(vector_D) for layer, vector_D in added.items()}):
            yield

    @contextmanager
    def _hooks(self, hooks: dict[int, Callable[..., None]]) -> Iterator[None]:
        handles = [self.layers[la].register_forward_hook(hook) for la, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hidden(output: Any) -> Tensor:
    """A decoder layer's output; in some architectures the first of several."""
    return output[0] if isinstance(output, tuple) else output
