"""A language model as PPO sees it: next-token logits and a value for every state, and a cache.

In reading order
    1. position_ids, known_inputs,  what a forward is given
       cache_name
    2. Head                         the output embedding, computed in float32 in every dtype
    3. layers_of, twin, read_once   the last layers alone learn, and what does not learn is shared
    4. Policy                       a causal LM with a value head, and a mask of ids without token
    5. cached_decoder               the forward of the sampler, token by token
    6. has_logprobs                 whether a policy that was received can be a reference at all

support/fast.py has a faster form of Policy for GPT-NeoX, with the same results to rounding.

Dimension key: B rows, Q prompt tokens (left-padded), T response tokens (right-padded), L positions,
n of them kept, D hidden size, V vocabulary.
State t is the prompt and the response before token t: its logits and its value come from sequence
position Q-1+t.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator

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
        # As a matrix: with frozen weights torch multiplies a slice of positions as a batch,
        # [b, T, D], and on some processors copies the whole embedding for every row of it.
        rows = hidden.float().reshape(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(rows, self.weight, self.bias)
        return logits.view(*hidden.shape[:-1], len(self.weight))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal LM or its trunk, first to last; of what reads images too, those of the
    text. Raises ValueError."""
    number = model.config.get_text_config().num_hidden_layers
    for name, module in (*model.get_decoder().named_modules(), *model.named_modules()):
        inside = any(part.isdecimal() for part in name.split("."))  # a list within a layer
        if isinstance(module, nn.ModuleList) and len(module) == number and not inside:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {number} layers")


def twin(model: nn.Module, learning: int) -> nn.Module:
    """A copy whose last `learning` layers learn; all of it if 0.

    What does not learn is not copied: the first layers (the same modules) and all parameters
    outside of the layers (embeddings, the last norm) are the original's own, which from now on do
    not learn there either. So many policies need little more memory than one, and `read_once` can
    read the layers that they have in common for all of them.
    """
    if not learning:
        return copy.deepcopy(model).requires_grad_(True)
    first, last = layers_of(model)[:-learning], layers_of(model)[-learning:]
    learn = {id(parameter) for parameter in last.parameters()}
    shared = [*first, *(one for one in model.parameters() if id(one) not in learn)]
    # deepcopy's memo: an object listed there counts as copied, so both models hold it.
    made = copy.deepcopy(model, {id(one): one for one in shared}).requires_grad_(False)
    layers_of(made)[-learning:].requires_grad_(True)
    return made


@contextlib.contextmanager
def read_once(layers: list[nn.Module], known: Tensor | None = None) -> Iterator[list]:
    """Inside the block, the first `layers`, which several policies share, compute once.

    The first forward runs them and keeps what the last of them returns. In each later forward all
    of them return that at once, unread, so that the policy's own layers go on from there. All
    forwards must be of the same tokens and mask; nothing checks it. known [B, L, D]: what was kept
    of these tokens by an earlier block. Yields the list in which it is kept: one tensor [B, L, D]
    in most families, a tuple in some; nothing without layers, or in the fast form of GPT-NeoX,
    which calls no layer as a whole.
    """
    made = [] if known is None else [known]
    before = [vars(layer).get("forward") for layer in layers]

    def wrapped(layer: nn.Module) -> Callable:
        forward = layer.forward

        def read(*args, **kwargs):
            if made:
                return made[0]
            states = forward(*args, **kwargs)
            if layer is layers[-1]:
                made.append(states)
            return states
        return read

    try:
        for layer in layers:
            layer.forward = wrapped(layer)
        yield made
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)  # the class's own again, or
            if forward is not None:
                layer.forward = forward


class Policy(nn.Module):
    """A causal LM with a value head, whose logits are -inf at ids that are no token.

    Pythia's embedding has 50,304 rows and its tokenizer some 50,277 entries: the policy masks the
    rest, and the pad id, itself, so that the sampler and every log-prob agree without knowing of
    it.

    model: a Hugging Face causal LM with float32 weights, whose output embedding becomes a Head;
    forbidden [V]: bool, True at ids without a token and at the pad id, if that is not EOS;
    dtype: of all matrix products but the output embedding's, which is a Head. The weights, their
    gradients, the logits, the softmax over the vocabulary and the values are float32, so that with
    bfloat16 the small steps of Adam do not round to nothing;
    learning: how many of the model's last layers learn, 0: all of it. Nothing is frozen here: the
    model is one that `twin` made, or the original of twins.

    The value head reads what the output embedding reads, whatever a model calls it; its size D is
    the output embedding's, which is not always config.hidden_size (OPT-350m).
    """

    def __init__(self, model: nn.Module, forbidden: Tensor, dtype: torch.dtype = torch.float32,
                 learning: int = 0):
        super().__init__()
        self.model = model.eval()  # dropout off, always: two forwards must be equal
        self.dtype, self.learning = dtype, learning
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

    @property
    def still_layers(self) -> list[nn.Module]:
        """The layers that do not learn, which all policies of one initial model share."""
        return list(layers_of(self.model)[:-self.learning]) if self.learning else []

    def weights(self) -> dict[str, Tensor]:
        """The weights of the model that learn, by name: what is sent, averaged and saved (not the
        value head, which stays local). Not copied."""
        weights = self.model.state_dict()
        if not self.learning:
            return weights
        layers = layers_of(self.model)
        home, = (name for name, module in self.model.named_modules() if module is layers)
        number = len(layers)
        last = tuple(f"{home}.{n}." for n in range(number - self.learning, number))
        return {name: tensor for name, tensor in weights.items() if name.startswith(last)}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy `weights` into the model: those of a policy of which as much learns."""
        if weights.keys() != self.weights().keys():
            raise ValueError("the weights are not those that learn here")
        self.model.load_state_dict(weights, strict=not self.learning)

    def precision(self) -> torch.autocast:
        """Autocast to self.dtype. It keeps each learning weight that it has cast until it is
        closed."""
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
    for part, valid in zip(ids.split(8), mask.split(8), strict=True):  # [B, L, V] would be large
        inputs = known_inputs(policy.model, input_ids=part, attention_mask=valid,
                              position_ids=position_ids(valid))
        logprobs = policy(**inputs).logits.float().log_softmax(-1)  # [b, L, V]
        if not (logprobs[valid.bool()][:, ~policy.forbidden] > -MAX_NATS).all():  # NaN is not
            return False
    return True
