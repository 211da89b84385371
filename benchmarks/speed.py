"""How long one PPO update takes, by phase, and how much memory: this project, trl, and a floor.

    python benchmarks/speed.py                                   this project alone
    python benchmarks/speed.py --trl-python ../trl/bin/python    and trl, in an environment made by
        python3 -m venv ../trl && ../trl/bin/pip install torch==2.13.0 trl==1.12.0
    python benchmarks/speed.py --device cuda --shapes pythia-70m --name gpu          one GPU

In reading order
    1. cases         what is measured: every case is a process that keeps its models and does one
                     update when asked
    2. worker        this project's update; trl's is in speed_trl.py
    3. main job      where the seconds of `python fedppo.py` go
    4. schedule      the cases of a group take turns, so that what disturbs the machine disturbs all
    5. floor         the operations and bytes that an update needs, at the rates measured in the
                     same run
    6. main          benchmarks/results/speed-NAME.json and .md

Models have random weights and every response its full length: an update's time depends on neither.

Dimension key: B rows, Q prompt tokens, T response tokens, N agents, K references.
"""

import argparse
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
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import data  # noqa: E402
import fedppo  # noqa: E402
import ppo_core  # noqa: E402
import report  # noqa: E402
from support import fast, settings  # noqa: E402

PHASES = ("rollout", "scoring", "optimisation")

# ------------------------------------------------------------------------------------------ cases

SHAPES = {  # of GPT-NeoX: tiny is tiny/model's, pythia-70m EleutherAI's; of Llama: smollm2-135m
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 256, "vocab_size": 192, "max_position_embeddings": 64,
        "rotary_pct": 0.25},
    "pythia-70m": {
        "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
        "intermediate_size": 2048, "vocab_size": 50304, "max_position_embeddings": 2048,
        "rotary_pct": 0.25},
    "smollm2-135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True},
}
BATCHES = {"tiny": (32, 6, 20), "pythia-70m": (16, 24, 32), "smollm2-135m": (16, 24, 32)}  # B, Q, T
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
    form: str = "fast"  # of policies and reward models: support/fast.py's, or "plain"
    sampler: str = "generate"  # of ppo_core; or "graphs" (support/fast.py), "transformers"
    trl: bool = False
    set_up: bool = True  # of trl: whether its process is, as this project's always are (`prepare`)
    micro_batch: int = 0  # rows; 0: the preset's own
    rows: int = 0  # 0: the shape's own of BATCHES

    @property
    def batch(self) -> tuple[int, int, int]:
        """Rows, prompt tokens and response tokens of an update."""
        rows, *tokens = BATCHES[self.shape]
        return self.rows or rows, *tokens

    def spec(self) -> str:
        """What a worker is told, which in trl's environment cannot import this file."""
        return json.dumps({"case": dataclasses.asdict(self), "config": SHAPES[self.shape],
                           "precision": torch.get_float32_matmul_precision(),
                           "batch": self.batch, "epochs": EPOCHS, "threads": THREADS})


GROUPS = ("one agent", "64 rows", "agents", "references", "rules", "main job")


def groups(shapes: list[str], device: str, trl: bool) -> dict[str, list[Case]]:
    """What takes turns with what: all cases of a group are in memory together, 18 GB at Pythia's
    shape."""
    found = {}
    for shape in shapes:
        case = functools.partial(Case, shape=shape, device=device,
                                 sampler="generate" if device == "cpu" else "graphs")
        if shape == "smollm2-135m":  # a Llama: its layers run in transformers' own form
            found[f"{shape}, one agent"] = [case("1 reference, float32"), case(
                "4 references, float32", references=4), *in_bfloat16(case, "1 reference, ")]
            continue
        found[f"{shape}, one agent"] = one_agent(case, trl)
        if device != "cpu":  # the batch of the preset pythia-70m, which fills a GPU better
            full = functools.partial(case, rows=64, references=4)
            found[f"{shape}, 64 rows"] = [full("4 references, float32"),
                                          *in_bfloat16(full, "4 references, ")]
        found[f"{shape}, agents"] = [
            case(f"{n} agents, {n} references each", agents=n, references=n)
            for n in ((1, 2, 4, 8) if shape == "tiny" else (1, 2, 4))]
        found[f"{shape}, references"] = [
            case(f"{k} references, geometric", references=k) for k in (1, 2, 4, 8)]
        found[f"{shape}, rules"] = [
            case(f"4 references, {rule}", references=4, rule=rule)
            for rule in ("geometric", "arithmetic", "sum")]
    return found


