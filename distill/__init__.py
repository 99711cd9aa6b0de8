"""Knowledge distillation of language models on modest hardware: traces, curation, LoRA training, measurement, export.

As a library: `load_recipe`, `run_all`, `run_stage`, `read_table`, `score_rows`, and the losses; LIBRARY.md shows them. Each is loaded
when it is first asked for, so that importing this costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.library import load_recipe, read_table, run_all, run_stage, score_rows
    from distill.losses.distillation import distillation_loss, likelihood_loss

__version__ = "0.1.0"
__all__ = ["__version__", "distillation_loss", "likelihood_loss", "load_recipe", "read_table", "run_all", "run_stage", "score_rows"]

_HOMES = {
    "distillation_loss": "distill.losses.distillation",
    "likelihood_loss": "distill.losses.distillation",
    "load_recipe": "distill.library",
    "read_table": "distill.library",
    "run_all": "distill.library",
    "run_stage": "distill.library",
    "score_rows": "distill.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
