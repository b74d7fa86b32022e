"""What a policy chose in a rollout, as the journal records it.

Shapes: N steered tokens, D d_model, F d_sae, C features that may be steered, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crl_exp.generation.controller import Action
from crl_exp.generation.results import Generation
from crl_exp.steering.policy.agent import LayerAgent

# Where activations have to be computed for it alone, at no more tokens than these.
ENCODED_TOKENS = 128


@torch.no_grad()
def watch_choices(agent: LayerAgent, played: Generation) -> dict[str, float]:
    """Of one layer's steered tokens:

    unique_features: different features chosen. mean_coefficient: that they were added with.
    unsteered_tokens: share at which none could be chosen. left_alone: with the null action, the
    share at which it was chosen before any feature. top_correlation: the highest of the
    chosen features' correlations with the reward (the score, where `warmup.score` is another).
    mean_activation: mean SAE activation of the chosen features before anything was added.
    """
    acts = [s.living().action for s in played.steps if s.layer == agent.layer]
    chosen_NK = torch.cat([act.feature_idx_BK for act in acts])
    strength_NK = torch.cat([act.coefficient_BK for act in acts])
    choice_NK = torch.cat([act.notes["choice_BK"] for act in acts])
    place_NK = agent.actions.place(choice_NK)
    real_NK = chosen_NK >= 0
    found = {
        "unique_features": float(chosen_NK[real_NK].unique().numel()),
        "mean_coefficient": 0.0,
        "unsteered_tokens": float((~real_NK).float().mean()),
        "top_correlation": 0.0,
        "mean_activation": 0.0,
    }
    if agent.actions.null:
        null_NK = agent.actions.is_null(choice_NK)
        possible_NK = real_NK | null_NK.any(dim=1, keepdim=True)  # behind it none is wanted
        found["unsteered_tokens"] = float((~possible_NK).float().mean())
        found["left_alone"] = float(null_NK[:, 0].float().mean())
    if real_NK.any():
        found["mean_coefficient"] = float(strength_NK[real_NK].mean())
        found["top_correlation"] = float(agent.correlation_C[place_NK[real_NK]].max())
        found["mean_activation"] = _mean_activation(agent, acts, place_NK)
    return found


def _mean_activation(agent: LayerAgent, acts: list[Action], place_NK: Tensor) -> float:
    """From the activations that the rollout recorded, or else of evenly spaced tokens.

    place_NK: of the features chosen among those allowed, -1 where there is none.
    """
    notes = [act.notes for act in acts]
    if "feature_acts_BC" in notes[0]:
        acts_NC = torch.cat([one["feature_acts_BC"] for one in notes])
    else:
        obs_ND = torch.cat([one["obs_BD"] for one in notes])
        every = -(-len(obs_ND) // ENCODED_TOKENS)
        place_NK, obs_ND = place_NK[::every], obs_ND[::every]
        x_ND = obs_ND * agent.std_D + agent.mean_D
        acts_NC = agent.sae[0].encode(x_ND)[:, agent.allowed_C]
    picked_NK = acts_NC.gather(1, place_NK.clamp(min=0))[place_NK >= 0]
    return float(picked_NK.mean()) if len(picked_NK) else 0.0
