"""Sampling on a GPU with CUDA graphs. Nothing here has to be read to understand the algorithm.

A sampled token takes some hundred small kernels, and a GPU waits for each to be launched. A CUDA graph launches all of
them at once, if they always work on the same addresses and shapes and the host never has to look at a result. So here
is `ppo_core.generate` once more, in that form; on a CPU it runs too, without a graph, and the tests compare the two.

In reading order
    1. Sampler      one policy at one shape: begin with a prompt, then `advance` by one token
    2. generate     ppo_core.generate's signature and result
    3. bind         at the start of a run: put it in ppo_core.generate's place, if it gives the same tokens on this GPU

Measured on no GPU so far: python benchmarks/speed.py --device cuda --name gpu

Dimension key: B rows, Q prompt tokens, T response tokens, L cache positions, V vocabulary, R rotated features.
"""

import contextlib
import copy
import weakref

import torch
from torch import Tensor, nn
from tqdm import tqdm

import ppo_core
from ppo_core import Policy

plain = ppo_core.generate

# --------------------------------------------------------------------------------------------------------- sampler

ROUNDED = 64  # L is a multiple of it, so that few graphs serve all prompt lengths


class Sampler:
    """A policy's sampling of T tokens to B prompts that end within L - T positions.

    The policy may be trained on between two calls: its weights are read where they lie. With a dtype other than
    float32 the matrices of the products are kept a second time, cast once a call; autocast would do it at every token.
    It holds the policy's modules and not the policy, so that it goes when the policy does (see `SAMPLERS`).
    """

    def __init__(self, policy: Policy, rows: int, length: int, max_new_tokens: int, temperature: float, eos_id: int,
                 pad_id: int, greedy: bool):
        config, device = policy.model.config, policy.forbidden.device
        self.dtype, self.forbidden_ids = policy.dtype, policy.forbidden_ids
        self.model, self.cast = cast_products(policy.model, policy.dtype)
        self.temperature, self.eos_id, self.pad_id, self.greedy = temperature, eos_id, pad_id, greedy
        everything = torch.ones(rows, length, device=device)
        self.bias = ppo_core.causal_bias(everything, policy.dtype)  # [B, 1, L, L]
        self.cos, self.sin = ppo_core.neox_rotation(self.trunk, everything)  # [B, L, 1, 1, R]
        self.cache = self.bias.new_zeros(config.num_hidden_layers, 2, rows, config.num_attention_heads, length,
                                         config.hidden_size // config.num_attention_heads)
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

    def __call__(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """prompt_ids, prompt_mask [B, Q], uniforms [T, B] -> what ppo_core.generate returns."""
        for mine, theirs in self.cast:
            mine.copy_(theirs)
        self.begin(prompt_ids, prompt_mask, uniforms)
        for count in range(1, len(uniforms)):
            if count % 16 == 0 and not self.alive.any():  # the host waits here, so not at every token
                break
            self.advance() if self.graph is None else self.graph.replay()
        longest = int(self.mask.sum(1).max())
        return self.response[:, :longest].clone(), self.mask[:, :longest].to(prompt_mask.dtype)

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor) -> None:
        """Read the prompt and draw the first token."""
        width = prompt_ids.shape[1]
        mask = nn.functional.pad(prompt_mask, (0, self.cache.shape[4] - width), value=1)  # [B, L]
        self.bias.copy_(ppo_core.causal_bias(mask, self.dtype))
        for table, new in zip((self.cos, self.sin), ppo_core.neox_rotation(self.trunk, mask), strict=True):
            table.copy_(new)
        self.cache.zero_()  # a NaN that an earlier call left would count even where the bias forbids to look
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
        """tokens [B, n] at the positions `at` [n], bias [B, 1, n, E] -> logits [B, V] after the last of them."""
        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = ppo_core.neox_states(self.trunk, tokens, self.cos.index_select(1, at),
                                          self.sin.index_select(1, at), bias, slice(-1, None), self.cache, at)
            logits = self.model.get_output_embeddings()(hidden[:, 0])
        return logits.float().index_fill_(-1, self.forbidden_ids, -torch.inf)

    def draw(self, logits: Tensor) -> None:
        """logits [B, V] -> the next token, recorded as ppo_core.generate does."""
        uniform = self.uniforms.index_select(0, self.drawn)[0]
        token = ppo_core.choose(logits, uniform, self.temperature, self.greedy)
        token = torch.where(self.alive, token, self.pad_id)[:, None]  # [B, 1]
        self.response.index_copy_(1, self.drawn, token)
        self.mask.index_copy_(1, self.drawn, self.alive[:, None])
        self.alive.logical_and_(token[:, 0] != self.eos_id)
        self.tokens.copy_(token)
        self.drawn.add_(1)

    def capture(self) -> None:
        """Record `advance`, after three runs in which libraries allocate what they keep."""
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.at.zero_()
                self.drawn.zero_()
                self.advance()
        here.wait_stream(side)
        self.at.zero_()
        self.drawn.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.advance()
        finally:
            torch.cuda.set_stream(here)  # a failed capture leaves its own
        self.graph = graph


def cast_products(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model with the parameters of its linear layers in `dtype` -> (it, pairs to copy from right to left).

    All other parameters are the model's own, and so are all in float32.
    """
    if dtype == torch.float32:
        return model, []
    linear, shared = [], {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear):
                linear.append(parameter)
            else:
                shared[id(parameter)] = parameter  # tied to an embedding, a head's matrix stays one with it
    linear = [parameter for parameter in linear if id(parameter) not in shared]
    cast = {id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False) for parameter in linear}
    return copy.deepcopy(model, shared | cast), [(cast[id(parameter)].data, parameter.data) for parameter in linear]


# -------------------------------------------------------------------------------------------------------- generate

SAMPLERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # policy -> {shape and settings: Sampler}


@torch.no_grad()
def generate(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, *, temperature: float,
             eos_id: int, pad_id: int, generator: torch.Generator | None = None,
             greedy: bool = False) -> tuple[Tensor, Tensor]:
    """`ppo_core.generate`, with a graph for every shape that a GPT-NeoX policy has sampled in.

    If one cannot be made in the middle of a run, for lack of memory say, the run goes on with the plain sampler.
    """
    def plainly() -> tuple[Tensor, Tensor]:
        return plain(model, prompt_ids, prompt_mask, max_new_tokens, temperature=temperature, eos_id=eos_id,
                     pad_id=pad_id, generator=generator, greedy=greedy)
    if not (isinstance(model, Policy) and ppo_core.is_neox(model.model.base_model)):
        return plainly()
    rows, width = prompt_ids.shape
    length = -(-(width + max_new_tokens) // ROUNDED) * ROUNDED
    key = rows, length, max_new_tokens, temperature, eos_id, pad_id, greedy
    samplers = SAMPLERS.setdefault(model, {})
    with torch.cuda.device(prompt_ids.device) if prompt_ids.is_cuda else contextlib.nullcontext():
        if key not in samplers:
            try:
                sampler = Sampler(model, *key)
                if prompt_ids.is_cuda:
                    sampler.capture()
            except RuntimeError as error:
                if ppo_core.generate is not generate:  # `bind` is trying
                    raise
                ppo_core.generate = plain
                SAMPLERS.clear()
                tqdm.write(f"no CUDA graphs from here on: {' '.join(str(error).split())[:100]}")
                return plainly()
            samplers[key] = sampler
        return samplers[key](prompt_ids, prompt_mask,
                             ppo_core.uniforms(max_new_tokens, rows, generator, prompt_ids.device))


# ------------------------------------------------------------------------------------------------------------ bind


def bind(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int, **options) -> str:
    """Sample with graphs from now on, if they give the plain sampler's tokens -> what was decided, in words.

    prompt_ids, prompt_mask [B, Q];  options: those of `generate` but the generator. Four tokens are compared, and in
    bfloat16 one in ten may differ: there another order of additions makes another token now and then.
    """
    ppo_core.generate = plain
    try:
        one, other = (sample(policy, prompt_ids, prompt_mask, max_new_tokens, **options,
                             generator=torch.Generator().manual_seed(0))[0] for sample in (plain, generate))
    except RuntimeError as error:
        SAMPLERS.clear()
        return f"no CUDA graphs: {' '.join(str(error).split())[:100]}"
    one, other = (nn.functional.pad(tokens, (0, 4), value=-1)[:, :4] for tokens in (one, other))
    equal = (one == other).float().mean().item()
    if equal < (0.99 if policy.dtype == torch.float32 else 0.9):
        SAMPLERS.clear()
        return f"no CUDA graphs: {1 - equal:.0%} of their first tokens differ from the plain sampler's"
    ppo_core.generate = generate
    return "sampling with CUDA graphs"