def one_agent(case: functools.partial, trl: bool) -> list[Case]:
    """trl, what support/fast.py is measured against, and this project as it runs."""
    shape, device = case.keywords["shape"], case.keywords["device"]
    cases = [case("trl 1.12.0, float32", trl=True, set_up=False)] if trl else []
    if trl and device == "cpu":
        cases.append(case("trl 1.12.0, float32, its process set up as this project's", trl=True))
    if device != "cpu":
        cases += [case("rollout by transformers' generate, float32", sampler="transformers"),
                  case("this project without CUDA graphs, float32", sampler="generate")]
    cases += [case("this project in plain form, float32", form="plain", sampler="generate"),
              case("this project, float32")]
    if (shape, device) == ("pythia-70m", "cpu"):  # the preset's few rows are for memory
        cases.append(case("this project, float32, micro-batches of 16", micro_batch=16))
    return cases + in_bfloat16(case, "this project, ")


def in_bfloat16(case: functools.partial, what: str) -> list[Case]:
    """None where it would take minutes."""
    quick = case.keywords["device"] != "cpu" or fast.bfloat16_cost(512) < 2
    return [case(f"{what}bfloat16", dtype="bfloat16")] if quick else []


# ----------------------------------------------------------------------------------------- worker


def micro_batch(shape: str, device: str) -> int:
    """The preset's own."""
    argv = ["--preset", "tiny" if shape == "tiny" else "pythia-70m", "--device", device]
    return settings.parse(argv, fedppo.MODES).settings.micro_batch


def new_model(shape: str, device: str):
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    family = "llama" if "num_key_value_heads" in SHAPES[shape] else "gpt_neox"
    config = AutoConfig.for_model(family, **SHAPES[shape])
    return AutoModelForCausalLM.from_config(config).to(device)


def now(device: str) -> float:
    """Seconds, when the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class Updates:
    """N agents, each with K references and a reward model of the policy's shape."""

    def __init__(self, case: Case):
        self.case = case
        rows, prompt, response = case.batch
        rows_at_once = case.micro_batch or micro_batch(case.shape, case.device)
        self.settings = settings.Settings(
            batch=rows, micro_batch=rows_at_once, epochs=EPOCHS, minibatches=1,
            response_length=response, rule=case.rule)
        plain = case.form == "plain"
        new_policy = ppo_core.Policy if plain else fast.policy
        new_reward_model = data.RewardModel if plain else fast.reward_model
        forbidden = torch.zeros(SHAPES[case.shape]["vocab_size"], dtype=torch.bool)
        forbidden[:2] = True  # EOS and pad: no response ends

        dtype = getattr(torch, case.dtype)

        def attending(model: torch.nn.Module) -> torch.nn.Module:
            if not plain:
                fast.eager_if_short(model, prompt + response, dtype)
            return model

        def policy() -> ppo_core.Policy:
            return new_policy(attending(new_model(case.shape, case.device)), forbidden, dtype)
        self.policies = [policy() for _ in range(case.agents)]
        self.optimizers = [torch.optim.Adam(one.parameters(), lr=1e-5, fused=True, **ppo_core.ADAM)
                           for one in self.policies]
        self.references = [policy().requires_grad_(False) for _ in range(case.references)]
        self.weights = torch.full([case.references], 1 / case.references, dtype=torch.float64)
        self.stream = torch.Generator().manual_seed(0)
        model = attending(new_model(case.shape, case.device))
        self.reward = new_reward_model(model, "last", self.stream).requires_grad_(False)
        self.score = data.model_scorer(self.reward, rows=rows_at_once)
        self.prompts = torch.randint(2, len(forbidden), (rows, prompt), generator=self.stream)
        self.prompts = self.prompts.to(case.device)
        # by_graph and not the sampler itself, which goes on without a graph where none can be made.
        self.generate = {"generate": ppo_core.generate, "transformers": by_transformers,
                         "graphs": fast.GraphSampler().by_graph}[case.sampler]

    def once(self) -> dict[str, float]:
        """One update of every agent -> seconds by phase."""
        seconds, device = dict.fromkeys(PHASES, 0.0), self.case.device

        def timed(*args, **kwargs):
            started = now(device)
            result = self.generate(*args, **kwargs)
            seconds["rollout"] += now(device) - started
            return result

        for policy, optimizer in zip(self.policies, self.optimizers, strict=True):
            started = now(device)
            rollout = ppo_core.collect(
                policy, self.references, self.weights, self.references[0], self.score,
                self.prompts, torch.ones_like(self.prompts), self.settings, eos_id=0, pad_id=1,
                generator=self.stream, generate=timed)
            collected = now(device)
            ppo_core.optimise(policy, optimizer, rollout, self.weights, 0.05, self.settings,
                              self.stream)
            seconds["scoring"] += collected - started
            seconds["optimisation"] += now(device) - collected
        seconds["scoring"] -= seconds["rollout"]
        return seconds


