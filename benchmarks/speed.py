"""How long one PPO update takes, in which phase, with how much memory: this project, trl 1.12.0, and the counted floor.

    python benchmarks/speed.py                                   this project alone
    python benchmarks/speed.py --trl-python ../trl/bin/python    and trl, in an environment of its own, made by
        python3 -m venv ../trl && ../trl/bin/pip install torch==2.13.0 trl==1.12.0
    python benchmarks/speed.py --device cuda --name gpu          one GPU, where transformers' generate is measured too

In reading order
    1. cases         what is measured: every case is a process that keeps its models and does one update when asked
    2. worker        this project's update; trl's is in speed_trl.py
    3. main job      where the seconds of `python fedppo.py` go
    4. schedule      the cases of a group take turns, so that what disturbs the machine disturbs all of them
    5. floor         the operations and bytes that an update needs, at the rates measured in the same run
    6. main          benchmarks/results/speed-NAME.json and .md

Models have random weights and every response its full length: an update's time depends on neither.

Dimension key: B rows, Q prompt tokens, T response tokens, N agents, K references.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import data  # noqa: E402
import fedppo  # noqa: E402
import graphs  # noqa: E402
import plot  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402

PHASES = ("rollout", "scoring", "optimisation")

# ----------------------------------------------------------------------------------------------------------- cases

SHAPES = {  # of GPT-NeoX; tiny is tiny/model's, pythia-70m EleutherAI's
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
             "vocab_size": 192, "max_position_embeddings": 64, "rotary_pct": 0.25},
    "pythia-70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
                   "vocab_size": 50304, "max_position_embeddings": 2048, "rotary_pct": 0.25},
}
BATCHES = {"tiny": (32, 6, 20), "pythia-70m": (16, 24, 32)}  # B, Q, T
THREADS = 2
EPOCHS = 4  # of one minibatch


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    name: str
    shape: str = "pythia-70m"
    dtype: str = "float32"
    agents: int = 1
    references: int = 1
    rule: str = "geometric"
    device: str = "cpu"
    sampler: str = "plain"  # or "graphs" (graphs.py), "transformers" (model.generate)
    trl: bool = False
    micro_batch: int = 0  # rows; 0: the preset's own

    def spec(self) -> str:
        """What a worker is told, which in trl's environment cannot import this file."""
        return json.dumps({"case": dataclasses.asdict(self), "config": SHAPES[self.shape],
                           "batch": BATCHES[self.shape], "epochs": EPOCHS, "threads": THREADS})


GROUPS = ("one agent", "agents", "references", "rules", "main job")


def groups(shapes: list[str], device: str, trl: bool) -> dict[str, list[Case]]:
    """What takes turns with what: all cases of a group are in memory together, 15 GB at Pythia's shape."""
    found = {}
    where = {"device": device, "sampler": "plain" if device == "cpu" else "graphs"}
    for shape in shapes:
        first = [Case("trl 1.12.0, float32", shape, device=device, trl=True)] * trl
        if device != "cpu":
            first += [Case("rollout by transformers' generate, float32", shape, device=device, sampler="transformers"),
                      Case("this project without CUDA graphs, float32", shape, device=device)]
        found[f"{shape}, one agent"] = [*first, Case("this project, float32", shape, **where)]
        if (shape, device) == ("pythia-70m", "cpu"):  # the preset's few rows are for memory
            found[f"{shape}, one agent"].append(Case("this project, float32, micro-batches of 16", shape,
                                                     micro_batch=16, **where))
        if device != "cpu" or fedppo.bfloat16_cost(512) < 2:  # else it would take minutes
            found[f"{shape}, one agent"].append(Case("this project, bfloat16", shape, "bfloat16", **where))
        crowd = (1, 2, 4, 8) if shape == "tiny" else (1, 2, 4)
        found[f"{shape}, agents"] = [Case(f"{n} agents, {n} references each", shape, agents=n, references=n, **where)
                                     for n in crowd]
        found[f"{shape}, references"] = [Case(f"{k} references, geometric", shape, references=k, **where)
                                         for k in (1, 2, 4, 8)]
        found[f"{shape}, rules"] = [Case(f"4 references, {rule}", shape, references=4, rule=rule, **where)
                                    for rule in ("geometric", "arithmetic", "sum")]
    return found


