"""Models and tokenizers: loading, templates, vocabularies, devices, processes."""
