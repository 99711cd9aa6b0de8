"""Peak memory and time of the distillation loss, forward and backward, against other ways to compute one. Prints Markdown.

    python scripts/bench_loss.py --tokens 2048 --hidden 896            # the bars; 15 minutes on one core, 12 GiB with Liger
    python scripts/bench_loss.py --device cuda --dtype bfloat16        # everything
    python scripts/bench_loss.py --quick                               # seconds: does it run?

Each contender gets hidden states (T, H), a head (V, H) and targets of K = 64 candidates with a rest, and gives gradients by
the hidden states, and by the head where it is trainable. Contenders:

    ours           forward KL on the candidates and the rest, plus NLL
    ours, NLL      NLL alone: what methods without targets train by
    whole logits   the same loss with the logits and their log-softmax held whole, as DistillKit computes it
    TRL NLL        plain NLL with the chunked head that SFTTrainer uses: what a step costs without distillation
    Liger JSD      chunked JSD against a dense teacher, whose own head is part of it, plus NLL; gradient by the head always

On a CPU each contender runs in a process of its own: memory is the rise of its resident peak (`ru_maxrss`) over what
stood there before, inputs included; time is the least of some repetitions in seconds of processor time, so that a busy
machine doesn't change it. On a GPU memory is the rise of `max_memory_allocated`, and time the clock's. The gradients are
in the memory of all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE, K = 151_936, 64
NLL_WEIGHT = 0.5
WARM_UP = {"tokens": 8, "hidden": 64, "vocab_size": 1024}

Inputs = dict[str, Tensor]


def inputs_of(tokens: int, hidden: int, vocab_size: int, trainable: bool, device: str | torch.device, dtype: torch.dtype) -> Inputs:
    """Hidden states, head, labels and targets: real shapes, random numbers."""
    generator = torch.Generator(device).manual_seed(0)
    place: dict[str, Any] = {"generator": generator, "device": device}
    weight_VH = torch.empty(vocab_size, hidden, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
    hidden_NH = torch.empty(tokens, hidden, dtype=dtype, device=device).normal_(0, 1, generator=generator)
    # Candidates a fixed stride apart are distinct; real ones lie as far from each other.
    first_N1 = torch.randint(vocab_size, (tokens, 1), **place)
    ids_NK = (first_N1 + torch.arange(K, device=device) * (vocab_size // K)) % vocab_size
    logits_NR = 3 * torch.randn(tokens, K + 1, **place)
    log_p_NR = logits_NR.log_softmax(-1)
    return {
        "hidden_NH": hidden_NH.requires_grad_(),
        "weight_VH": weight_VH.requires_grad_(trainable),
        "labels_N": torch.randint(vocab_size, (tokens,), **place),
        "ids_NK": ids_NK.to(torch.int32),
        "log_probs_NK": log_p_NR[:, :K].contiguous(),
        "log_rest_N": log_p_NR[:, K].contiguous(),
    }


def ours(inputs: Inputs) -> Tensor:
    """The loss of this project."""
    from distill.losses.distillation import StudentHead, distillation_loss
    from distill.losses.sparse import SparseTargets

    targets = SparseTargets("top_k", inputs["ids_NK"], inputs["log_probs_NK"], inputs["log_rest_N"])
    head = StudentHead(inputs["weight_VH"])
    return distillation_loss(inputs["hidden_NH"], head, inputs["labels_N"], targets, nll_weight=NLL_WEIGHT).loss


def ours_nll(inputs: Inputs) -> Tensor:
    """NLL alone, by this project."""
    from distill.losses.distillation import StudentHead, likelihood_loss

    return likelihood_loss(inputs["hidden_NH"], StudentHead(inputs["weight_VH"]), inputs["labels_N"]).loss


def whole_logits(inputs: Inputs) -> Tensor:
    """The same loss on whole logits."""
    log_q_NV = (inputs["hidden_NH"] @ inputs["weight_VH"].T).float().log_softmax(-1)
    log_q_NK = log_q_NV.gather(1, inputs["ids_NK"].long())
    log_rest_N = (1 - log_q_NK.exp().sum(-1)).clamp(min=1e-7).log()
    log_p_NK, log_p_N = inputs["log_probs_NK"], inputs["log_rest_N"]
    kl = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum() + (log_p_N.exp() * (log_p_N - log_rest_N)).sum()
    return kl - NLL_WEIGHT * log_q_NV.gather(1, inputs["labels_N"][:, None]).sum()


def trl_nll(inputs: Inputs) -> Tensor:
    """NLL alone, with the tile width and the outputs that SFTTrainer asks for."""
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy", "is_top1")
    log_probs_N, *_ = ChunkedLogProbFunction.apply(
        inputs["hidden_NH"], inputs["weight_VH"], None, inputs["labels_N"], 1.0, 32_768, None, 1.0, outputs
    )
    nll: Tensor = -log_probs_N.sum()
    return nll


def liger_jsd(inputs: Inputs, compiled: bool | None = None) -> Tensor:
    """JSD against a teacher of the student's shape; compiled, where not said otherwise, on a GPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    weight_VH, hidden_NH = inputs["weight_VH"], inputs["hidden_NH"]
    loss = LigerFusedLinearJSDLoss(compiled=hidden_NH.is_cuda if compiled is None else compiled)
    value: Tensor = loss(hidden_NH, weight_VH, hidden_NH.detach(), weight_VH.detach(), inputs["labels_N"])
    return value


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "ours": ours,
    "ours, NLL": ours_nll,
    "whole logits": whole_logits,
    "TRL NLL": trl_nll,
    "Liger JSD": liger_jsd,
}


