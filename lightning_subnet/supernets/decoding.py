# SPDX-License-Identifier: Apache-2.0
"""Decoding token by token: greedily, by sampling, by beam search; and as a network to be timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_subnet._checks import checked_int
from lightning_subnet._torch.names import class_name
from lightning_subnet.elasticity.protocol import SubnetMixin
from lightning_subnet.errors import ElasticityError
from lightning_subnet.space.space import SearchSpace
from lightning_subnet.space.subnet import Subnet

Step = Callable[[torch.Tensor], torch.Tensor]
Pick = Callable[[torch.Tensor], torch.Tensor]


def decode(
    step: Step,
    first: torch.Tensor,
    n_steps: int,
    *,
    pick: Pick | None = None,
    stop: int | None = None,
    pad: int = 0,
) -> torch.Tensor:
    """Return the tokens that a network adds to `first`, one per step.

    Args:
        step: Called with the tokens that are new, (n, t), `first` to begin with; returns the logits
            (n, vocabulary) of the token behind the last. It remembers earlier tokens.
        first: The tokens to begin with, (n, t).
        n_steps: The most tokens to add.
        pick: Called with the logits, returns a token for each row (n,); by default the likeliest.
        stop: The token that ends a sequence. None: none does, and `n_steps` tokens are added.
        pad: The token behind the end of a sequence.

    Returns:
        The new tokens (n, n_steps), fewer if all sequences have ended.

    Raises:
        ElasticityError: `n_steps` is not a whole number from 1.

    Example:
        >>> counting = lambda new: nn.functional.one_hot(new[:, -1] + 1, 9).float()
        >>> decode(counting, torch.tensor([[1], [3]]), 6, stop=5)
        tensor([[2, 3, 4, 5],
                [4, 5, 0, 0]])
    """
    n_steps = _checked_steps(n_steps)
    pick = pick or likeliest
    new, tokens = first, []
    ended = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for _ in range(n_steps):
        token = pick(step(new)).masked_fill(ended, pad)
        tokens.append(token)
        if stop is not None:
            ended = ended | (token == stop)
            if bool(ended.all()):
                break
        new = token[:, None]
    return torch.stack(tokens, 1)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row."""
    return logits.argmax(-1)


def sampler(temperature: float, generator: torch.Generator | None = None) -> Pick:
    """Return a function that draws a token by its probability.

    Args:
        temperature: Divides the logits; 0 takes the likeliest.
        generator: Where the randomness comes from; None: torch's own.

    Raises:
        ElasticityError: The temperature is negative or not finite.
    """
    if not 0 <= temperature < math.inf:
        msg = (
            f"temperature={temperature!r} must be finite and at least 0, which takes the likeliest."
        )
        raise ElasticityError(msg)
    if temperature == 0:
        return likeliest

    def draw(logits: torch.Tensor) -> torch.Tensor:
        shares = (logits / temperature).softmax(-1)
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    return draw


