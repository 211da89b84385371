"""One PPO update of trl 1.12.0's PPOTrainer, by phase, for speed.py: runs in trl's own environment.

    python benchmarks/speed_trl.py --worker CASE        as speed.py calls it

The same shape, batch, tokens, epochs and reward model as this project's, fp32, no gradient
checkpointing, no logging, no sample generations. Its value model is a second whole model; it has
one reference. Its phases are told apart by what it calls: trl has no hooks for them, so two of its
calls are replaced in this process. The process is as torch leaves it, but for the number of
threads; if the case says `set_up`, torch and glibc are told what this project tells them.
"""

import argparse
import ctypes
import json
import os
import resource
import sys
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402


def now() -> float:
    """Seconds, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(transformers.TrainerCallback):
    """Waits for a line before every update and prints its seconds after it, by phase.

    trl calls batch_generation first, then scores, then draws a permutation at the start of each
    epoch.
    """

    def __init__(self):
        self.moments: dict[str, float] = {}
        generate, permutation = ppo_trainer.batch_generation, np.random.permutation

        def timed(*args):
            print("ready", flush=True)
            if not sys.stdin.readline():
                sys.exit(0)
            self.moments = {"start": now()}
            result = generate(*args)
            self.moments["rollout"] = now()
            return result

        def marked(*args):
            self.moments.setdefault("scoring", now())
            return permutation(*args)
        ppo_trainer.batch_generation, np.random.permutation = timed, marked

    def on_step_end(self, args, state, control, **kwargs):
        at = self.moments | {"optimisation": now()}
        names = ("start", "rollout", "scoring", "optimisation")
        seconds = {name: at[name] - at[before]
                   for before, name in zip(names, names[1:], strict=False)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def trainer(spec: dict, folder: str) -> PPOTrainer:
    """spec: Case.spec of speed.py."""
    rows, prompt, response = spec["batch"]
    torch.manual_seed(0)
    config = GPTNeoXConfig(**spec["config"], pad_token_id=1)
    scalar = GPTNeoXConfig(**spec["config"], pad_token_id=1, num_labels=1)
    words = {f"w{k}": k for k in range(config.vocab_size)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), eos_token="w0",
        pad_token="w1", padding_side="left")
    ids = torch.randint(2, config.vocab_size, (rows, prompt)).tolist()
    prompts = datasets.Dataset.from_dict({"input_ids": ids})
    settings = PPOConfig(
        output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=spec["epochs"], total_episodes=rows * 10_000,
        local_rollout_forward_batch_size=rows, response_length=response, learning_rate=1e-5,
        temperature=1.0, bf16=False, gradient_checkpointing=False, num_sample_generations=0,
        report_to="none", logging_steps=10_000, save_strategy="no", disable_tqdm=True,
        use_cpu=spec["case"]["device"] == "cpu")
    return PPOTrainer(
        settings, tokenizer, model=GPTNeoXForCausalLM(config),
        ref_model=GPTNeoXForCausalLM(config),
        reward_model=GPTNeoXForSequenceClassification(scalar), train_dataset=prompts,
        value_model=GPTNeoXForSequenceClassification(scalar), eval_dataset=prompts,
        callbacks=[Clock()])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", required=True)
    spec = json.loads(parser.parse_args().worker)
    torch.set_num_threads(spec["threads"])
    if spec["case"]["set_up"]:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 32 * 2**20)  # as support/fast.py's keep_memory, which says why
        mallopt(-1, -1)
        torch.set_float32_matmul_precision(spec["precision"])  # as its use_onednn has chosen it
    with tempfile.TemporaryDirectory() as folder:
        ours = trainer(spec, folder)
        ours.train()


if __name__ == "__main__":
    main()
