"""Knowledge distillation of language models on modest hardware: traces, curation, LoRA training, measurement, export."""

__version__ = "0.1.0"
