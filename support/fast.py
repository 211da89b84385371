"""Faster forms of what ppo_core.py and data.py have in plain form; not needed to read those.

Each is chosen once, at the start of a run, and gives the plain form's results to rounding; the
plain form is its oracle in tests/test_fast.py. benchmarks/speed.py measures them together, beside
the plain form.

In reading order
    1. choice        policy, reward_model: the fast class for a GPT-NeoX (Pythia), else the plain
    2. GPT-NeoX      neox_states: its layers without transformers' wrappers, in fixed shapes if a
                     CUDA graph needs them; attend; for other families eager_if_short
    3. [V, D]        Embed, Project: the gradients of the two largest matrices are summed over
                     micro-batches in place, and not made anew for each
    4. CUDA graphs   GraphSampler: a sampled token is a hundred small kernels, launched all at once
    5. this machine  tuned_generate, prepare_process, give_back, and what a CPU wants

Dimension key: B rows, Q prompt tokens, T response tokens, L positions, D hidden size, V vocabulary,
E positions that are attended to, R rotated features.
"""

import contextlib
import copy
import ctypes
import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import policies
import ppo_core

# ------------------------------------------------------------------------------------------ choice


def policy(model: nn.Module, *args) -> ppo_core.Policy:
    """ppo_core.Policy's arguments -> the fastest class of policy for this model."""
    return (FastPolicy if is_neox(model.base_model) else ppo_core.Policy)(model, *args)


def reward_model(causal_lm: nn.Module, *args) -> data.RewardModel:
    """data.RewardModel's arguments -> the fastest class of reward model for this trunk."""
    return (FastRewardModel if is_neox(causal_lm.base_model) else data.RewardModel)(
        causal_lm, *args)


def is_neox(trunk: nn.Module) -> bool:
    """The trunk of a GPT-NeoX (Pythia), which `neox_states` knows."""
    return type(trunk).__name__ == "GPTNeoXModel"


class FastPolicy(ppo_core.Policy):
    """The policy of a GPT-NeoX."""

    def read(self, ids: Tensor, mask: Tensor, kept: slice) -> tuple[Tensor, Tensor]:
        trunk = self.model.base_model
        bias = causal_bias(mask, self.dtype)
        hidden = neox_states(trunk, ids, *neox_rotation(trunk, mask), bias, kept)
        if self.head.bias is not None:
            return hidden, self.head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # as policies.Head
            return hidden, Project.apply(hidden.float(), self.head.weight)

    def decoder(self, prompt_mask: Tensor, max_new_tokens: int) -> Callable[[Tensor], Tensor]:
        """policies.cached_decoder with positions, masks and a cache of fixed size made once."""
        trunk, config = self.model.base_model, self.model.config
        mask = nn.functional.pad(prompt_mask, (0, max_new_tokens), value=1)  # [B, L]
        cos, sin = neox_rotation(trunk, mask)
        bias = causal_bias(mask, self.dtype)
        positions, end = torch.arange(mask.shape[1], device=mask.device), 0
        cache = new_cache(config, bias, len(mask), mask.shape[1])

        def step(tokens: Tensor) -> Tensor:
            nonlocal end
            now, end = slice(end, end + tokens.shape[1]), end + tokens.shape[1]
            with self.precision():
                hidden = neox_states(trunk, tokens, cos[:, now], sin[:, now], bias[:, :, now, :end],
                                     slice(-1, None), cache, positions[now])
            return self.masked(self.head(hidden[:, 0]))

        return step


class FastRewardModel(data.RewardModel):
    """The reward model of a GPT-NeoX."""

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        bias = causal_bias(mask, torch.float32)
        return neox_states(self.trunk, ids, *neox_rotation(self.trunk, mask), bias, slice(None))


# ------------------------------------------------------------------------- GPT-NeoX, layer by layer


def causal_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask [B, L] -> [B, 1, L, L], added to attention scores: very low at pads and later tokens.

    The lowest finite number, because a pad may see pads only: its state is never read, but must not
    be NaN. Its type is attention's: `dtype` with CUDA, else float32, since on a CPU attention's
    gradient takes 2.5 times as long in bfloat16.
    """
    length, dtype = mask.shape[1], dtype if mask.is_cuda else torch.float32
    past = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen = past & mask[:, None, None].bool()
    bias = torch.zeros(seen.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~seen, torch.finfo(dtype).min)


def neox_rotation(trunk: nn.Module, mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [B, L] -> cos, sin [B, L, 1, 1, R]; sin has rotate_half's sign in it."""
    positions = policies.position_ids(mask)
    cos, sin = (x[:, :, None, None] for x in trunk.rotary_emb(trunk.embed_in.weight, positions))
    first, second = sin.chunk(2, -1)
    return cos, torch.cat([-first, second], -1)  # so that a roll by half is rotate_half