# ---------------------------------------------------------------------------------------------------------- worker


def micro_batch(shape: str, device: str) -> int:
    """The preset's own."""
    return fedppo.parse(["--preset", shape, "--device", device])[0].micro_batch


def new_model(shape: str, device: str):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPES[shape])).to(device)


def now(device: str) -> float:
    """Seconds, when the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Updates:
    """N agents, each with K references and a reward model of the policy's shape -> the seconds of one update of all."""

    def __init__(self, case: Case):
        self.case = case
        rows, prompt, response = BATCHES[case.shape]
        self.settings = dataclasses.replace(
            fedppo.Settings(), batch=rows, micro_batch=case.micro_batch or micro_batch(case.shape, case.device),
            epochs=EPOCHS, minibatches=1, response_length=response, rule=case.rule, estimator="exact", lr=1e-5,
            device=case.device, dtype=case.dtype)
        model = new_model(case.shape, case.device)
        forbidden = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        forbidden[:2] = True  # EOS and pad: no response ends
        dtype = getattr(torch, case.dtype)
        self.policies = [ppo_core.Policy(new_model(case.shape, case.device), forbidden, dtype)
                         for _ in range(case.agents)]
        self.optimizers = [fedppo.new_optimizer(policy, self.settings) for policy in self.policies]
        self.references = [ppo_core.Policy(new_model(case.shape, case.device), forbidden, dtype)
                           .requires_grad_(False) for _ in range(case.references)]
        self.weights = torch.full([case.references], 1 / case.references, dtype=torch.float64)
        self.reward = data.RewardModel(model, "last", torch.Generator().manual_seed(0)).requires_grad_(False)
        self.stream = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(2, model.config.vocab_size, (rows, prompt), generator=self.stream).to(case.device)
        self.generate = by_transformers if case.sampler == "transformers" else ppo_core.generate
        if case.sampler == "graphs":
            self.generate = graphs.generate  # not by `bind`, which would measure the plain one where this fails

    def score(self, prompt, prompt_mask, response, mask):
        return self.reward(torch.cat([prompt, response], 1), torch.cat([prompt_mask, mask], 1))

    def once(self) -> dict[str, float]:
        """One update of every agent -> seconds by phase."""
        seconds, before = dict.fromkeys(PHASES, 0.0), ppo_core.generate

        def timed(*args, **kwargs):
            started = now(self.case.device)
            result = self.generate(*args, **kwargs)
            seconds["rollout"] += now(self.case.device) - started
            return result
        ppo_core.generate = timed
        try:
            for policy, optimizer in zip(self.policies, self.optimizers, strict=True):
                started = now(self.case.device)
                rollout = ppo_core.collect(policy, self.references, self.weights, self.references[0], self.score,
                                           self.prompts, torch.ones_like(self.prompts), self.settings, eos_id=0,
                                           pad_id=1, generator=self.stream)
                collected = now(self.case.device)
                ppo_core.optimise(policy, optimizer, rollout, self.weights, 0.05, self.settings, self.stream)
                seconds["scoring"] += collected - started
                seconds["optimisation"] += now(self.case.device) - collected
        finally:
            ppo_core.generate = before
        seconds["scoring"] -= seconds["rollout"]
        return seconds


