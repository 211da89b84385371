"""One whole update of PPO with a KL penalty to two references, with real numbers at each step.

    python walkthrough.py        about ten seconds on one core, no download; read both side by side

For a reader who knows torch and wants to see RLHF happen once, before kl.py and ppo_core.py. It is
written out in plain torch, without their functions. Every step computes on a batch of prompts; the
tables follow the first of them. In reading order, by the numbers that are printed: 0 who is here,
1 sample and score, 2 two references become one, 3 log-probs and KL, 4 advantages, 5 first gradient
step, 6 second gradient step, 7 what changed, 8 the same by ppo_core.py and kl.py: all numbers agree
to 1e-5, or the exit code is 1.

Simpler than fedppo.py: prompts of one length, so none is padded on the left; no id is forbidden;
two epochs of one minibatch, the whole batch; a critic that starts from random numbers; and as
reward tiny/judge.py, the true score; agents see only a reward model fitted to preferences.

Dimension key: B responses, Q prompt tokens, T response tokens (right-padded), V vocabulary.
State t is the prompt and the response before token t. Sources: PPO 1707.06347, GAE 1506.02438,
a KL penalty for language models 1909.08593, to several references 2502.01203 and 1707.04175.
"""

import copy
import json
from pathlib import Path
from textwrap import fill
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import ppo_core
from tiny import judge

TINY = Path(__file__).resolve().parent / "tiny"
B, Q, T, EOS, PAD, SEED = 16, 3, 20, 0, 1, 16
W = (0.6, 0.4)  # agent 0's row of the communication matrix: for its own copy, for agent 1's
LR, BETA, CLIP = 1e-3, 0.5, 0.2  # BETA: the price of a nat of KL in units of reward
GAMMA, LAMBDA, VALUE_COEF, MAX_NORM = 1.0, 0.95, 0.1, 1.0  # sources: ppo_core.py


def say(*paragraphs: str) -> None:
    print("\n" + "\n".join(fill(" ".join(text.split()), 92) for text in paragraphs))


def table(r: SimpleNamespace, columns: dict[str, Tensor]) -> None:
    """One line per token of the first response; columns [B, T]."""
    print("\n  t  token     " + "".join(f"{name:>11}" for name in columns))
    for t, word in enumerate(r.words):
        print(f" {t:2}  {word:10}" + "".join(f"{x[0, t].item():z11.3f}" for x in columns.values()))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid tokens, [B, T] twice -> scalar: each token of the batch counts alike."""
    return (x * mask).sum() / mask.sum()


def pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """logprobs [B, T, V], tokens [B, T] -> the log-prob of each token [B, T]."""
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def kl_of(logprobs: Tensor, reference: Tensor) -> Tensor:
    """KL(pi||mu) = sum_v pi(v) (log pi(v) - log mu(v)), exact: [B, T, V] twice -> [B, T]."""
    return (logprobs.exp() * (logprobs - reference)).sum(-1)


def read(policy: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, Q+T] -> log-probs [B, T, V] and value [B, T] at each state of the responses."""
    hidden = policy.base_model(ids).last_hidden_state[:, Q - 1:-1]  # position p predicts p + 1
    logprobs = policy.get_output_embeddings()(hidden).log_softmax(-1)
    return logprobs, policy.value_head(hidden).squeeze(-1)


