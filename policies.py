"""A language model as PPO sees it: next-token logits and a value for every state, and a cache.

In reading order
    1. position_ids, known_inputs,  what a forward is given
       cache_name
    2. Head                         the output embedding, computed in float32 in every dtype
    3. Policy                       a causal LM with a value head, and a mask of ids without token
    4. cached_decoder               the forward of the sampler, token by token
    5. has_logprobs                 whether a policy that was received can be a reference at all

support/fast.py has a faster form of Policy for GPT-NeoX, with the same results to rounding.

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), L positions,
n of them kept, D hidden size, V vocabulary.
State t is the prompt and the response before token t: its logits and its value come from sequence
position Q-1+t.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn


def position_ids(mask: Tensor) -> Tensor:
    """[B, L] attention mask -> [B, L] positions of real tokens: left padding shifts nothing."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def known_inputs(model: nn.Module, **inputs) -> dict:
    """The inputs without those that the model's forward does not take.

    A few families find positions in the attention mask by themselves and take no position_ids
    (Bloom, MPT); a few make the logits of all positions and take no logits_to_keep.
    """
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def cache_name(model: nn.Module) -> str:
    """What the model's forward calls its key/value cache, as an input and in its output: `cache`
    from transformers 5.24 on."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


class Head(nn.Linear):
    """The output embedding of a policy: hidden [..., D] -> logits [..., V], in float32 always.

    Logits may all carry one large number, near 1,070 in Pythia-70M. It cancels in the softmax, but
    bfloat16 has steps of 8 there: no two logits could be told apart. (support/load.py removes the
    number where it can, which is not from an embedding that is tied to the input's.)
    """

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)


class Policy(nn.Module):
    """A causal LM with a value head, whose logits are -inf at ids that are no token.

    Pythia's embedding has 50,304 rows and its tokenizer some 50,277 entries: the policy masks the
    rest, and the pad id, itself, so that the sampler and every log-prob agree without knowing of
    it.

    model: a Hugging Face causal LM with float32 weights, whose output embedding becomes a Head;
    forbidden [V]: bool, True at ids without a token and at the pad id, if that is not EOS;
    dtype: of the matrix products of every forward but the last. The weights, their gradients, the
    logits, the softmax over the vocabulary and the values are float32, so that with bfloat16 the
    small steps of Adam do not round to nothing.

    The value head reads what the output embedding reads, whatever a model calls it; its size D is
    the output embedding's, which is not always config.hidden_size (OPT-350m).
    """

    def __init__(self, model: nn.Module, forbidden: Tensor, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.eval()  # dropout off, always: two forwards must be equal
        self.dtype = dtype
        if type(self.head) is nn.Linear:
            self.head.__class__ = Head  # the same module and the same weights, tied or not
        self.value_head = nn.Linear(self.head.weight.shape[1], 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.value_head.to(model.device)
        self.register_buffer("forbidden", forbidden.to(model.device), persistent=False)
        forbidden_ids = self.forbidden.nonzero().flatten()
        self.register_buffer("forbidden_ids", forbidden_ids, persistent=False)

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        return self.model.get_output_embeddings()

    def precision(self) -> torch.autocast:
        """Autocast to self.dtype. It keeps each weight that it has cast until it is closed."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.forbidden.device.type, self.dtype, enabled=enabled)

    def masked(self, logits: Tensor) -> Tensor:
        """logits [..., V], set to -inf at the forbidden ids: in place and unseen by autograd.

        A softmax gives -inf the gradient 0 anyway.
        """
        logits.detach().index_fill_(-1, self.forbidden_ids, -torch.inf)
        return logits

    def forward(self, **inputs):
        """The model's own forward (same keywords, same output object), forbidden ids masked."""
        with self.precision():
            output = self.model(**inputs)
        output.logits = self.masked(output.logits)
        return output

    def read(self, ids: Tensor, mask: Tensor, kept: slice) -> tuple[Tensor, Tensor]:
        """ids, mask [B, L] -> (hidden states [B, n, D], logits [B, n, V]) at n positions `kept`.

        By the model's own forward, so that what a family does to its logits (Gemma 2 caps them,
        Cohere and Granite scale them) is done here too. A hook sees the states that the head reads.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)[kept]
        inputs = known_inputs(
            self.model, input_ids=ids, attention_mask=mask, position_ids=position_ids(mask),
            use_cache=False, logits_to_keep=positions)
        seen: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            logits = self.model(**inputs).logits
        finally:
            hook.remove()
        if "logits_to_keep" in inputs:
            return seen[0], logits
        return seen[0][:, kept], logits[:, kept]

    def response_forward(
        self, ids: Tensor, mask: Tensor, prompt_length: int
    ) -> tuple[Tensor, Tensor]:
        """The training forward: ids, mask [B, Q+T] -> (logits [B, T, V] float32, values [B, T]).

        Position Q-1 predicts the first response token, and what the last position predicts is not
        read.
        """
        with self.precision():
            hidden, logits = self.read(ids, mask, slice(prompt_length - 1, -1))
        values = self.value_head(hidden.float()).squeeze(-1)
        return self.masked(logits.float()), values

    def decoder(self, prompt_mask: Tensor, max_new_tokens: int) -> Callable[[Tensor], Tensor]:
        """The forward of the sampler for prompts [B, Q]: see `cached_decoder`.

        max_new_tokens is for faster forms (support/fast.py).
        """
        return cached_decoder(self, prompt_mask)


def cached_decoder(model: nn.Module, prompt_mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Make step(tokens [B, L]) -> logits [B, V] of the next token, with a key/value cache inside.

    model: a Policy or any Hugging Face causal LM; prompt_mask [B, Q]. The first call of step takes
    the prompt (L = Q), each later one the token drawn last (L = 1).
    """
    attention, positions, cache = prompt_mask, position_ids(prompt_mask), None
    inner = model.model if isinstance(model, Policy) else model
    name = cache_name(inner)

    def step(tokens: Tensor) -> Tensor:
        nonlocal attention, positions, cache
        if cache is not None:
            positions = positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(len(tokens), 1)], dim=1)
        output = model(**known_inputs(
            inner, input_ids=tokens, attention_mask=attention, position_ids=positions,
            use_cache=True, logits_to_keep=1, **{name: cache}))
        cache = getattr(output, name)
        return output.logits[:, -1]

    return step


MAX_NATS = 1e4  # a KL per token, or a log-prob below minus this, would drown every gradient


@torch.no_grad()
def has_logprobs(policy: Policy, ids: Tensor, mask: Tensor) -> bool:
    """Whether a policy's log-probs behind all tokens of ids, mask [B, L], are fit for a KL."""
    inputs = known_inputs(policy.model, input_ids=ids, attention_mask=mask,
                          position_ids=position_ids(mask))
    logprobs = policy(**inputs).logits.float().log_softmax(-1)  # [B, L, V]
    return bool((logprobs[mask.bool()][:, ~policy.forbidden] > -MAX_NATS).all())  # NaN is not