def by_transformers(policy: ppo_core.Policy, prompt_ids, prompt_mask, max_new_tokens: int, *, temperature: float,
                    eos_id: int, pad_id: int, generator):
    """ppo_core.generate by transformers' own, whose random numbers are the device's."""
    ids = policy.model.generate(
        input_ids=prompt_ids, attention_mask=prompt_mask, max_new_tokens=max_new_tokens, do_sample=True, top_k=0,
        temperature=temperature, eos_token_id=eos_id, pad_token_id=pad_id,
        suppress_tokens=policy.forbidden_ids.tolist())
    response = ids[:, prompt_ids.shape[1]:]
    return response, torch.ones_like(response)  # EOS is a forbidden id here, so that no row ends


def prepare(case: Case) -> None:
    """This process as `fedppo.load_world` sets it up."""
    torch.set_num_threads(THREADS)
    fedppo.keep_memory()
    if case.device == "cpu":
        fedppo.use_onednn(SHAPES[case.shape]["hidden_size"])


def serve(update) -> None:
    """A worker's life: "ready", and for each line read one update, one line of JSON and "ready" again."""
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = update()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak}), "ready", sep="\n", flush=True)


# -------------------------------------------------------------------------------------------------------- main job

MAIN_JOB = ["--agents", "4", "--mode", "federated", "--preset", "tiny", "--device", "cpu"]
PARTS = {  # of the main job -> the functions whose seconds they are; what these call for another part counts there
    "rollouts": [(ppo_core, "generate")], "scoring": [(ppo_core, "collect")],
    "optimisation": [(ppo_core, "optimise")], "reward models": [(fedppo, "fit_reward")],
    "judging": [(fedppo, "judge_agent")], "exchange and files": [(fedppo, "exchange"), (fedppo.Run, "checkpoint")],
    "picture": [(plot, "draw")]}


def main_job(folder: str) -> dict[str, float]:
    """Seconds by part of the README's main job, all in this process; "loading and rest" has Python's imports too."""
    seconds, inside = dict.fromkeys(PARTS, 0.0), ["loading and rest"]

    def timed(part: str, function):
        def call(*args, **kwargs):
            nested = "judging" in inside or "reward models" in inside or inside[-1] == part
            if nested or (part == "rollouts" and inside[-1] != "scoring"):  # other sampling belongs to its caller
                return function(*args, **kwargs)
            started, before = time.perf_counter(), sum(seconds.values())
            inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()
                seconds[part] += time.perf_counter() - started - (sum(seconds.values()) - before)
        return call
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, timed(part, getattr(owner, name)))
    with contextlib.redirect_stdout(sys.stderr):
        if fedppo.main([*MAIN_JOB, "--workers", "1", "--out", folder]):
            raise RuntimeError("the main job failed")
    return seconds


def measure_main_job(repeats: int) -> tuple[list[dict[str, float]], list[float]]:
    """From the program's start to its end: in one process, by part, and with as many workers as it has by default."""
    parts, side_by_side = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            done = subprocess.run([sys.executable, __file__, "--main-job", folder], capture_output=True, text=True,
                                  check=True)
            seconds = json.loads(done.stdout)
            parts.append(seconds | {"loading and rest": time.perf_counter() - started - sum(seconds.values())})
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            subprocess.run([sys.executable, str(HERE.parent / "fedppo.py"), *MAIN_JOB, "--out", folder],
                           capture_output=True, check=True)
            side_by_side.append(time.perf_counter() - started)
    return parts, side_by_side


# -------------------------------------------------------------------------------------------------------- schedule


def measure(cases: list[Case], repeats: int, trl_python: str) -> list[dict]:
    """All cases in turns, `repeats` times after one to warm up -> per case its samples."""
    workers, samples = [], [{"case": dataclasses.asdict(case), "updates": [], "peak": 0.0} for case in cases]
    for case in cases:
        script, python = (HERE / "speed_trl.py", trl_python) if case.trl else (HERE / "speed.py", sys.executable)
        command = [python, str(script), "--worker", case.spec()]
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=subprocess.DEVNULL))
        answer(workers[-1], "ready")
    for repeat in range(repeats + 1):
        for worker, found in zip(workers, samples, strict=True):
            worker.stdin.write("go\n")
            worker.stdin.flush()
            said = json.loads(answer(worker, '{"seconds"'))
            answer(worker, "ready")  # trl works on for a while after its update: not into the next one's
            found["peak"] = said["peak"]
            if repeat:
                found["updates"].append(said["seconds"])
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    return samples