def by_transformers(policy: ppo_core.Policy, prompt_ids, prompt_mask, uniforms, *,
                    temperature: float, eos_id: int, pad_id: int):
    """ppo_core.generate by transformers' own, whose random numbers are the device's."""
    ids = policy.model.generate(
        input_ids=prompt_ids, attention_mask=prompt_mask, max_new_tokens=len(uniforms),
        do_sample=True, top_k=0, temperature=temperature, eos_token_id=eos_id,
        pad_token_id=pad_id, suppress_tokens=policy.forbidden_ids.tolist())
    response = ids[:, prompt_ids.shape[1]:]
    return response, torch.ones_like(response)  # EOS is a forbidden id here, so that no row ends


def prepare(case: Case) -> None:
    """This process as a run sets it up."""
    torch.set_num_threads(THREADS)
    fast.keep_memory()
    if case.device == "cpu":
        fast.use_onednn(SHAPES[case.shape]["hidden_size"])


def serve(update) -> None:
    """A worker's life: "ready", and for each line read one update, one line of JSON and "ready"."""
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = update()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps({"seconds": seconds, "peak": peak}), "ready", sep="\n", flush=True)


# --------------------------------------------------------------------------------------- main job

MAIN_JOB = ["--agents", "4", "--mode", "federated", "--preset", "tiny", "--device", "cpu"]


def large_job(folder: Path, device: str) -> list[str]:
    """The main job of the preset pythia-70m, for a GPU: its model with random weights, which is put
    into the folder with the tokenizer and on the data of the tiny world."""
    from transformers import AutoTokenizer
    model = new_model("pythia-70m", "cpu")
    model.config.update({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1})
    model.generation_config.update(bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(HERE.parent / "tiny/model").save_pretrained(folder)
    return ["--agents", "4", "--mode", "federated", "--preset", "pythia-70m", "--model",
            str(folder), "--dataset", "tiny/data", "--pairs", "600", "--device", device]


def main_job(flags: list[str]) -> dict[str, float]:
    """Seconds of `python fedppo.py` with these flags from its start to its end, by part.

    The run itself says where they went, but for how long its process takes to end.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "fedppo.py"), *flags, "--out", folder,
                   "--name", "run"]
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        total = time.perf_counter() - started
        summary = json.loads((Path(folder) / "run/summary.json").read_text(encoding="utf-8"))
    parts = summary["seconds"]
    return parts | {"end": total - sum(parts.values())}


def measure_main_job(repeats: int, device: str) -> dict[str, list | dict]:
    """Its samples, beside the floor of 160 updates with its passes, steps and references."""
    if device != "cpu":
        with tempfile.TemporaryDirectory() as folder:
            flags = large_job(Path(folder), device)
            samples = [main_job(flags) for _ in range(repeats)]
        return {"where": " on a random model of Pythia-70M's shape, --preset pythia-70m",
                "alone": samples, "floor": dict.fromkeys(samples[0], 0.0)}
    samples = [main_job(MAIN_JOB) for _ in range(repeats)]
    torch.set_num_threads(1)
    # Four policies and the initial one.
    update = floor(Case("", "tiny", references=5), passes=2, steps=4)
    names = {"rollouts": "rollout", "scoring": "scoring", "optimisation": "optimisation"}
    return {"alone": samples,
            "floor": {part: 160 * update.get(names.get(part), 0.0) for part in samples[0]}}


# --------------------------------------------------------------------------------------- schedule


def measure(cases: list[Case], repeats: int, trl_python: str) -> list[dict]:
    """All cases in turns, `repeats` times after one to warm up -> per case its samples."""
    workers = [start(case, trl_python) for case in cases]
    samples = [{"case": dataclasses.asdict(case), "updates": [], "peak": 0.0} for case in cases]
    for repeat in range(repeats + 1):
        for worker, found in zip(workers, samples, strict=True):
            worker.stdin.write("go\n")
            worker.stdin.flush()
            said = json.loads(answer(worker, '{"seconds"'))
            answer(worker, "ready")  # trl works on after its update: not into the next one's time
            found["peak"] = said["peak"]
            if repeat:
                found["updates"].append(said["seconds"])
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    return samples


def start(case: Case, trl_python: str) -> subprocess.Popen:
    """A worker that has its models."""
    script, python = ("speed_trl.py", trl_python) if case.trl else ("speed.py", sys.executable)
    worker = subprocess.Popen([python, str(HERE / script), "--worker", case.spec()], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
    answer(worker, "ready")
    return worker


def answer(worker: subprocess.Popen, start: str) -> str:
    """The worker's next line that begins so; libraries may print others."""
    for line in worker.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"a worker ended with exit code {worker.wait()}: run it by hand, "
                       f"{shlex.join(worker.args)}")