def beam_search(  # noqa: PLR0913 - the network is three of them, the search four
    step: Step,
    reorder: Callable[[torch.Tensor], None],
    first: torch.Tensor,
    n_steps: int,
    *,
    beam: int,
    stop: int,
    pad: int = 0,
    length_penalty: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best sequence of each row that a beam search finds, and its score.

    A score is the sum of the log probabilities of a sequence's tokens, its end included, divided by
    length ** length_penalty. In each step the `beam` best sequences of a row go on, those that have
    ended among them; with a beam as wide as there are sequences the search is exhaustive.

    Args:
        step: As in `decode`; is called with (n * beam, t) tokens, the beam of a row in a block.
        reorder: Called with rows (n * beam,), the order that the memory of `step` is to have.
        first: The tokens to begin with, (n, t).
        n_steps: The most tokens; a sequence that has no end by then counts as it is.
        beam: How many sequences go on.
        stop: The token that ends a sequence.
        pad: The token behind the end.
        length_penalty: 0 compares sums, 1 means per token.

    Returns:
        Tokens (n, at most n_steps) and scores (n,).

    Raises:
        ElasticityError: `n_steps` or `beam` is not a whole number from 1.

    References:
        Wu et al., Google's Neural Machine Translation System, 2016, section 7 (normalised scores).
    """
    n_steps = _checked_steps(n_steps)
    hint = "A beam of 1 is greedy decoding."
    beam = checked_int(beam, "beam", error=ElasticityError, hint=hint)
    n, device = len(first), first.device
    new = first.repeat_interleave(beam, 0)
    tokens = torch.zeros(n, beam, 0, dtype=first.dtype, device=device)
    sums = torch.full((n, beam), -math.inf, device=device)
    sums[:, 0] = 0.0  # at first all of a beam are the same sequence
    lengths = torch.zeros(n, beam, device=device)
    ended = torch.zeros(n, beam, dtype=torch.bool, device=device)
    base = torch.arange(n, device=device)[:, None] * beam
    for _ in range(n_steps):
        more = step(new).log_softmax(-1).unflatten(0, (n, beam))  # type: ignore[no-untyped-call] # torch's
        vocabulary = more.shape[-1]
        more = more.masked_fill(ended[..., None], -math.inf)
        more[..., pad] = more[..., pad].masked_fill(ended, 0.0)  # one way to go on: as it is
        total = (sums[..., None] + more).to(sums.dtype)
        longer = lengths + (~ended).to(lengths)
        scores = total / longer[..., None] ** length_penalty
        best = scores.flatten(1).topk(beam).indices
        origin, token = best // vocabulary, best % vocabulary
        sums = total.flatten(1).gather(1, best)
        lengths = longer.gather(1, origin)
        ended = ended.gather(1, origin) | (token == stop)
        before = tokens.gather(1, origin[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([before, token[..., None].to(tokens)], 2)
        if bool(ended.all()):
            break
        reorder((base + origin).flatten())
        new = token.reshape(-1, 1)
    scores = sums / lengths**length_penalty
    score, at = scores.max(1)
    longest = int(lengths.gather(1, at[:, None]).max())
    return tokens[torch.arange(n, device=device), at, :longest], score


class Decoding(nn.Module):
    """A network as it is used: it reads its input once, then decodes one token per step.

    Its forward pass is the whole of that, so it can be timed and counted like any other.

    Args:
        net: A plain network with `generate`: of `ElasticTransformer` or `ElasticGPT`.
        n_steps: Tokens to decode; no token ends it earlier.

    Raises:
        ElasticityError: `n_steps` is not a whole number from 1, or the network does not decode.
    """

    def __init__(self, net: nn.Module, n_steps: int) -> None:
        super().__init__()
        n_steps = _checked_steps(n_steps)
        if not callable(getattr(net, "generate", None)):
            msg = (
                f"{class_name(net)} has no generate(tokens, n_steps, stop=False). "
                "Decode an ElasticTransformer or an ElasticGPT, or give the network that method."
            )
            raise ElasticityError(msg)
        self.net, self.n_steps = net, n_steps

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (n, n_steps) tokens that follow from tokens (n, length)."""
        net: Any = self.net
        following: torch.Tensor = net.generate(tokens, self.n_steps, stop=False)
        return following


class ElasticDecoding(SubnetMixin, Decoding):
    """A super-network as it is used, for `Latency`: encoder and then n decoder steps, as HAT times.

    The network is the same object; only its forward pass is another. Bind a latency to it and give
    the bound measure to the search.

    Args:
        net: The super-network.
        n_steps: Tokens to decode.

    Example:
        >>> from lightning_subnet import Latency
        >>> from lightning_subnet.supernets import ElasticTransformer
        >>> net, source = ElasticTransformer.tiny(), torch.ones(1, 6, dtype=torch.long)
        >>> latency = Latency(seconds=0).bind(ElasticDecoding(net, n_steps=4), source)
        >>> space = net.search_space()
        >>> (small, _), (large, _) = latency([space.smallest, space.largest])
        >>> 0 < small < large
        True

    References:
        Wang et al., HAT, ACL 2020, section 2.2: encoder latency plus decoder latency of 30 tokens.
    """

    net: Any

    def search_space(self) -> SearchSpace:
        """Return the space of the network."""
        space: SearchSpace = self.net.search_space()
        return space

    def activate(self, subnet: Subnet) -> None:
        """Put a subnet in force."""
        self.net.activate(subnet)

    @property
    def active_subnet(self) -> Subnet | None:
        """The subnet in force in the network."""
        subnet: Subnet | None = self.net.active_subnet
        return subnet

    def extract(self, subnet: Subnet) -> Decoding:
        """Return a subnet that decodes, as an ordinary network."""
        return Decoding(self.net.extract(subnet), self.n_steps)


def _checked_steps(n_steps: object) -> int:
    hint = "It is a number of tokens."
    return checked_int(n_steps, "n_steps", error=ElasticityError, hint=hint)
