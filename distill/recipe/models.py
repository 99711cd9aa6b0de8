"""The sections that name a model: what is learned from, what learns, and what of it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill import embedded
from distill.recipe.base import PathOrName, PositiveInt, Section
from distill.recipe.servers import Server
from distill.run.digests import digests_of
from distill.run.files import digest_file, digest_json

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_WORDS = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})
"""Suffixes of a model's files besides its weights: configs, tokenizer, template, code."""


def _digest(model: str, suffixes: frozenset[str]) -> str | None:
    """SHA-256 of names and contents of a local model's files, or of its one file (GGUF); null where it is none."""
    folder = Path(embedded.resolve(model))
    if not folder.is_dir() and not (folder.suffix in suffixes and folder.is_file()):
        return None
    files = sorted(
        file
        for file in (folder.iterdir() if folder.is_dir() else [folder])
        if file.suffix in suffixes and file.is_file() and not file.name.startswith(".")
    )
    return digest_json([[file.name, digest] for file, digest in zip(files, digests_of(files), strict=True)])


# Arguments of the library's call, of which a template gets its own from the kit.
_OF_THE_CALL = frozenset(
    {
        *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now", "raise_exception"),
    }
)


class ModelSpec(Section):
    """A model by name, with everything needed to load it and to speak to it."""

    decides_no_row = frozenset({"attn_implementation", "public_name", "terms"})

    model: PathOrName
    """Hub id, local folder, or `embedded:teacher` / `embedded:student` (the tiny pair shipped with the kit)."""
    public_name: str | None = None
    """Name on the model card and in the report, e.g. the id on the Hub of what lies in a local folder; null means `model`, of a path its
    last part."""
    revision: str | None = None
    """Git revision on the Hub; null means the newest, and the manifest records which that was."""
    tokenizer: PathOrName | None = None
    """Hub id or folder of the tokenizer, where it is not the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights in memory. auto: bf16 where the device computes in it (a CPU is timed once, ~/.cache/distill-kit/cpu-precision.json), else
    fp16 on a GPU, else fp32. On a CPU the student's is also what it is trained in: a bit-equal resume on another CPU needs float32."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 loads the frozen weights in 4 bits through bitsandbytes (double quantisation): QLoRA, or a cheap teacher."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. `{enable_thinking: true}`; one that it does not read, or that changes nothing, is refused."""
    chat_template: PathOrName | None = None
    """In place of the tokenizer's chat template, for base models that bring none: `chatml`, or a file with a Jinja template. The tokens
    it writes must be single ones of the vocabulary. What is exported carries it."""
    pad_token: str | None = None
    """Padding token, only where none that differs from the end of a turn can be found in the vocabulary."""
    licence: str | None = None
    """SPDX id or name of the terms; null looks the model up in the kit's catalogue (`distill models`) and else records "unknown"."""
    terms: str | None = None
    """Where its terms can be read, or by which agreement its outputs may be learned from: a page, a contract with its date. Asked for where
    a server's name for it is all there is; it stands on the model card."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel; auto takes what transformers takes."""
    trust_remote_code: bool = False
    """Run code that a model repository brings along."""
    server: Server | None = None
    """Where it writes and reads, if not in this process: a server that is there, a host, or one that the stage starts."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_OF_THE_CALL & set(value))
        if taken:
            raise ValueError(f"{taken[0]} is what the kit itself gives or decides; only what a template reads besides can be set")
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows; of a local folder also what its files hold, so that other weights at its path are noticed."""
        return self.identity_here() | ({} if self.server is None else {"server": self.server.identity()})

    def identity_here(self) -> dict[str, Any]:
        """The same for whoever has the model in this process, wherever it writes for others."""
        tokenizer = {} if self.tokenizer is None else {"tokenizer_files": _digest(self.tokenizer, _WORDS)}
        plain = {name: value for name, value in super().identity().items() if name != "server"}
        return plain | {"files": _digest(self.model, _WEIGHTS | _WORDS), "chat_template": self._template} | tokenizer

    def tokenizer_identity(self) -> dict[str, Any]:
        """What the tokenizer's files hold, where they are in a local folder, and the template that was given."""
        return {"tokenizer_files": _digest(self.tokenizer or self.model, _WORDS), "chat_template": self._template}

    @property
    def _template(self) -> str | None:
        """The template given: a name, or the SHA-256 of the file's content."""
        given = self.chat_template
        if given is None or given == "chatml" or not Path(given).is_file():
            return given
        return digest_file(Path(given))


class LoraAdapter(Section):
    """Low-rank adapters through peft; the names are peft's own."""

    type: Literal["lora"] = "lora"
    """`lora`, or `full` for full fine-tuning."""
    r: PositiveInt = 32
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 64.0
    """Scale: the update is multiplied by alpha / r, or by alpha / sqrt(r) under rsLoRA."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter, by the ends of their names, each of which must match something, or one pattern. all-linear is every
    linear layer of the language model and its experts, but not the head, routers, and what a family reads past an adapter (of state
    spaces); dropout and DoRA leave experts out that share a tensor. `check` prints what is adapted and what is not."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (rsLoRA)."""

    @field_validator("target_modules")
    @classmethod
    def _no_head(cls, value: str | list[str]) -> str | list[str]:
        if "lm_head" in ([value] if isinstance(value, str) else value):
            raise ValueError("an adapter on lm_head would never be trained, because the loss reads its weight directly")
        return value


class FullFinetune(Section):
    """No adapter: every weight is trained."""

    type: Literal["full"]
    """`full`."""


Adapter = Annotated[LoraAdapter | FullFinetune, Field(discriminator="type")]


class Student(ModelSpec):
    """The model that learns."""

    adapter: Adapter = Field(default_factory=LoraAdapter)
    """What is trained: `{type: lora, r: 32, ...}` or `{type: full}`."""

    @model_validator(mode="after")
    def _quantised_needs_adapter(self) -> Student:
        if self.quantization != "none" and self.adapter.type == "full":
            raise ValueError("quantization: nf4 can't be trained in full; use adapter.type: lora (QLoRA)")
        return self

    @field_validator("server")
    @classmethod
    def _serves_what_was_trained(cls, value: Server | None) -> Server | None:
        if value is not None and value.urls:
            raise ValueError(
                f"a server that is there ({value.kind}) holds weights that no training changes; leave url out and take a kind that the "
                "stage starts (vllm, sglang, transformers), or leave server out, so that the student writes in this process"
            )
        return value