# ------------------------------------------------------------------------------------------ floor


@functools.cache
def rates(dtype: torch.dtype, rows: int, width: int, device: str) -> tuple[float, float]:
    """Measured here and now: operations per second of a matrix product of the model's own size,
    bytes per second."""
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, 4 * width, device=device).to(dtype)
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


def weights(shape: str) -> tuple[int, int, int, int]:
    """Numbers in the matrices of a layer, those of its keys and values alone, the head's, all."""
    size = SHAPES[shape]
    width, inner = size["hidden_size"], size["intermediate_size"]
    heads, layers = size["num_attention_heads"], size["num_hidden_layers"]
    keys = 2 * width * width * size.get("num_key_value_heads", heads) // heads
    # A Llama's feed-forward part has three matrices, GPT-NeoX's two.
    layer = 2 * width**2 + keys + (3 if "num_key_value_heads" in size else 2) * width * inner
    head = width * size["vocab_size"]
    return layer, keys, head, layer * layers + head * (1 if size.get("tie_word_embeddings") else 2)


def floor(case: Case, passes: int = EPOCHS, steps: int = EPOCHS) -> dict[str, float]:
    """Seconds that the update cannot be faster than, if every operation ran at the measured rates.

    passes: over the rollout;  steps: of Adam.

    Products alone are counted, 2 operations per weight and token: of the trunk at all positions but
    the last layer, which needs keys and values there and the rest at the T states, and of the head
    at these; attention and everything elementwise is left out. A decoding step reads all weights
    once; Adam reads and writes 7 float32 per weight. The first reference is the initial policy,
    whose forward is counted once.
    """
    rows, prompt, response = case.batch
    width, layers = (SHAPES[case.shape][name] for name in ("hidden_size", "num_hidden_layers"))
    layer, keys, head, every = weights(case.shape)
    tokens, dtype = rows * (prompt + response), getattr(torch, case.dtype)
    speed, bandwidth = rates(dtype, tokens, width, case.device)
    step_speed, _ = rates(dtype, rows, width, case.device)
    reward_speed, _ = rates(torch.float32, tokens, width, case.device)

    reward = 2 * layer * layers * tokens / reward_speed
    trunk = layer * ((layers - 1) * (prompt + response) + response) + keys * prompt  # per row
    forward = 2 * rows * (trunk + head * response) / speed
    read = (layer * layers + head) * (2 if case.dtype == "bfloat16" else 4)  # bytes
    step = max(2 * (layer * layers + head) * rows / step_speed, read / bandwidth)
    adam = 7 * every * 4 / bandwidth
    seconds = {
        "rollout": 2 * rows * (layer * (layers - 1) + keys) * prompt / speed + response * step,
        "scoring": (1 + case.references) * forward + reward,
        "optimisation": passes * 3 * forward + steps * adam}
    return {name: value * case.agents for name, value in seconds.items()}


