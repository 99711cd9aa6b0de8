"""Makes the pair that is shipped in distill/embedded: a tiny teacher, a tiny base student, and problems neither has seen.

    python scripts/build_tiny_pair.py

Both are of the Qwen3 architecture, share a byte-level tokenizer and a ChatML template, and are trained on worked solutions
drawn anew for every step (scripts/tiny_task.py). The teacher sees problems of one to four operations until it solves them.
The base student knows most single steps: it is drilled in conversations in which the user asks for the next step again and
again. Asked a whole question it works out bare ones of two operations and guesses at the rest, which is mostly wrong; working
step by step, unasked, to the end is what it is to learn from the teacher. Its matrices are trained by Muon: after 200 steps of
64 rows the loss was 0.84, AdamW's 1.26.
The shipped problems are drawn before any training, and left out of it. Seeded; the digests in RECORD.json are those of one
machine and number of threads, since sums round differently on another.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tiny_task
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill import __version__
from distill.engines import requests_for
from distill.engines.hf import HFEngine
from distill.models.chat import IGNORE, ChatFormat, chat_format
from distill.recipe.base import Sampling
from distill.run.clock import versions
from distill.run.schema import prompt_id

TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
PROBLEM_OPERATIONS = (2, 2, 2, 2, 3, 3, 3, 3, 3, 4)  # of the shipped problems, drawn from evenly
NUM_PROBLEMS = 2_400
NUM_MEASURED = 800
VOCABULARY = 512


@dataclass(frozen=True)
class ModelPlan:
    """A model of the pair and how it is trained."""

    hidden_size: int
    num_layers: int
    steps: int
    learning_rate: float
    operations: tuple[int, ...]
    """Of its training problems, drawn from evenly."""
    seed: int
    batch: int = 64
    muon: float = 0.0
    """Learning rate of Muon for the matrices; 0 trains them by AdamW too."""
    drilled: float = 0.0
    """Share of rows in which every step is asked for; of the others, most questions are answered by a guess."""


TEACHER = ModelPlan(128, 4, 2_400, 2e-3, (1, 2, 2, 3, 3, 3, 4, 4), seed=1)
STUDENT = ModelPlan(96, 4, 1_200, 3e-3, (1, 2, 2, 3, 3, 4, 4), seed=2, batch=32, muon=1e-2, drilled=0.6)
PLANS = {"teacher": TEACHER, "student": STUDENT}


def main() -> None:
    """Builds everything into the folder asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "distill" / "embedded"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: distill/embedded)")
    parser.add_argument("--models", nargs="+", choices=list(PLANS), default=list(PLANS), help="build only these")
    parser.add_argument("--threads", type=int, default=2, help="of torch; another number can change the last bits")
    parser.add_argument("--steps", type=int, help="train both models only so long, to try the script")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    problems = draw_problems(NUM_PROBLEMS, seed=7)
    lines = [json.dumps({"question": problem.question, "answer": str(problem.answer)}) for problem in problems]
    (arguments.out / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    chat = chat_format(make_tokenizer(seed=0))
    record = arguments.out / "RECORD.json"
    measured = json.loads(record.read_text(encoding="utf-8"))["measured"] if record.exists() else {}
    for name in arguments.models:
        start, plan = time.perf_counter(), PLANS[name]
        model = make_model(plan, chat)
        train(model, chat, plan, arguments.steps or plan.steps, {problem.question for problem in problems}, name)
        folder = arguments.out / name
        save(model, chat, folder)
        measured[name] = measure(folder, chat, problems[:NUM_MEASURED], sampled=name == "teacher")
        measured[name] |= {"wall_s": round(time.perf_counter() - start), "threads": arguments.threads}
        print(name, measured[name])
    write_record(arguments.out, measured)


def draw_problems(count: int, seed: int) -> list[tiny_task.Problem]:
    """Distinct problems, none of which is used in training."""
    rng = random.Random(seed)
    found: dict[str, tiny_task.Problem] = {}
    while len(found) < count:
        problem = tiny_task.problem(rng, rng.choice(PROBLEM_OPERATIONS))
        found[problem.question] = problem
    return list(found.values())


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries, digits one by one, learned from the task's own text."""
    rng = random.Random(seed)
    texts = []
    for _ in range(4_000):
        problem = tiny_task.problem(rng, rng.randint(1, 4))
        solution = tiny_task.solution(rng, problem.expression)
        texts += [problem.question, solution.replace("<think>", "").replace("</think>", "")]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tags = ["<think>", "</think>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(tags), special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(tags)  # not special, as in Qwen3: decoding keeps them
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(plan: ModelPlan, chat: ChatFormat) -> Qwen3ForCausalLM:
    """A randomly initialised model of a plan."""
    torch.manual_seed(plan.seed)
    config = Qwen3Config(
        vocab_size=64 * math.ceil(len(chat.tokenizer) / 64),
        hidden_size=plan.hidden_size,
        intermediate_size=3 * plan.hidden_size,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.hidden_size // 32,
        num_key_value_heads=max(1, plan.hidden_size // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=chat.end_of_turn_id,
        pad_token_id=chat.pad_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, chat: ChatFormat, plan: ModelPlan, steps: int, left_out: set[str], name: str) -> None:
    """Trains by the negative log-likelihood of the completion, AdamW with warm-up and cosine decay."""
    optimizers = _optimizers(model, plan)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(steps)) for optimizer in optimizers]
    model.train()
    bar = tqdm(_batches(chat, plan, steps, left_out), total=steps, desc=name, unit=" steps")
    for input_ids, labels in bar:
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        supervised = targets != IGNORE
        loss = cross_entropy(model.lm_head(hidden[supervised]), targets[supervised])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al., 2024), in fp32 and for all matrices of a shape at once.

    `torch.optim.Muon` computes in bf16, which CPUs without bf16 emulate: a step took 0.27 s there, beside 0.32 s of the
    model's own work (batch 32, one thread).
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody gives a closure
        """Moves every matrix by its update, scaled to the size an update of AdamW has."""
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in self.param_groups[0]["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, matrices in by_shape.items():
            gradient = torch.stack([matrix.grad for matrix in matrices if matrix.grad is not None])
            state = self.state[matrices[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 0.05)
            update = _orthogonal(gradient.lerp(momentum, 0.95)) * (0.2 * max(shape) ** 0.5 * self.param_groups[0]["lr"])
            for matrix, change in zip(matrices, update, strict=True):
                matrix.sub_(change)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly orthogonal matrices with the singular vectors of those given: five Newton-Schulz steps with Jordan's numbers."""
    wide: torch.Tensor = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide


def _optimizers(model: Qwen3ForCausalLM, plan: ModelPlan) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices, and AdamW for the embedding and the norms alone."""
    matrices = [p for name, p in model.named_parameters() if plan.muon and p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return [adamw, Muon(matrices, plan.muon)] if plan.muon else [adamw]


def _warmup_cosine(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor


def _batches(chat: ChatFormat, plan: ModelPlan, steps: int, left_out: set[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`input_ids` and `labels` of `plan.batch` rows of similar length, drawn anew each time."""
    rng = random.Random(plan.seed)
    pool: list[list[tuple[list[int], list[int]]]] = []
    for _ in range(steps):
        if not pool:
            rows = sorted((_row(chat, plan, rng, left_out) for _ in range(16 * plan.batch)), key=lambda row: len(row[0]))
            pool = [rows[start : start + plan.batch] for start in range(0, len(rows), plan.batch)]
            rng.shuffle(pool)
        batch = pool.pop()
        longest = max(len(input_ids) for input_ids, _ in batch)
        yield (
            torch.tensor([ids + [chat.pad_id] * (longest - len(ids)) for ids, _ in batch]),
            torch.tensor([labels + [IGNORE] * (longest - len(labels)) for _, labels in batch]),
        )


def _row(chat: ChatFormat, plan: ModelPlan, rng: random.Random, left_out: set[str]) -> tuple[list[int], list[int]]:
    while True:
        problem = tiny_task.problem(rng, rng.choice(plan.operations))
        if problem.question not in left_out:
            break
    if plan.drilled and rng.random() < plan.drilled:
        return _dialogue(chat, problem, rng)
    bare = problem.expression in problem.question
    guessed = plan.drilled and not (bare and problem.operations <= 2)
    completion = tiny_task.guess(problem.answer) if guessed else tiny_task.solution(rng, problem.expression)
    return chat.row(_messages(problem), completion)


def _dialogue(chat: ChatFormat, problem: tiny_task.Problem, rng: random.Random) -> tuple[list[int], list[int]]:
    """A row in which every step is asked for by the user, and every answer is supervised."""
    messages = [{"role": "user", "content": f"Next step: {problem.question}"}]
    input_ids: list[int] = []
    labels: list[int] = []
    for line in tiny_task.lines(rng, problem.expression):
        row_ids, row_labels = chat.row(messages, line)
        assert row_ids[: len(input_ids)] == input_ids
        input_ids, labels = row_ids, labels + row_labels[len(labels) :]
        messages += [{"role": "assistant", "content": line}, {"role": "user", "content": "Next step"}]
    return input_ids, labels


def _messages(problem: tiny_task.Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def save(model: Qwen3ForCausalLM, chat: ChatFormat, folder: Path) -> None:
    """Writes the model in half precision, with its tokenizer and generation config."""
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id)
    model.half().save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def measure(folder: Path, chat: ChatFormat, problems: list[tiny_task.Problem], *, sampled: bool) -> dict[str, Any]:
    """Accuracies of what was saved, as it will be loaded: in single precision, through the kit's own engine."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    record: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters()), "problems": len(problems)}
    record["greedy"] = accuracy(model, chat, problems, Sampling(temperature=0.0, max_new_tokens=192, batch_size=128))
    if sampled:
        record["temperature_1"] = accuracy(model, chat, problems, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=192, batch_size=128))
    return record


def accuracy(model: Qwen3ForCausalLM, chat: ChatFormat, problems: list[tiny_task.Problem], sampling: Sampling) -> dict[str, float]:
    """Share of problems whose answer ends, and ends in the right box; and the mean number of tokens written."""
    engine = HFEngine(model, chat, sampling)
    rows = [{"prompt_id": prompt_id(_messages(p)), "messages": _messages(p), "reference": str(p.answer)} for p in problems]
    requests = requests_for(rows, 1, seed=0)
    right, tokens = [], []
    for request, completion in zip(requests, engine.complete(requests), strict=True):
        right.append(completion.finish_reason == "stop" and completion.text.endswith(f"\\boxed{{{request.reference}}}"))
        tokens.append(len(completion.completion_ids or []))
    return {"accuracy": round(float(np.mean(right)), 4), "mean_tokens": round(float(np.mean(tokens)), 1)}


def write_record(out: Path, measured: dict[str, Any]) -> None:
    """Writes RECORD.json: plans, accuracies, digests and what they were made with."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".jinja", ".safetensors"))
    record = {
        "plans": {name: asdict(plan) for name, plan in PLANS.items()},
        "measured": measured,
        "sha256": {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name != "RECORD.json"},
        "made": {
            "date": datetime.now(UTC).date().isoformat(),
            "kit": __version__,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "packages": versions(("torch", "transformers", "tokenizers")),
        },
    }
    (out / "RECORD.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