def agents(tokenizer) -> tuple[nn.Module, nn.Module, list[str]]:
    """Step 0 -> policy of agent 0, policy of agent 1, B prompts of agent 0."""
    policy = AutoModelForCausalLM.from_pretrained(TINY / "model").eval()
    policy.value_head = nn.Linear(policy.config.hidden_size, 1)  # the critic, on the actor's trunk
    nn.init.normal_(policy.value_head.weight, std=0.03)  # small guesses; Policy starts at 0
    rows = map(json.loads, (TINY / "data/hotel.jsonl").read_text(encoding="utf-8").splitlines())
    pairs = [(row["prompt"], row["chosen"][1]["content"]) for row in rows]
    texts = [f"{a} {b}" for a, b in pairs if judge.score([a], [b], [True])[0] > 1]
    ids = tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    ids = torch.tensor([row for row in ids if len(row) == 12])  # of one length: no padding
    peer = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(peer.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        peer(ids, labels=ids).loss.backward()  # cross-entropy
        optimizer.step()
    say("0 WHO IS HERE", f"""Agent 0's policy pi is the tiny model. At an exchange every agent sends
        a frozen copy of its policy: mu_0 is agent 0's own, so pi = mu_0 now; mu_1 is agent 1's,
        which is ahead: 20 steps of cross-entropy on {len(ids)} texts with scores above 1. Agent 0's
        row of W is {W}: so much it listens to itself, so much to agent 1.""")
    return policy, peer, [prompt for prompt, _ in pairs if len(prompt.split()) == Q][:B]


@torch.no_grad()
def sample(policy: nn.Module, tokenizer, prompts: list[str]) -> SimpleNamespace:
    """Step 1: responses, drawn token by token from the whole softmax -> the rollout r."""
    ids = torch.tensor(tokenizer(prompts)["input_ids"])  # [B, Q]
    for _ in range(T):
        ids = torch.cat([ids, torch.multinomial(policy(ids).logits[:, -1].softmax(-1), 1)], 1)
    is_eos = (ids[:, Q:] == EOS).long()  # [B, T]
    mask = (is_eos.cumsum(1) - is_eos == 0).long()  # 1 up to and with the first EOS
    response = ids[:, Q:].masked_fill_(mask == 0, PAD)  # a view: ids change with it
    texts = tokenizer.batch_decode(response, skip_special_tokens=True)
    words, ended = [*texts[0].split(), "<eos>"][:mask[0].sum()], is_eos.any(1).tolist()
    scores = torch.tensor(judge.score(prompts, texts, ended))  # [B]
    terms = judge.terms(prompts[0], texts[0], ended[0]).items()
    made = ", ".join(f"{k} {v:+.2f}" for k, v in terms if v) or "nothing"
    say("1 SAMPLE AND SCORE", f"""pi answers {B} prompts: ids [{B},{Q}+{T}], {mask.sum()} of them
        valid response tokens. The first prompt and response:""", f'"{prompts[0]} ...{texts[0]}"',
        f"Score {scores[0]:+.3f}, made of: {made}. Mean of the batch: {scores.mean():+.3f}.")
    return SimpleNamespace(ids=ids, response=response, mask=mask, scores=scores, words=words)


def cooperate(r: SimpleNamespace, pi: Tensor, mu: list[Tensor], tokenizer) -> None:
    """Steps 2 and 3, from log-probs [B, T, V] -> r.log_rho [B, T, V], r.kl [B, T]."""
    total = W[0] * mu[0] + W[1] * mu[1]
    r.log_rho = total.log_softmax(-1)  # sum_j w_j log mu_j - log Z: kl.py's rule `geometric`
    log_z, far, r.kl = total.logsumexp(-1), kl_of(pi, mu[1]), kl_of(pi, r.log_rho)  # [B, T]
    say("2 TWO REFERENCES BECOME ONE", f"""rho = mu_0^{W[0]} mu_1^{W[1]} / Z is the cooperative
        reference: what pi shall stay near, and so how agent 0 learns from agent 1 without its data.
        Z lets the {pi.shape[-1]} probabilities sum to 1; at state 0, right after the prompt, it is
        {log_z[0, 0].exp():.3f}. The likeliest words there:""")
    print(f"\n     {'':10}{'mu_0':>11}{'mu_1':>11}{'product':>11}{'rho':>11}")
    for v in r.log_rho[0, 0].topk(4).indices.tolist():
        cells = "".join(f"{x[0, 0, v].exp():11.3f}" for x in (*mu, total, r.log_rho))
        print(f"     {tokenizer.convert_ids_to_tokens(v):10}{cells}")
    say("3 LOG-PROBS AND KL, in nats", f"""A log-prob here is of the token that was drawn, a KL sums
        over all words at its state: [{B},{T}] each, from [{B},{T},{pi.shape[-1]}]. Check at state
        0: w_0 KL(pi||mu_0) + w_1 KL(pi||mu_1) = KL(pi||rho) - log Z. In numbers, {W[0]} * 0 +
        {W[1]} * {far[0, 0]:.4f} = {r.kl[0, 0]:.4f} + {-log_z[0, 0]:.4f}; the last is the price
        of references that disagree.""")
    chosen = [pick(x, r.response) for x in (*mu, r.log_rho)]
    names = ("log pi", "log mu_0", "log mu_1", "log rho", "KL to mu_1", "KL to rho")
    table(r, dict(zip(names, (r.logprobs, *chosen, far, r.kl), strict=True)))


def advantages(r: SimpleNamespace) -> None:
    """Step 4 -> r.rewards, r.advantages, r.returns, r.whitened [B, T]; r.sigma."""
    last, value = r.mask.sum(1, keepdim=True) - 1, r.values * r.mask  # V is 0 after the end
    r.rewards = torch.zeros(B, T).scatter(1, last, r.scores[:, None])
    delta = r.rewards + GAMMA * torch.cat([value[:, 1:], torch.zeros(B, 1)], 1) - value
    r.advantages, later = torch.zeros(B, T), torch.zeros(B)
    for t in reversed(range(T)):
        r.advantages[:, t] = later = (delta[:, t] + GAMMA * LAMBDA * later) * r.mask[:, t]
    r.returns = r.advantages + value
    middle = mean(r.advantages, r.mask)
    r.sigma = (mean((r.advantages - middle) ** 2, r.mask) + 1e-8).sqrt()
    r.whitened = (r.advantages - middle) / r.sigma * r.mask
    say("4 ADVANTAGES: did it go better than expected?", f"""The score is paid at the last token;
        V(s_t) is the critic's guess of it, here a poor one. Token t surprises it by delta_t =
        r_t + V(s_t+1) - V(s_t), and what follows counts less the later it is: A_t = delta_t +
        {LAMBDA} A_t+1 (GAE, 1506.02438, eq. 16). V shall learn the return, A + V. Whitened is
        (A {-middle:+.3f}) / {r.sigma:.3f}, by the batch's mean and deviation sigma_A: what counts
        is better or worse than usual, on one scale.""")
    table(r, {"reward": r.rewards, "V": value, "delta": delta, "A": r.advantages,
              "return": r.returns, "whitened": r.whitened})


def loss_of(policy: nn.Module, r: SimpleNamespace) -> SimpleNamespace:
    """L = E_t[max(-ratio A, -clip(ratio) A)] + c_v L_V + (beta / sigma_A) E_t[KL_t], by terms."""
    logprobs, values = read(policy, r.ids)
    x = SimpleNamespace(logprobs=pick(logprobs, r.response), values=values)
    x.ratio = (x.logprobs - r.logprobs).exp()  # pi(a_t|s_t) / pi_old(a_t|s_t)
    x.plain, x.clipped = -x.ratio * r.whitened, -x.ratio.clamp(1 - CLIP, 1 + CLIP) * r.whitened
    x.larger = torch.maximum(x.plain, x.clipped)
    x.policy_loss = mean(x.larger, r.mask)  # 1707.06347, eq. 7, negated
    near = r.values + (values - r.values).clamp(-CLIP, CLIP)  # V is clipped too: OpenAI baselines
    x.value_loss = mean(((values - r.returns) ** 2).maximum((near - r.returns) ** 2), r.mask) / 2
    x.kl = kl_of(logprobs, r.log_rho)
    x.mean_kl = mean(x.kl, r.mask)
    x.loss = x.policy_loss + VALUE_COEF * x.value_loss + BETA / r.sigma * x.mean_kl
    return x


def update(policy: nn.Module, r: SimpleNamespace) -> list[SimpleNamespace]:
    """Steps 5, 6 and 7 -> the loss by its terms, before each of two gradient steps."""
    optimizer = torch.optim.Adam(policy.parameters(), LR, betas=(0.9, 0.99), eps=1e-5)
    history, numbers = [], []
    for _ in range(2):
        x = loss_of(policy, r)
        optimizer.zero_grad()
        x.loss.backward()
        x.grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
        optimizer.step()
        history.append(x)
        numbers.append(f"= {x.policy_loss:z.4f} + {VALUE_COEF} * {x.value_loss:.4f} + {BETA} / "
                       f"{r.sigma:.3f} * {x.mean_kl:.4f} = {x.loss:.4f}")
    first, second, after = *history, loss_of(policy, r)
    say("5 FIRST GRADIENT STEP", "Loss = policy loss + c_v * value loss + beta / sigma_A * KL",
        numbers[0], f"""pi is still pi_old: each ratio is 1, and the policy loss, which is
        minus the mean of whitened A, is zero. Its gradient is not: a step against it raises log pi
        where A > 0. The
        value loss is half the mean of (V - return)^2, or of the same with V clipped where that is
        larger (in step 6). The gradient of it all has norm
        {first.grad_norm:.3f}, is cut to {MAX_NORM} where longer, and Adam steps.""")
    stopped = ((second.clipped > second.plain) & (r.mask == 1)).sum()
    say("6 SECOND GRADIENT STEP, on the same responses", f"Loss {numbers[1]}", f"""ratio = pi /
        pi_old = exp(log pi - log pi_old) is no longer 1. The larger of -ratio A and
        -clip(ratio) A counts (1707.06347, eq. 7, negated). Where that is the clipped
        one, the ratio has gone where A asks it to and left {1 - CLIP} to {1 + CLIP}: the policy
        loss drives it no further. This happens at {stopped} of {r.mask.sum()} tokens. The
        gradient's norm is {second.grad_norm:.3f}.""")
    table(r, {"whitened A": r.whitened, "ratio": second.ratio, "-ratio A": second.plain,
              "-clip A": second.clipped, "counts": second.larger})
    obey = mean(((after.logprobs > r.logprobs) == (r.whitened > 0)).float(), r.mask)
    say("7 WHAT CHANGED, by both steps", f"""Loss {first.loss:.4f} -> {after.loss:.4f}, value loss
        {first.value_loss:.4f} -> {after.value_loss:.4f}, KL to rho {first.mean_kl:.4f} ->
        {after.mean_kl:.4f}. {obey:.0%} of all tokens became likelier where A > 0 and less likely
        where A < 0: not each, for all share the same parameters, and the KL pulls too.""")
    table(r, {"whitened A": r.whitened, "log pi_old": r.logprobs, "log pi": after.logprobs,
              "KL before": first.kl, "KL after": after.kl})
    return history


def compare(start: nn.Module, peer: nn.Module, policy: nn.Module, r, history) -> int:
    """Step 8: the same update by ppo_core.py, which calls kl.py -> exit code."""
    forbidden = torch.zeros(start.config.vocab_size, dtype=torch.bool)  # none is
    models = (start, start, peer)
    theirs, own, other = (ppo_core.Policy(copy.deepcopy(m), forbidden) for m in models)
    theirs.value_head = theirs.model.value_head
    s = SimpleNamespace(response_length=T, temperature=1.0, missing_eos_penalty=0, rule="geometric",
                        penalty="exact-in-loss", epochs=2, minibatches=1, micro_batch=B, clip=CLIP)
    row, prompts, mask, (first, second) = torch.tensor(W), r.ids[:, :Q], r.mask, history
    out = ppo_core.collect(
        theirs, [own, other], row, own, lambda *_: r.scores, prompts, torch.ones_like(prompts), s,
        eos_id=EOS, pad_id=PAD, generator=None, generate=lambda *_, **__: (r.response, mask))
    gae = ppo_core.gae(r.rewards, out.values, mask, ppo_core.GAMMA, ppo_core.LAMBDA)
    white = ppo_core.whiten(gae[0], mask)
    pg, _ = ppo_core.policy_loss(second.logprobs, out.logprobs, white, mask, CLIP)
    vf, _ = ppo_core.value_loss(second.values, out.values, gae[1], mask, CLIP)
    adam = torch.optim.Adam(theirs.parameters(), LR, **ppo_core.ADAM)
    found = ppo_core.optimise(theirs, adam, out, row, BETA, s, torch.Generator())
    pairs = {
        "log pi_old (Policy, score_tokens)": (r.logprobs, out.logprobs),
        "V (Policy, score_tokens)": (r.values, out.values),
        "log rho (kl.reference)": tuple(pick(x, r.response) for x in (r.log_rho, out.reference)),
        "KL to rho (kl.penalty)": (r.kl, out.kl), "A (gae)": (r.advantages, gae[0]),
        "return (gae)": (r.returns, gae[1]), "whitened A (whiten)": (r.whitened, white),
        "policy loss, step 2 (policy_loss)": (second.policy_loss, pg),
        "value loss, step 2 (value_loss)": (second.value_loss, vf),
        "gradient norm, mean (optimise)": (
            (first.grad_norm + second.grad_norm) / 2, torch.tensor(found["grad_norm"])),
        "parameters after (optimise)": tuple(
            torch.cat([p.flatten() for p in m.parameters()]) for m in (policy, theirs))}
    say("8 THE SAME BY ppo_core.py AND kl.py: the first entry, and the largest gap of all entries")
    print(f"\n  {'':36}{'here':>11}{'there':>11}{'gap':>9}")
    differ = []
    for name, pair in pairs.items():
        a, b = (x.detach()[mask == 1] if x.dim() == 2 else x.detach().flatten() for x in pair)
        gap = (a - b).abs().max().item()
        print(f"  {name:36}{a[0]:z11.5f}{b[0]:z11.5f}{gap:9.0e}")
        if not gap <= 1e-5:  # NaN differs too
            differ.append(name)
    say(f"They DIFFER: {', '.join(differ)}." if differ else f"All {len(pairs)} agree to 1e-5.")
    return 1 if differ else 0


def main() -> int:
    """All steps -> exit code: 0 if ppo_core.py and kl.py find the same numbers."""
    disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    policy, peer, prompts = agents(tokenizer)
    start = copy.deepcopy(policy)
    r = sample(policy, tokenizer, prompts)
    with torch.no_grad():  # what held when the responses were drawn stays fixed in both steps
        (pi, r.values), (mu_1, _) = read(policy, r.ids), read(peer, r.ids)
        r.logprobs = pick(pi, r.response)  # of pi_old
        cooperate(r, pi, [pi, mu_1], tokenizer)
        advantages(r)
    history = update(policy, r)
    return compare(start, peer, policy, r, history)


if __name__ == "__main__":
    raise SystemExit(main())
