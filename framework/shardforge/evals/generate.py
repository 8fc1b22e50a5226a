"""Sampling from a trained run, for spot checks: no cache, one forward pass a token."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.evals.open import Trained
from shardforge.nn.sequence import Sequence


@torch.no_grad()
def generate(
    trained: Trained, prompts: list[str], tokens: int, temperature: float, top_p: float, seed: int
) -> list[str]:
    """The continuation of each prompt, at most `tokens` long, cut at the end of the document.

    Temperature 0 takes the likeliest token. `top_p` keeps the likeliest tokens of that total probability
    (Holtzman et al. 2019, arXiv:1904.09751). The context is the recipe's seq_len.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_continue(trained, prompt, tokens, temperature, top_p, generator) for prompt in prompts]


def _continue(
    trained: Trained, prompt: str, tokens: int, temperature: float, top_p: float, generator: torch.Generator
) -> str:
    known = trained.tokenizer.encode(prompt, add_special_tokens=False).ids or [trained.eos]
    start = len(known)
    device = trained.device
    for _ in range(tokens):
        window = torch.tensor([known[-trained.recipe.train.seq_len :]], device=device)
        positions = torch.arange(window.shape[1], device=device)[None]
        rows = torch.zeros(1, dtype=torch.int64, device=device)
        seq = Sequence(positions, torch.zeros_like(positions), rows, dtype=trained.tables)
        logits = trained.model(window, seq)[0, -1].float().cpu()
        token = _draw(logits, temperature, top_p, generator)
        if token == trained.eos:
            break
        known.append(token)
    return trained.tokenizer.decode(known[start:])


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chance, token = (logits / temperature).softmax(-1).sort(descending=True)
    chance[1:] *= (chance.cumsum(-1) - chance < top_p)[1:]  # the first one always stays
    return int(token[torch.multinomial(chance, 1, generator=generator)])
