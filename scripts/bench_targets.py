"""Bytes a token and speed of stored targets, on distributions shaped like a language model's. Prints Markdown.

    python scripts/bench_targets.py                       # a few minutes on one core

Logits are (ln u + noise) · s over V = 151,936 tokens: u the unigram frequencies, Gaussian noise for what the context
says, s a sharpness drawn log-normally for each position, so that entropy is heavy-tailed: many positions are almost
certain, some spread over thousands of tokens. Its median is set so that 50 draws hit about 12 distinct ids on average, as
arXiv 2503.16870 reports. `uniform ids` takes all tokens as equally frequent, which no language does and which is the
hardest case for storage; `Zipf ids` takes u ∝ 1 / (rank + 10).

Decoding reads rows in random order from complete shards in the page cache, checksums compared, to padded arrays. Speeds
are positions a second of one core's own time, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from distill.targets.codec import Targets, concatenate
from distill.targets.files import TargetReader, TargetWriter
from distill.targets.kinds import MassSummary, chosen_token, sampled, top_k, uniforms
from distill.targets.spec import ChosenToken, Sampled, TargetHeader, TargetSpec, TopK

VOCAB_SIZE = 151_936
SPECS: dict[str, TargetSpec] = {
    "sampled, 50 draws": Sampled(),
    "sampled, 50 stratified draws": Sampled(stratified=True),
    "sampled, 50 draws, τ = 1.25": Sampled(proposal_temperature=1.25),
    "sampled, 50 draws, τ = 0.8": Sampled(proposal_temperature=0.8),
    "top_k, 64": TopK(k=64),
    "top_k, 64, p ≥ 1e-5": TopK(k=64, min_probability=1e-5),
    "top_k, 16": TopK(k=16),
    "chosen_token": ChosenToken(),
}
SECONDS = 2.0
CHUNK = 128


def logits(kind_of_ids: str, positions: int) -> Iterator[torch.Tensor]:
    """Chunks of (CHUNK, V) logits, the same for every call."""
    rng = np.random.default_rng(0)
    zipf = kind_of_ids == "Zipf ids"
    unigram_V = -np.log(rng.permutation(VOCAB_SIZE) + 10.0) if zipf else np.zeros(VOCAB_SIZE)
    for _ in range(positions // CHUNK):
        noise = rng.standard_normal((CHUNK, VOCAB_SIZE), dtype=np.float32) * (2 if zipf else 1)
        sharpness = np.exp(rng.normal(1.15 if zipf else 2.37, 0.8, (CHUNK, 1)))
        yield torch.from_numpy(((unigram_V + noise) * sharpness).astype(np.float32))


def targets_of(spec: TargetSpec, chunk: torch.Tensor, key: str, start: int) -> Targets:
    """The targets of a chunk that begins at position `start` of its trace."""
    if isinstance(spec, TopK):
        return top_k(chunk, spec, VOCAB_SIZE)
    if isinstance(spec, Sampled):
        return sampled(chunk, spec, VOCAB_SIZE, uniforms(spec, key, start + len(chunk))[start:])
    written = torch.multinomial(chunk.softmax(-1), 1, generator=torch.Generator().manual_seed(start))[:, 0]
    return chosen_token(chunk, written, VOCAB_SIZE)


def traces(kind_of_ids: str, positions: int, length: int) -> tuple[dict[str, list[Targets]], MassSummary]:
    """For each spec, the targets of traces of `length` positions, and what the distributions hold."""
    parts: dict[str, list[Targets]] = {name: [] for name in SPECS}
    summary = MassSummary(VOCAB_SIZE)
    for index, chunk in enumerate(logits(kind_of_ids, positions)):
        trace, start = divmod(index * CHUNK, length)
        summary.add(chunk)
        for name, spec in SPECS.items():
            parts[name].append(targets_of(spec, chunk, f"trace {trace}", start))
    step = length // CHUNK
    return {name: [concatenate(chunks[i : i + step]) for i in range(0, len(chunks), step)] for name, chunks in parts.items()}, summary


def measure(spec: TargetSpec, rows: list[Targets], copies: int, folder: Path) -> tuple[float, float, float, float]:
    """Bytes a token, candidates a token, and positions written and read a second of processor time."""
    header = TargetHeader(
        target=spec,
        vocab_size=VOCAB_SIZE,
        teacher_model="synthetic",
        teacher_revision=None,
        tokenizer_digest="0" * 64,
        template_digest="0" * 64,
        teacher_tokenizer_digest="1" * 64,
        teacher_template_digest="1" * 64,
        traces_digest="0" * 64,
    )
    path = folder / "targets-00000.targets"
    start = time.process_time()
    with TargetWriter(path, header) as writer:
        for copy in range(copies):
            for index, row in enumerate(rows):
                writer.append(f"{index:016x}/{copy}", row)
        writer.close()
    positions = copies * sum(map(len, rows))
    write_s = time.process_time() - start
    reader = TargetReader([path])
    order = np.random.default_rng(1)
    read, start = 0, time.process_time()
    while time.process_time() - start < SECONDS:
        read += len(reader[int(order.integers(len(reader)))])
    read_s = time.process_time() - start
    candidates = sum(int((row.log_probs > -np.inf).sum()) for row in rows) / sum(map(len, rows))
    size = path.stat().st_size
    path.unlink()
    return size / positions, candidates, positions / write_s, read / read_s


def main() -> None:
    """Prints a table for each kind of ids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=2048, help="distributions made for each kind of ids")
    parser.add_argument("--length", type=int, default=512, help=f"positions of a trace, a multiple of {CHUNK}")
    parser.add_argument("--copies", type=int, default=8, help="times each trace is written")
    arguments = parser.parse_args()
    if arguments.length % CHUNK or arguments.positions % arguments.length:
        parser.error(f"--length must be a multiple of {CHUNK} and divide --positions")
    torch.set_num_threads(1)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {_processor()}, one core, Python {platform.python_version()}, numpy {np.__version__}; ", end="")
    print(f"V = {VOCAB_SIZE:,}, traces of {arguments.length} tokens\n")
    for kind_of_ids in ("uniform ids", "Zipf ids"):
        by_spec, summary = traces(kind_of_ids, arguments.positions, arguments.length)
        held = ", ".join(f"{k}: {mass:.3f}" for k, mass in summary.captured_mass.items())
        print(f"**{kind_of_ids}**: {summary.distinct_ids[50]:.1f} distinct ids in 50 draws (expected); mass in the top k: {held}\n")
        print("| target | candidates/token | bytes/token | positions encoded and written/s | positions read and decoded/s |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name, rows in by_spec.items():
            with tempfile.TemporaryDirectory() as folder:
                size, candidates, written, read = measure(SPECS[name], rows, arguments.copies, Path(folder))
            print(f"| {name} | {candidates:.1f} | {size:.2f} | {written:,.0f} | {read:,.0f} |")
        print()


def _processor() -> str:
    """Name of the processor, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
