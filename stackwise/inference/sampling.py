"""Text from racks: unmasking for diffusion models, left to right for causal ones."""

import torch
from torch import Tensor

from stackwise.model.rack import Rack


@torch.inference_mode()
def sample_diffusion(
    rack: Rack, *, n: int, seq: int, steps: int, temperature: float, mask_id: int, generator: torch.Generator
) -> Tensor:
    """The ancestral sampler of mask-diffusion (Sahoo et al. 2024, algorithm 2; linear schedule).

    From a fully masked sample the time runs from 1 to 0 in equal steps; in a step from t to s every masked token is
    revealed with probability (t - s) / t, drawn from the model's prediction. Where depth is time (`RackShape.entries`)
    a sample enters ever higher as its masks become fewer, and passes by the stacks that have learned more noise.

    Returns:
        Token ids `[n, seq]` int64 on the CPU.
    """
    device = rack.embeddings.mask.device
    tokens = torch.full((n, seq), mask_id, device=device)
    for step in range(steps):
        revealed = torch.rand((n, seq), generator=generator).to(device) < 1 / (steps - step)
        t = 1 - step / steps
        logits = rack.head(rack(tokens, times=torch.full((n,), t, device=device), entry=rack.shape.entry(t)))
        tokens = torch.where((tokens == mask_id) & revealed, _draw(logits, temperature, generator), tokens)
    return tokens.cpu()


@torch.inference_mode()
def sample_causal(
    rack: Rack, *, n: int, seq: int, temperature: float, first: int, generator: torch.Generator
) -> Tensor:
    """Token by token from left to right, after the token `first`, which is not returned.

    Returns:
        Token ids `[n, seq - 1]` int64 on the CPU.
    """
    tokens = torch.full((n, 1), first, device=rack.embeddings.mask.device)
    cache = rack.new_cache(n, seq)
    while tokens.shape[1] < seq:
        following = _draw(rack.head(rack(tokens[:, -1:], causal=True, cache=cache)), temperature, generator)
        tokens = torch.cat((tokens, following), dim=1)
    return tokens[:, 1:].cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Token ids `[n, seq]` from logits `[n, seq, vocab]`."""
    probabilities = (logits.float() / temperature).softmax(-1).cpu()
    drawn = torch.multinomial(probabilities.reshape(-1, probabilities.shape[-1]), 1, generator=generator)
    return drawn.reshape(logits.shape[:2]).to(logits.device)