def new_cache(config, bias: Tensor, rows: int, length: int) -> Tensor:
    """Keys and values of all layers, [layers, 2, B, heads, L, head size], in the type of `bias`."""
    heads = config.num_attention_heads
    return bias.new_zeros(
        config.num_hidden_layers, 2, rows, heads, length, config.hidden_size // heads)


def neox_states(
    trunk: nn.Module, tokens: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, kept: slice,
    cache: Tensor | None = None, at: Tensor | None = None,
) -> Tensor:
    """tokens [B, L] -> last hidden states at the positions `kept`, [B, kept, D].

    The last layer makes no others. cos, sin [B, L, 1, 1, R] at the tokens; bias [B, 1, L, E], E
    being what they attend to. With a cache (`new_cache`), keys and values are written there at the
    positions `at` [L], and the first E are read.
    """
    heads, turned = trunk.config.num_attention_heads, cos.shape[-1]
    hidden = Embed.apply(tokens, trunk.embed_in.weight)
    for index, layer in enumerate(trunk.layers):
        attention = layer.attention
        qkv = attention.query_key_value(layer.input_layernorm(hidden)).unflatten(-1, (heads, 3, -1))
        # Split, not sliced: each slice would have a gradient of the size of all, mostly zeros.
        queries_keys, value = qkv.split([2, 1], 3)
        rotary, unrotated = queries_keys.split([turned, qkv.shape[-1] - turned], -1)
        rotary = rotary * cos + rotary.roll(turned // 2, -1) * sin
        query, key = torch.cat([rotary, unrotated], -1).permute(3, 0, 2, 1, 4)
        value = value.squeeze(3).transpose(1, 2)  # [B, heads, L, head size], as query and key
        if cache is not None:
            stored = cache[index, :, :, :, :bias.shape[-1]]
            key, value = (memory.index_copy_(2, at, new.to(memory.dtype))
                          for memory, new in zip(stored, (key, value), strict=True))
        if index == len(trunk.layers) - 1:
            query, hidden, bias = query[:, :, kept], hidden[:, kept], bias[:, :, kept]
        with torch.autocast(bias.device.type, enabled=False):
            mixed = attend(*(x.to(bias.dtype) for x in (query, key, value)), bias)
        attended = attention.dense(mixed.transpose(1, 2).flatten(2))
        source = hidden if trunk.config.use_parallel_residual else hidden + attended
        hidden = hidden + attended + layer.mlp(layer.post_attention_layernorm(source))
    return trunk.final_layer_norm(hidden)


SHORT = 128  # keys; with more the two forms of `attend` take about the same time


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention: query [B, heads, L, head size], key and value [B, heads, E, head size], bias
    [B, 1, L, E] -> [B, heads, L, head size].

    torch's fused form for a CPU works in blocks, for long sequences. Short ones take up to three
    times as long in it as two products and a softmax, but for a single query (a decoding step).
    """
    if query.device.type != "cpu" or query.shape[2] == 1 or key.shape[2] > SHORT:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # [B, heads, L, E]
    return (scores + bias).softmax(-1) @ value


def eager_if_short(model: nn.Module, length: int, dtype: torch.dtype) -> None:
    """Set a model of another family on a CPU to transformers' `eager` attention, for `attend`'s
    reason, if `length` is short.

    length: tokens of the longest text; dtype: of its products, float32 only, since in bfloat16
    `eager` rounds the attention scores too. Decoding loses by it, scoring and training gain more.
    """
    short = length <= SHORT and model.device.type == "cpu" and dtype == torch.float32
    if short and not is_neox(model.base_model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


# ---------------------------------------------------------------------------------- the two [V, D]


class Embed(torch.autograd.Function):
    """ids [B, L], weight [V, D] -> weight[ids], [B, L, D]; its gradient is added to weight.grad.

    nn.Embedding's is made anew for each micro-batch, [V, D], nearly all of it zeros, and then
    added. (So torch.autograd.grad works only as long as weight.grad is None; `backward` always
    does.)
    """

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        total = torch.zeros_like(weight) if weight.grad is None else weight.grad
        total.index_add_(0, ids.flatten(), grad.flatten(0, 1))
        return None, total if weight.grad is None else None


class Project(torch.autograd.Function):
    """hidden [B, L, D], weight [V, D] -> logits [B, L, V]; its gradient is added to weight.grad."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return nn.functional.linear(hidden, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:  # a frozen head
            return grad @ weight, None
        factors = grad.flatten(0, 1).T, hidden.flatten(0, 1)
        if weight.grad is None:
            return grad @ weight, torch.mm(*factors)
        weight.grad.addmm_(*factors)
        return grad @ weight, None


# ------------------------------------------------------------------------------------- CUDA graphs

ROUNDED = 64  # the cache's length is a multiple of it, so that few graphs serve all prompt lengths


def sampler(
    policy: ppo_core.Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, **options
) -> tuple[Callable, str]:
    """How a run on a GPU samples -> (a function like ppo_core.generate, the decision in words).

    The arguments are those of `generate`. By graphs, if they give the plain sampler's tokens. Four
    tokens are compared, and in bfloat16 one in ten may differ: there another order of additions
    makes another token now and then.
    """
    if not is_neox(policy.model.base_model):
        return ppo_core.generate, "sampling without CUDA graphs, which are for GPT-NeoX"
    fast = GraphSampler()
    try:
        one, other = (sample(policy, prompt_ids, prompt_mask, uniforms, **options)[0]
                      for sample in (ppo_core.generate, fast.by_graph))
    except RuntimeError as error:
        return ppo_core.generate, f"no CUDA graphs: {' '.join(str(error).split())[:100]}"
    one, other = (nn.functional.pad(tokens, (0, 4), value=-1)[:, :4] for tokens in (one, other))
    equal = (one == other).float().mean().item()
    if equal < (0.99 if policy.dtype == torch.float32 else 0.9):
        differ = f"{1 - equal:.0%} of their first tokens differ from the plain sampler's"
        return ppo_core.generate, f"no CUDA graphs: {differ}"
    return fast, "sampling with CUDA graphs"


class GraphSampler:
    """ppo_core.generate with a CUDA graph for every shape that a GPT-NeoX policy samples in.

    A graph launches a token's kernels at once, if they always work on the same addresses and shapes
    and the host never has to look at a result. If one cannot be made in the middle of a run, for
    lack of memory say, the run goes on with the plain sampler.
    """

    def __init__(self):
        self.broken = False
        # policy -> {shape and settings: its StaticDecoder}; gone with the policy.
        self.decoders: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(
        self, policy: ppo_core.Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor,
        **options,
    ) -> tuple[Tensor, Tensor]:
        try:
            if not self.broken and is_neox(policy.model.base_model):
                return self.by_graph(policy, prompt_ids, prompt_mask, uniforms, **options)
        except CaptureError as error:
            self.broken = True
            self.decoders.clear()
            tqdm.write(f"no CUDA graphs from here on: {' '.join(str(error).split())[:100]}")
        return ppo_core.generate(policy, prompt_ids, prompt_mask, uniforms, **options)

    @torch.no_grad()
    def by_graph(
        self, policy: ppo_core.Policy, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, *,
        temperature: float, eos_id: int | tuple[int, ...], pad_id: int,
    ) -> tuple[Tensor, Tensor]:
        """ppo_core.generate's arguments and result. Raises CaptureError."""
        rows, width = prompt_ids.shape
        length = -(-(width + len(uniforms)) // ROUNDED) * ROUNDED
        key = rows, length, len(uniforms), temperature, eos_id, pad_id
        decoders = self.decoders.setdefault(policy, {})
        on_gpu = prompt_ids.is_cuda
        with torch.cuda.device(prompt_ids.device) if on_gpu else contextlib.nullcontext():
            if key not in decoders:
                try:
                    decoder = StaticDecoder(policy, *key)
                    if on_gpu:
                        decoder.capture()
                except RuntimeError as error:
                    raise CaptureError(str(error)) from error
                decoders[key] = decoder
            return decoders[key](prompt_ids, prompt_mask, uniforms)


class CaptureError(RuntimeError):
    """A CUDA graph cannot be made here."""


class StaticDecoder:
    """Sampling of T tokens to B prompts that end within L - T positions, without changing shapes.

    The policy may be trained on between two calls: its weights are read where they lie. With a
    dtype other than float32 the matrices of the products are kept a second time, cast once a call;
    autocast would do it at every token. It holds the policy's modules and not the policy, so that
    it goes when the policy does.
    """

    def __init__(
        self, policy: ppo_core.Policy, rows: int, length: int, max_new_tokens: int,
        temperature: float, eos_id: int | tuple[int, ...], pad_id: int,
    ):
        device = policy.forbidden.device
        self.dtype, self.forbidden_ids = policy.dtype, policy.forbidden_ids
        self.model, self.cast = cast_products(policy.model, policy.dtype)
        self.temperature, self.eos_id, self.pad_id = temperature, eos_id, pad_id
        everything = torch.ones(rows, length, device=device)
        self.bias = causal_bias(everything, policy.dtype)  # [B, 1, L, L]
        self.cos, self.sin = neox_rotation(self.trunk, everything)  # [B, L, 1, 1, R]
        self.cache = new_cache(policy.model.config, self.bias, rows, length)
        self.uniforms = torch.zeros(max_new_tokens, rows, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)  # drawn last
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # its position, of L
        self.drawn = torch.zeros(1, dtype=torch.long, device=device)  # tokens behind it, of T
        self.alive = torch.zeros(rows, dtype=torch.bool, device=device)
        self.response = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        self.mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def trunk(self) -> nn.Module:
        return self.model.base_model

    def __call__(
        self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """prompt_ids, prompt_mask [B, Q], uniforms [T, B] -> what ppo_core.generate returns."""
        for mine, theirs in self.cast:
            mine.copy_(theirs)
        self.begin(prompt_ids, prompt_mask, uniforms)
        for count in range(1, len(uniforms)):
            if count % 16 == 0 and not self.alive.any():  # the host waits here, so not always
                break
            self.advance() if self.graph is None else self.graph.replay()
        longest = int(self.mask.sum(1).max())
        return self.response[:, :longest].clone(), self.mask[:, :longest].to(prompt_mask.dtype)

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> None:
        """Read the prompt and draw the first token."""
        width = prompt_ids.shape[1]
        mask = nn.functional.pad(prompt_mask, (0, self.cache.shape[4] - width), value=1)  # [B, L]
        self.bias.copy_(causal_bias(mask, self.dtype))
        for table, new in zip((self.cos, self.sin), neox_rotation(self.trunk, mask), strict=True):
            table.copy_(new)
        # A NaN that an earlier call left would count even where the bias forbids to look.
        self.cache.zero_()
        self.uniforms.copy_(uniforms)
        self.response.fill_(self.pad_id)
        self.mask.zero_()
        self.alive.fill_(True)
        self.drawn.zero_()
        self.at.fill_(width)
        now = torch.arange(width, device=prompt_ids.device)
        self.draw(self.logits(prompt_ids, now, self.bias[:, :, :width, :width]))

    def advance(self) -> None:
        """The next token of every row: what the graph holds."""
        self.draw(self.logits(self.tokens, self.at, self.bias.index_select(2, self.at)))
        self.at.add_(1)

    def logits(self, tokens: Tensor, at: Tensor, bias: Tensor) -> Tensor:
        """tokens [B, n] at `at` [n], bias [B, 1, n, E] -> logits [B, V] after the last."""
        enabled = self.dtype != torch.float32
        with torch.autocast(tokens.device.type, self.dtype, enabled=enabled):
            cos, sin = self.cos.index_select(1, at), self.sin.index_select(1, at)
            hidden = neox_states(
                self.trunk, tokens, cos, sin, bias, slice(-1, None), self.cache, at)
        logits = self.model.get_output_embeddings()(hidden[:, 0])
        return logits.index_fill_(-1, self.forbidden_ids, -torch.inf)

    def draw(self, logits: Tensor) -> None:
        """logits [B, V] -> the next token, recorded as ppo_core.generate does."""
        uniform = self.uniforms.index_select(0, self.drawn)[0]
        token = ppo_core.choose(logits, uniform, self.temperature)
        token = torch.where(self.alive, token, self.pad_id)[:, None]  # [B, 1]
        self.response.index_copy_(1, self.drawn, token)
        self.mask.index_copy_(1, self.drawn, self.alive[:, None])
        self.alive.logical_and_(~ppo_core.is_eos(token[:, 0], self.eos_id))
        self.tokens.copy_(token)
        self.drawn.add_(1)

    def capture(self) -> None:
        """Record `advance`, after three runs in which libraries allocate what they keep."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.at.zero_()
                self.drawn.zero_()
                self.advance()
        current.wait_stream(side)
        self.at.zero_()
        self.drawn.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.advance()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own
        self.graph = graph


def cast_products(
    model: nn.Module, dtype: torch.dtype
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model with the weights of its linear layers, but the head, in `dtype` -> (it, pairs).

    A pair is copied from right to left. All other parameters are the model's own, and so are all in
    float32.
    """
    if dtype == torch.float32:
        return model, []
    linear, shared = [], {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear) and not isinstance(module, policies.Head):
                linear.append(parameter)
            else:
                shared[id(parameter)] = parameter  # tied to an embedding, a head stays one with it
    linear = [parameter for parameter in linear if id(parameter) not in shared]
    cast = {id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            for parameter in linear}
    pairs = [(cast[id(parameter)].data, parameter.data) for parameter in linear]
    return copy.deepcopy(model, shared | cast), pairs


# ----------------------------------------------------------------------------------- this machine


def tuned_generate(
    policy: ppo_core.Policy, prompt_ids: Tensor, prompt_mask: Tensor, settings,
    eos_id: int | tuple[int, ...], pad_id: int,
) -> Callable:
    """Set this machine up for a run with a policy of this size -> the function that samples.

    prompt_ids, prompt_mask [B, Q]: prompts to try it on. Prints what a user should know.
    """
    width = policy.head.weight.shape[1]
    if settings.device == "cpu":
        use_onednn(width)
        if settings.dtype == "bfloat16" and (cost := bfloat16_cost(width)) > 2:
            print(f"warning: a matrix product in bfloat16 takes {cost:.0f} times as long as in "
                  "float32 on this processor")
    if not prompt_ids.is_cuda:
        return ppo_core.generate
    uniforms = ppo_core.draw_uniforms(settings.response_length, len(prompt_ids),
                                      torch.Generator().manual_seed(0), prompt_ids.device)
    generate, decision = sampler(policy, prompt_ids, prompt_mask, uniforms, eos_id=eos_id,
                                 pad_id=pad_id, temperature=settings.temperature)
    print(decision)
    return generate


def prepare_process(threads: int) -> None:
    """What torch and glibc are told before anything is loaded. threads: 0: torch decides."""
    keep_memory()
    if threads:
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next tensor. Elsewhere nothing happens.

    It would give each large tensor back to the system, and the pages of the next one would have to
    be zeroed again: at Pythia's vocabulary that takes longer than what is computed in them. Blocks
    of 32 MiB, the most that glibc takes as a threshold, still go back: kept, they leave holes that
    no other fits, and a higher peak. Smaller holes can grow without bound too: so a run calls
    `give_back` once a round.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: blocks from here on are apart from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back() -> None:
    """Return to the system what glibc keeps and nobody uses."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def use_onednn(width: int) -> None:
    """float32 products on a CPU of models `width` wide by oneDNN: twice as fast in decoding.

    torch takes oneDNN where it may use bfloat16 inside. A processor without AMX does not; on one
    that does, which the errors show, this is taken back. Narrow models are slower with it.
    """
    torch.set_float32_matmul_precision("medium" if width >= 256 else "highest")
    a, b = torch.randn(2, 512, width, generator=torch.Generator().manual_seed(0))
    for rows in (16, 512):
        error = (a[:rows] @ b.T) - (a[:rows].double() @ b.double().T)
        if error.abs().max() > 1e-6 * width:
            torch.set_float32_matmul_precision("highest")


def bfloat16_cost(width: int) -> float:
    """Seconds of a bfloat16 product of models `width` wide on this CPU, in those of a float32 one.

    Many, on one without instructions for it.
    """
    def best(dtype: torch.dtype) -> float:
        a, b = torch.ones(64, width, dtype=dtype), torch.ones(4 * width, width, dtype=dtype)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b.T
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return best(torch.bfloat16) / best(torch.float32)