# ------------------------------------------------------------------------------------------- main


def tables(results: dict) -> str:
    """speed-NAME.md from speed-NAME.json."""
    lines = [
        "# Speed of one PPO update", "",
        f"Made by `python benchmarks/speed.py {results['arguments']}` on {results['hardware']}, "
        f"torch {results['torch']}, {results['threads']} threads; {results['repeats']} updates of "
        "every case, in turns: medians [quartiles], in seconds; at Pythia's shape this project has "
        f"micro-batches of {results['micro_batch']} rows where it does not say."]
    for group, cases in results["groups"].items():
        lines += ["", f"## {group}", "", *case_table(cases)]
    if job := results.get("main job"):
        total = statistics.median(sum(parts.values()) for parts in job["alone"])
        rows = []
        for name, least in job["floor"].items():
            seconds = statistics.median(parts[name] for parts in job["alone"])
            rows.append([name, f"{seconds:.1f}", f"{seconds / total:.0%}",
                         f"{least:.1f}" if least else "–"])
        rows.sort(key=lambda row: -float(row[1]))
        lines += ["", "## main job", "",
                  f"`python fedppo.py --agents 4 --mode federated`{job.get('where', '')}: "
                  f"{total:.0f} s in one process, "
                  f"the median of {len(job['alone'])}. By part:", "",
                  *report.table("part | seconds | share | floor", rows)]
    return "\n".join(lines) + "\n"


def case_table(cases: list[dict]) -> list[str]:
    """The samples of a group, and their floors."""
    rows, first = [], None
    for found in cases:
        case, updates = found["case"], found["updates"]
        low, middle, high = statistics.quantiles([sum(one.values()) for one in updates], n=4)
        first = first or middle
        phase = {name: statistics.median(one[name] for one in updates) for name in PHASES}
        batch, _, response = Case(**case).batch
        rows.append([
            case["name"], f"{middle:.3g} [{low:.3g}, {high:.3g}]",
            *(f"{phase[name]:.3g}" for name in PHASES), f"{first / middle:.2f}",
            f"{middle / sum(found['floor'].values()):.1f}",
            f"{phase['rollout'] / found['floor']['rollout']:.1f}",
            f"{case['agents'] * batch * response / middle:.0f}", f"{found['peak']:.0f}"])
    return report.table(
        "case | one update | rollout | scoring | optimisation | times as fast as the first line | "
        "times the floor | rollout alone | response tokens per second | peak memory, MiB", rows)


def save(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(tables(results), encoding="utf-8")


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return (f"{os.cpu_count()} cores ({platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="cpu",
                        help="of the files that are written: results/speed-NAME.json, .md")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "pythia-70m"])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS,
                        help="of cases; some alone want a --name of their own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of every case, at least 2 [3]")
    parser.add_argument("--trl-python", default="",
                        help="the Python of an environment that has trl 1.12.0")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats < 2:
        parser.error("--repeats must be at least 2: a table has quartiles")
    if options.worker:
        case = Case(**json.loads(options.worker)["case"])
        prepare(case)
        serve(Updates(case).once)
        return 0
    results = {
        "arguments": shlex.join(sys.argv[1:] if argv is None else argv),
        "micro_batch": micro_batch("pythia-70m", options.device), "threads": THREADS,
        "repeats": options.repeats, "torch": torch.__version__,
        "hardware": hardware(options.device), "groups": {}}
    path = HERE / f"results/speed-{options.name}.json"
    wanted = groups(options.shapes, options.device, bool(options.trl_python))
    for group, cases in wanted.items():
        if group.split(", ")[1] in options.groups:
            prepare(cases[0])  # this process too: it measures the floor, and tells trl's workers
            measured = measure(cases, options.repeats, options.trl_python)
            results["groups"][group] = [found | {"floor": floor(case)} for found, case in
                                        zip(measured, cases, strict=True)]
            save(results, path)
    if "main job" in options.groups:
        results["main job"] = measure_main_job(options.repeats, options.device)
        save(results, path)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