def measure(contender: str, inputs: Inputs, repetitions: int) -> dict[str, float]:
    """GiB of peak memory above what stood there, and the least seconds of a forward and backward."""
    cuda = inputs["hidden_NH"].is_cuda
    before = peak_bytes(cuda, reset=True)
    times = []
    for _ in range(repetitions):
        start = clock(cuda)
        CONTENDERS[contender](inputs).backward()
        times.append(clock(cuda) - start)
        for tensor in inputs.values():
            tensor.grad = None
    return {"memory": (peak_bytes(cuda) - before) / 2**30, "time": min(times)}


def peak_bytes(cuda: bool, reset: bool = False) -> int:
    """Peak of memory: of torch's allocator on a GPU, from now on if it's reset; else of this process since its start."""
    if not cuda:
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def clock(cuda: bool) -> float:
    """Seconds: the clock's once a GPU has finished, else the processor's."""
    if not cuda:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_alone(contender: str, case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float] | str:
    """`measure` in a process of its own, or in a word why there is no result."""
    if contender == "Liger JSD" and importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    order = {"contender": contender, **case}
    command = [sys.executable, __file__, "--device", arguments.device, "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
    command += ["--repetitions", str(arguments.repetitions), "--only", json.dumps(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result
    if done.returncode < 0 or "OutOfMemoryError" in done.stderr or "not enough memory" in done.stderr:
        return "out of memory"
    raise RuntimeError(f"{contender} failed:\n{done.stderr}")


def measure_here(arguments: argparse.Namespace) -> None:
    """What `measure_alone` starts: one measurement, printed as JSON."""
    order = json.loads(arguments.only)
    contender, dtype = order.pop("contender"), getattr(torch, arguments.dtype)
    torch.set_num_threads(arguments.threads)
    # Imports, thread pools and kernels are no part of it.
    measure(contender, inputs_of(**(order | WARM_UP), device=arguments.device, dtype=dtype), 1)
    print(json.dumps(measure(contender, inputs_of(**order, device=arguments.device, dtype=dtype), arguments.repetitions)))


def table(case: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The contenders at one shape."""
    print(f"\n**T = {case['tokens']:,}, H = {case['hidden']:,}, head {'trainable' if case['trainable'] else 'frozen'}**\n")
    print("| | peak memory, GiB | of whole logits | time, s | of TRL NLL |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    results = {contender: measure_alone(contender, case, arguments) for contender in arguments.contenders}
    for contender, result in results.items():
        if isinstance(result, str):
            print(f"| {contender} | {result} | | | |")
            continue
        memory, seconds = (_ratio(result, results.get(to, ""), name) for to, name in (("whole logits", "memory"), ("TRL NLL", "time")))
        print(f"| {contender} | {result['memory']:.3f} | {memory} | {result['time']:.3f} | {seconds} |")
    sys.stdout.flush()


def _ratio(result: dict[str, float], to: dict[str, float] | str, name: str) -> str:
    return "" if isinstance(to, str) else f"{result[name] / to[name]:.2f}"


def main() -> None:
    """Prints a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of hidden states and head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 16_384], help="positions, all supervised")
    parser.add_argument("--hidden", type=int, nargs="+", default=[896, 3584], help="width of the hidden states")
    parser.add_argument("--head", nargs="+", default=["frozen", "trainable"], choices=["frozen", "trainable"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="only these")
    parser.add_argument("--repetitions", type=int, default=3, help="the least time of so many counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of a CPU")
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that everything runs; its ratios mean nothing")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        measure_here(arguments)
        return
    vocab_size = 2048 if arguments.quick else VOCAB_SIZE
    if arguments.quick:
        arguments.tokens, arguments.hidden, arguments.repetitions = [256], [64], 1
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {_hardware(arguments)}, torch {torch.__version__}, {arguments.dtype}; V = {vocab_size:,}, K = {K}"
    )
    for hidden in arguments.hidden:
        for tokens in arguments.tokens:
            for head in arguments.head:
                table({"tokens": tokens, "hidden": hidden, "vocab_size": vocab_size, "trainable": head == "trainable"}, arguments)


def _hardware(arguments: argparse.Namespace) -> str:
    if arguments.device != "cpu":
        return str(torch.cuda.get_device_name())
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return f"{processor}, {arguments.threads} of {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