def answer(worker: subprocess.Popen, start: str) -> str:
    """The worker's next line that begins so; libraries may print others."""
    for line in worker.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"a worker ended with exit code {worker.wait()}: run it by hand, {worker.args}")


# ----------------------------------------------------------------------------------------------------------- floor


@functools.cache
def rates(dtype: torch.dtype, rows: int, width: int, device: str) -> tuple[float, float]:
    """Measured here and now: operations per second of a matrix product of the model's own size, bytes per second."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (width, 4 * width)))
    big, copy = torch.randn(2, 64 * 2**20 // 4, device=device)

    def best(function) -> float:
        times = []
        for _ in range(50):
            started = now(device)
            function()
            times.append(now(device) - started)
        return min(times)
    repeats = max(1, int(2e9 / (8 * rows * width**2)))
    product = best(lambda: [a @ b for _ in range(repeats)]) / repeats
    return 2 * rows * width * 4 * width / product, 2 * big.nbytes / best(lambda: copy.copy_(big))


def floor(case: Case, passes: int = EPOCHS, steps: int = EPOCHS) -> dict[str, float]:
    """Seconds that one agent's update cannot be faster than, if every operation ran at the measured rates.

    passes: over the rollout;  steps: of Adam.

    Products alone are counted, 2 operations per weight and token: of the trunk at all positions but the last layer,
    which needs keys and values there and the rest at the T states, and of the head at these; attention and everything
    elementwise is left out. A decoding step reads all weights once; Adam reads and writes 7 float32 per weight. The
    first reference is the initial policy, whose forward is counted once.
    """
    rows, prompt, response = BATCHES[case.shape]
    shape = SHAPES[case.shape]
    layer, layers = 12 * shape["hidden_size"] ** 2, shape["num_hidden_layers"]  # weights
    head = shape["hidden_size"] * shape["vocab_size"]
    speed, bandwidth = rates(getattr(torch, case.dtype), rows * (prompt + response), shape["hidden_size"],
                             case.device)
    step_speed, _ = rates(getattr(torch, case.dtype), rows, shape["hidden_size"], case.device)
    reward = 2 * layer * layers * rows * (prompt + response) / rates(
        torch.float32, rows * (prompt + response), shape["hidden_size"], case.device)[0]
    trunk = 2 * rows * layer * ((layers - 1) * (prompt + response) + response + prompt / 6)  # operations
    forward = (trunk + 2 * head * rows * response) / speed
    weights = (layer * layers + head) * (2 if case.dtype == "bfloat16" else 4)  # bytes
    step = max(2 * (layer * layers + head) * rows / step_speed, weights / bandwidth)
    adam = 7 * (layer * layers + 2 * head) * 4 / bandwidth
    seconds = {"rollout": 2 * rows * layer * (layers - 1 + 1 / 6) * prompt / speed + response * step,
               "scoring": (1 + case.references) * forward + reward,
               "optimisation": passes * 3 * forward + steps * adam}
    return {name: value * case.agents for name, value in seconds.items()}


# ------------------------------------------------------------------------------------------------------------ main


def tables(results: dict) -> str:
    """speed-NAME.md from speed-NAME.json."""
    lines = ["# Speed of one PPO update", "", f"Made by `python benchmarks/speed.py {results['arguments']}` on "
             f"{results['hardware']}, torch {results['torch']}, {results['threads']} threads; "
             f"{results['repeats']} updates of every case, in turns: medians "
             f"[quartiles], in seconds; at Pythia's shape this project has micro-batches of {results['micro_batch']} "
             "rows where it does not say."]
    for group, cases in results["groups"].items():
        rows, first = [], None
        for case in cases:
            totals = [sum(update.values()) for update in case["updates"]]
            low, middle, high = statistics.quantiles(totals, n=4)
            first = first or middle
            rollout = statistics.median(update["rollout"] for update in case["updates"])
            tokens = case["case"]["agents"] * BATCHES[case["case"]["shape"]][0] * BATCHES[case["case"]["shape"]][2]
            rows.append([case["case"]["name"], f"{middle:.3g} [{low:.3g}, {high:.3g}]",
                         *(f"{statistics.median(update[name] for update in case['updates']):.3g}" for name in PHASES),
                         f"{first / middle:.2f}", f"{middle / sum(case['floor'].values()):.1f}",
                         f"{rollout / case['floor']['rollout']:.1f}",
                         f"{tokens / middle:.0f}", f"{case['peak']:.0f}"])
        lines += ["", f"## {group}", "", *report.table(
            "case | one update | rollout | scoring | optimisation | times as fast as the first line | "
            "times the floor | rollout alone | response tokens per second | peak memory, MiB", rows)]
    if job := results.get("main job"):
        alone = statistics.median(sum(part.values()) for part in job["alone"])
        rows = []
        for name, floor_seconds in job["floor"].items():
            seconds = statistics.median(part[name] for part in job["alone"])
            rows.append([name, f"{seconds:.1f}", f"{seconds / alone:.0%}",
                         f"{floor_seconds:.1f}" if floor_seconds else "–"])
        rows.sort(key=lambda row: -float(row[1]))
        lines += ["", "## main job", "", f"`python fedppo.py --agents 4 --mode federated`: {alone:.0f} s in one "
                  f"process (`--workers 1`), {statistics.median(job['side by side']):.0f} s in {job['workers']}, as it "
                  f"is by default there; medians of {len(job['alone'])} in turns. The first by part:", "",
                  *report.table("part | seconds | share | floor", rows)]
    return "\n".join(lines) + "\n"


def main_job_by_part(repeats: int) -> dict[str, typing.Any]:
    """Its samples, beside the floor of 160 updates with the main job's passes, steps and references."""
    alone, side_by_side = measure_main_job(repeats)
    torch.set_num_threads(1)
    updates = floor(Case("", "tiny", references=5), passes=2, steps=4)  # four policies and the initial one
    floors = {part: 160 * updates.get("rollout" if part == "rollouts" else part, 0) for part in alone[0]}
    return {"alone": alone, "side by side": side_by_side, "floor": floors,
            "workers": fedppo.workers(fedppo.parse(MAIN_JOB)[0])}


