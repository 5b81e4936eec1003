"""Distillation rewards: log π_teacher − log π_θ of every token, against the logits of each sequence alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastlora.batches import policy_batch
from fastlora.lora.peft_format import save_adapter
from fastlora.lora.saved import lora_layers
from fastlora.model import ModelError
from fastlora.reward_config import DistillationConfig
from fastlora.rewards.deposits import RewardError, check_deposits
from fastlora.rewards.distillation import DistillationReward
from fastlora.rewards.models import load_reward_model
from fastlora.types import Example, Rollout
from tests.exact import make_exact_model, score_one_by_one
from tests.lora.adapters import attach_uneven
from tests.rewards.policies import TEMPERATURE, make_policy, token_rollout
from tests.tiny import EOS, make_tiny_model, make_tiny_tokenizer
from tests.tolerances import FP32_LOGPROB, FP32_ONE_ROUNDING

OTHER_RANKS = {"r": 5, "rank_pattern": {"q_proj": 0, "v_proj": 2, "gate_proj": 0, "down_proj": 7}, "lora_alpha": 9.0}
LENGTHS = (4, 0, 1, 7, 2, 7)


def make_rollout() -> Rollout:
    generator = torch.Generator().manual_seed(3)
    return token_rollout(("1+2?", "why"), [torch.randint(4, 131, (n,), generator=generator).tolist() for n in LENGTHS])


def one_by_one(model: Any, rollout: Rollout) -> Tensor:
    with torch.no_grad():
        return score_one_by_one(model, policy_batch(rollout, torch.zeros(len(LENGTHS)), mask_truncated=False), TEMPERATURE)[0]


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    save_adapter(
        attach_uneven(make_exact_model("llama"), noise=0.3, lora=OTHER_RANKS), tmp_path / "t", base_model="tiny", scaling="alpha/r"
    )
    return tmp_path / "t"


def save_teacher(folder: Path, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Path:
    make_tiny_model("llama", seed=5, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assert_rewards(reward: DistillationReward, rollout: Rollout, wanted_nt: Tensor, tolerance: float) -> None:
    deposits = reward(rollout)
    check_deposits("distillation", deposits, rollout)
    mask_nt = rollout.completion_mask_nt
    assert deposits.dense and torch.equal(deposits.step_reward_mask_nt, mask_nt)
    assert float((deposits.token_rewards_nt - wanted_nt * mask_nt).abs().max()) < tolerance
    for n, length in enumerate(LENGTHS):
        mean = float(deposits.trajectory_rewards_n[n])
        assert abs(mean - float(wanted_nt[n, :length].mean())) < tolerance if length else mean != mean


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.25])
def test_teacher_on_the_policys_weights(
    tiny_tokenizer: PreTrainedTokenizerFast, adapter_folder: Path, parts: int, clip: float | None
) -> None:
    """fp64: base + another adapter, on other modules with other ranks. top_p < 1 makes no difference; the student keeps its bits."""
    policy = make_policy(tiny_tokenizer, trainer={"gradient_accumulation_steps": parts})
    rollout = make_rollout()
    reward = DistillationReward(DistillationConfig(adapter=adapter_folder, clip=clip), policy)
    before = policy.score(rollout)
    teacher = make_exact_model("llama")
    attach_uneven(teacher, noise=0.3, lora=OTHER_RANKS)
    wanted_nt = one_by_one(teacher, rollout) - one_by_one(policy.model.module, rollout)
    assert float(wanted_nt.abs().max()) > 1
    limit = clip or 1e9
    assert_rewards(reward, rollout, wanted_nt.clamp(-limit, limit), 20 * FP32_ONE_ROUNDING)  # numbers of up to 20 nats, rounded once
    assert torch.equal(policy.score(rollout), before)


def test_the_base_as_teacher(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Named by its own name: the adapter is switched off, nothing is loaded."""
    policy, rollout = make_policy(tiny_tokenizer), make_rollout()
    wanted_nt = one_by_one(make_exact_model("llama"), rollout) - one_by_one(policy.model.module, rollout)
    assert_rewards(DistillationReward(DistillationConfig(model="tiny"), policy), rollout, wanted_nt, 20 * FP32_ONE_ROUNDING)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_another_model_as_teacher(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, implementation: str) -> None:
    """From a folder, in float32; its vocabulary has logits for more tokens than the student's."""
    teacher = save_teacher(tmp_path / "teacher", tiny_tokenizer, vocab_size=140, num_hidden_layers=3)
    policy = make_policy(tiny_tokenizer, trainer={"implementation": implementation})
    rollout = make_rollout()
    truth = make_exact_model("llama", seed=5, vocab_size=140, num_hidden_layers=3)
    wanted_nt = one_by_one(truth, rollout) - one_by_one(policy.model.module, rollout)
    assert_rewards(DistillationReward(DistillationConfig(model=str(teacher)), policy), rollout, wanted_nt, 20 * FP32_LOGPROB)


