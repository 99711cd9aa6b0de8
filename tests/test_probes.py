"""What is taken for granted of a model is tried: its head, and that packed rows don't see each other; and what can't be is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_config
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from distill.errors import ModelError
from distill.models.heads import backbone, head_of, logits_of
from distill.models.probes import check_head, check_packing, is_whole, stand_in

PACK = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def model_of(family: str) -> Any:
    return stand_in(AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32))


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm", "cohere", "granite", "llama4"])
def test_factors_caps_and_parts_of_other_names_are_known(family: str) -> None:
    model = model_of(family)
    check_head(model)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        right = model(input_ids=ids, use_cache=False).logits[0]
        found = logits_of(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0], head_of(model))
    assert right.abs().max() > 5  # where a cap shows
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_another_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen2")
    plain = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: plain(hidden) / 2)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM.* not those of its head: they differ by 100.*% of their spread"):
        check_head(model)


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "bloom", "mamba", "falcon", "recurrent_gemma"])
def test_rows_that_see_each_other_are_not_packed(family: str) -> None:
    with pytest.raises(ModelError, match=r"rows that are packed see each other.* Set train.trainer_args.packing: false"):
        check_packing(model_of(family), PACK)


def test_kernels_that_are_missing_are_named() -> None:
    with pytest.raises(ModelError, match=r"can't be trained on packed rows here: .*causal_conv1d.* Set train.trainer_args.packing: false"):
        check_packing(model_of("lfm2"), PACK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_don_t_are_packed_in_either_type(dtype: torch.dtype) -> None:
    model = model_of("qwen3").to(dtype)
    state, mode = torch.get_rng_state(), model.train().training
    check_head(model)
    check_packing(model, PACK)
    assert torch.equal(torch.get_rng_state(), state) and model.training is mode


def test_a_model_without_its_weights_has_a_stand_in() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("bloom"))
    assert not is_whole(model) and is_whole(stand_in(model))
    with pytest.raises(ModelError, match="see each other"):
        check_packing(stand_in(model), PACK)