def save(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(results))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="cpu", help="of the files that are written: results/speed-NAME.json, .md")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS,
                        help="of cases; some alone want a --name of their own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-python", default="", help="the Python of an environment that has trl 1.12.0")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--main-job", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.main_job:
        print(json.dumps(main_job(options.main_job)))
        return 0
    if options.worker:
        case = Case(**json.loads(options.worker)["case"])
        prepare(case)
        serve(Updates(case).once)
        return 0
    results = {"arguments": shlex.join(sys.argv[1:] if argv is None else argv),
               "micro_batch": micro_batch("pythia-70m", options.device), "name": options.name,
               "threads": THREADS, "repeats": options.repeats, "torch": torch.__version__,
               "hardware": torch.cuda.get_device_name() if options.device != "cpu" else f"{os.cpu_count()} cores "
               f"({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})", "groups": {}}
    path = HERE / "results" / f"speed-{options.name}.json"
    for group, cases in groups(options.shapes, options.device, bool(options.trl_python)).items():
        if group.split(", ")[1] not in options.groups:
            continue
        measured = measure(cases, options.repeats, options.trl_python)
        prepare(cases[0])
        results["groups"][group] = [found | {"floor": floor(case)} for found, case in zip(measured, cases, strict=True)]
        save(results, path)
    if options.device == "cpu" and "main job" in options.groups:
        results["main job"] = main_job_by_part(options.repeats)
        save(results, path)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