def test_a_failure_of_the_teacher_leaves_the_student(tiny_tokenizer: PreTrainedTokenizerFast, adapter_folder: Path) -> None:
    policy, rollout = make_policy(tiny_tokenizer), make_rollout()
    reward = DistillationReward(DistillationConfig(adapter=adapter_folder), policy)
    before = policy.score(rollout)
    seen = []

    def dying(*_: object) -> None:
        seen.append(set(lora_layers(policy.model.module)))
        raise MemoryError

    handle = policy.model.module.model.norm.register_forward_pre_hook(dying)
    with pytest.raises(MemoryError):
        reward(rollout)
    handle.remove()
    assert seen != [set(lora_layers(policy.model.module))], "it did not die in the teacher"
    assert torch.equal(policy.score(rollout), before)


def test_full_fine_tuning_has_a_teacher_of_its_own(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The weights that train must not move the teacher: the same name is loaded a second time."""
    folder = save_teacher(tmp_path / "both", tiny_tokenizer)
    policy = make_policy(tiny_tokenizer, str(folder), method="full")
    policy = type(policy)(policy.config, policy.model, None)
    rollout = make_rollout()
    reward = DistillationReward(DistillationConfig(model=str(folder)), policy)
    before = reward._teacher.score(rollout)
    with torch.no_grad():
        for parameter in policy.model.module.parameters():
            parameter.add_(1.0)
    assert torch.equal(reward._teacher.score(rollout), before)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"revision": "other"}])
def test_weights_are_shared_only_where_they_are_the_same(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, str]
) -> None:
    folder = save_teacher(tmp_path / "both", tiny_tokenizer)
    policy = make_policy(tiny_tokenizer, str(folder))
    assert load_reward_model(DistillationConfig(model=str(folder)), policy, "").model is policy.model
    other = load_reward_model(DistillationConfig(model=str(folder), **change), policy, "").model  # type: ignore[arg-type]
    assert other is not policy.model and str(other.module.dtype) == f"torch.{change.get('dtype', 'float32')}"


# --- what is refused at the start ---


def test_another_vocabulary_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of the same size, two tokens exchanged: the size alone would not tell."""
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=EOS)
    folder = save_teacher(tmp_path / "teacher", other)
    with pytest.raises(
        RewardError, match=r"teacher has another vocabulary than tiny: 2 of 131 tokens differ, the first is 'a', 69 here and 70"
    ):
        DistillationReward(DistillationConfig(model=str(folder)), make_policy(tiny_tokenizer))


def test_a_teacher_with_more_tokens_will_do_and_one_with_fewer_will_not(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    more = make_tiny_tokenizer()
    more.add_tokens(["<think>"])
    folder = save_teacher(tmp_path / "more", more, vocab_size=132)
    DistillationReward(DistillationConfig(model=str(folder)), make_policy(tiny_tokenizer))
    with pytest.raises(RewardError, match=r"1 of 132 tokens differ, the first is '<think>', 131 here and absent there"):
        DistillationReward(DistillationConfig(model=str(save_teacher(tmp_path / "same", tiny_tokenizer))), make_policy(more))


def test_a_teacher_with_fewer_logits_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", tiny_tokenizer, vocab_size=130)
    with pytest.raises(RewardError, match="has logits for 130 tokens and tiny, which samples, for 131"):
        DistillationReward(DistillationConfig(model=str(folder)), make_policy(tiny_tokenizer))


def test_a_prompt_that_the_teacher_cannot_read(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", tiny_tokenizer, max_position_embeddings=80)
    reward = DistillationReward(DistillationConfig(model=str(folder)), make_policy(tiny_tokenizer))
    reward.check([Example(1, "x" * 20, "")])  # and 60 of the completion
    with pytest.raises(RewardError, match=r"prompt of example 2 has 21 tokens, and .*teacher reads 80"):
        reward.check([Example(1, "x" * 20, ""), Example(2, "x" * 21, "")])


def test_a_teacher_that_is_not_there(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere/nothing"):
        DistillationReward(DistillationConfig(model="nowhere/nothing"), make_policy(tiny_tokenizer))
