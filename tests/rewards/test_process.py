"""Process rewards: where steps end in token space, and what a judge says of them, against one plain forward pass per step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from fastlora.model import wrap_model
from fastlora.reward_config import ProcessConfig
from fastlora.rewards.deposits import RewardError, check_deposits
from fastlora.rewards.process import ProcessReward, StepCutter, StepWriter
from fastlora.types import Example, Rollout
from tests.exact import make_exact_model
from tests.rewards.policies import make_policy, token_rollout
from tests.tiny import EOS, EOS_ID, make_tiny_model
from tests.tolerances import FP32_LOGPROB, FP32_ONE_ROUNDING
from tests.trainer.runs import save_tiny_model

PIECES = (EOS, "a", "b", " ", "\n", ".\n", "\n\n", "\n  ", " \n", "x\ny")
"""Tokens of the tokenizer below: newlines alone, doubled, and together with other characters."""


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """One token per piece; token id = place in PIECES."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    longest = sorted(PIECES[1:], key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(p.replace(".", r"\.") for p in longest)), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so that é is two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


# --- steps in token space ---


@pytest.mark.parametrize(
    ("pieces", "steps"),
    [
        ([], []),
        (["\n"], []),
        (["\n", "\n\n", " ", "\n"], []),
        ([EOS], []),
        (["a"], [("a", 0)]),
        (["a", "b"], [("ab", 1)]),
        (["a", EOS], [("a", 1)]),
        (["a", "\n"], [("a", 1)]),
        (["a", "\n", EOS], [("a", 2)]),
        (["a", "\n", "b"], [("a", 1), ("b", 2)]),
        (["a", "\n\n", "b"], [("a", 1), ("b", 2)]),
        (["a", "\n", "\n", "b"], [("a", 2), ("b", 3)]),
        (["a", "\n", " ", "\n", "b"], [("a", 3), ("b", 4)]),
        (["a", ".\n", "b", ".\n"], [("a.", 1), ("b.", 3)]),
        (["a", "\n  ", "b"], [("a", 1), ("b", 2)]),
        (["a", " \n", "b"], [("a", 1), ("b", 2)]),
        (["\n", "a"], [("a", 1)]),
        (["\n\n", " ", "a", "\n", "b"], [("a", 3), ("b", 4)]),
        (["a", "x\ny", "b"], [("ax\ny", 1), ("b", 2)]),
        ([".\n", ".\n"], [(".", 0), (".", 1)]),
    ],
    ids=repr,
)
def test_steps(pieces: Sequence[str], steps: list[tuple[str, int]]) -> None:
    cut = StepCutter(piece_tokenizer())
    assert [(step.text, step.last) for step in cut([PIECES.index(piece) for piece in pieces])] == steps


@given(st.lists(st.sampled_from(range(len(PIECES))), max_size=12))
def test_every_token_belongs_to_one_step(ids: list[int]) -> None:
    """Told differently: number the tokens by the newlines before them; lines that show something are steps, and reach to the next one."""
    shown = ["" if i == 0 else PIECES[i] for i in ids]
    line = [sum("\n" in piece for piece in shown[:i]) for i in range(len(ids))]
    texts = {n: "".join(piece for piece, its in zip(shown, line, strict=True) if its == n).strip() for n in line}
    firsts = [line.index(n) for n in sorted(texts) if texts[n]]
    steps = StepCutter(piece_tokenizer())(ids)
    assert [step.text for step in steps] == [texts[n] for n in sorted(texts) if texts[n]]
    assert [step.last for step in steps] == [first - 1 for first in (*firsts[1:], len(ids))][: len(firsts)]


def test_a_character_of_several_tokens() -> None:
    text = "é=1\nü – 2\n\n€"
    tokenizer = byte_tokenizer()
    steps = StepCutter(tokenizer)(tokenizer(text)["input_ids"])
    assert [step.text for step in steps] == ["é=1", "ü – 2", "€"]
    assert [step.last for step in steps] == [len(s.encode()) - 1 for s in ("é=1\n", "é=1\nü – 2\n\n", text)]


# --- what the judge says ---

TAGS: dict[str, Any] = {"model": None, "step_tag": "#", "positive_tag": "+", "negative_tag": "-", "prompt_template": "Q: {question}\n"}
COMPLETIONS = ("a + b = 3\nso 4.\n", "", "\n\n", "one step", "# 1 #\n\n#\nx", "cut off\nin the mid")
"""With a completion that writes the judge's own tag, and one that ends in mid-step."""
QUESTIONS = ("1+2?", "why")


def process_rollout(tokenizer: PreTrainedTokenizerFast) -> Rollout:
    ids = [tokenizer(text)["input_ids"] for text in COMPLETIONS]
    ids[0].append(EOS_ID)
    return token_rollout(QUESTIONS, ids)


def judged_one_by_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, steps: Sequence[str]) -> list[float]:
    """P(+): the text up to each tag alone through the model, all logits, softmax of the two."""
    text, rewards = f"Q: {question}\n", []
    plus, minus = (tokenizer(tag)["input_ids"][0] for tag in "+-")
    for step in steps:
        text += f"{step} #"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False).logits[0, -1].double()
        rewards.append(float(torch.stack([logits[plus], logits[minus]]).softmax(0)[0]))
        text += "\n"
    return rewards


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[list[tuple[int, float]]]:
    """(token, reward) of every completion, its lines cut by hand."""
    lines = [["a + b = 3", "so 4."], [], [], ["one step"], ["# 1 #", "#", "x"], ["cut off", "in the mid"]]
    ends = [[9, 16], [], [], [7], [6, 8, 9], [7, 17]]  # 16: the eos; 6: behind the empty line
    return [
        list(zip(ends[n], judged_one_by_one(model, tokenizer, QUESTIONS[n // 3], lines[n]), strict=True)) for n in range(len(COMPLETIONS))
    ]


def assert_deposits(reward: ProcessReward, rollout: Rollout, wanted: list[list[tuple[int, float]]], tolerance: float) -> None:
    deposits = reward(rollout)
    check_deposits("process", deposits, rollout)
    assert not deposits.dense
    for n, pairs in enumerate(wanted):
        assert deposits.step_reward_mask_nt[n].nonzero().squeeze(1).tolist() == [place for place, _ in pairs]
        for place, value in pairs:
            assert abs(float(deposits.token_rewards_nt[n, place]) - value) < tolerance
        mean = float(deposits.trajectory_rewards_n[n])
        assert abs(mean - sum(v for _, v in pairs) / len(pairs)) < tolerance if pairs else mean != mean


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rewards_of_the_policys_own_base(tiny_tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """fp64, the adapter away, no copy of the weights; the policy is the same afterwards."""
    policy = make_policy(tiny_tokenizer)
    ids = torch.tensor([[5, 6, 7]])
    before = policy.model.module(ids).logits
    reward = ProcessReward(ProcessConfig(**TAGS, batch_size=batch_size), policy)
    assert reward._judge.model is policy.model
    wanted = expected(make_exact_model("llama").eval(), tiny_tokenizer)
    assert_deposits(reward, process_rollout(tiny_tokenizer), wanted, FP32_ONE_ROUNDING)
    assert torch.equal(policy.model.module(ids).logits, before)


def test_a_planted_shift_is_seen(tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle tells the tag's position from its neighbour's."""
    reward = ProcessReward(ProcessConfig(**TAGS), make_policy(tiny_tokenizer))
    write = reward._write.__call__

    def early(example: Example, steps: Any) -> Any:
        reading = write(example, steps)
        return type(reading)(reading.ids, [tag - 1 for tag in reading.tags])

    monkeypatch.setattr(reward, "_write", type("Early", (), {"__call__": staticmethod(early), "tags": reward._write.tags})())
    with pytest.raises(AssertionError):
        assert_deposits(reward, process_rollout(tiny_tokenizer), expected(make_exact_model("llama"), tiny_tokenizer), 1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_rewards_of_another_model(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, adapted: bool) -> None:
    """Loaded from a folder in float32, with and without an adapter."""
    from fastlora.lora.peft_format import save_adapter
    from tests.lora.adapters import attach_uneven

    truth = make_tiny_model("llama", seed=5)
    truth.save_pretrained(tmp_path / "judge")
    tiny_tokenizer.save_pretrained(tmp_path / "judge")
    changes: dict[str, Any] = {}
    if adapted:
        adapter = attach_uneven(truth)
        save_adapter(adapter, tmp_path / "adapter", base_model="judge", scaling="alpha/r")
        changes["adapter"] = tmp_path / "adapter"
    policy = make_policy(tiny_tokenizer)
    reward = ProcessReward(ProcessConfig(**{**TAGS, "model": str(tmp_path / "judge"), "device": "cpu", **changes}), policy)
    assert reward._judge.model is not policy.model
    truth.set_attn_implementation("sdpa")
    assert_deposits(reward, process_rollout(tiny_tokenizer), expected(truth, tiny_tokenizer), FP32_LOGPROB)


def test_text_beyond_the_judges_context_is_unscorable(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "short", max_position_embeddings=23)
    reward = ProcessReward(ProcessConfig(**{**TAGS, "model": str(tmp_path / "short")}), make_policy(tiny_tokenizer))
    deposits = reward(process_rollout(tiny_tokenizer))
    assert deposits.step_reward_mask_nt.any(1).tolist() == [False, False, False, True, True, False]  # 28, 18, 23 and 30 tokens
    assert deposits.trajectory_rewards_n.isnan().tolist() == [True, True, True, False, False, True]


# --- tags and templates ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_tag": "ab"}, r"not one token of tiny, but several: step_tag = 'ab' \(2: 'a', 'b'\)\. Choose"),
        ({"positive_tag": "yes", "negative_tag": "no"}, r"positive_tag = 'yes' \(3: .*\); negative_tag = 'no' \(2: 'n', 'o'\)"),
        ({"negative_tag": "+"}, "positive_tag and negative_tag are the same token"),
        ({"step_template": "{step}\n"}, r"step_template = '\{step\}\\n' must have \{step\} once and then \{tag\} once"),
        ({"step_template": "{tag}{step}"}, "step_template"),
        ({"step_template": "{step}{tag}{tag}"}, "step_template"),
        ({"device": "cuda:7"}, r"reward.process.device = 'cuda:7', but torch sees \d GPUs"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(tiny_tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        ProcessReward(ProcessConfig(**{**TAGS, **changes}), make_policy(tiny_tokenizer))


def test_a_question_that_the_template_asks_for_and_the_row_lacks(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    reward = ProcessReward(ProcessConfig(**{**TAGS, "prompt_template": "{hint} {question}"}), make_policy(tiny_tokenizer))
    good = Example(3, "prompt", "", metadata={"hint": "h"}, question="q")
    reward.check([good])
    with pytest.raises(RewardError, match=r"prompt_template: example 4: .*asks for the field \{hint\}; this row has question"):
        reward.check([good, Example(4, "prompt", "", question="q")])
    with pytest.raises(RewardError, match=r"example 5: .*asks for the field \{question\}"):
        reward.check([Example(5, "prompt", "", metadata={"hint": "h"})])


def mistral_like_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters, ▁ for a space and one before the text, bytes for what is not in the vocabulary, a bos: SentencePiece's way."""
    characters = [*map(chr, range(33, 127)), "▁", "к", "и"]
    words = ["▁к", "▁ки", "▁+", "▁-"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "к"), ("▁к", "и"), ("▁", "+"), ("▁", "-")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False)


def test_the_defaults_on_a_tokenizer_like_mistrals() -> None:
    """Math-Shepherd's own reading of its tokens: ▁ки behind each step, ▁+ and ▁- as the two judgements."""
    tokenizer = mistral_like_tokenizer()
    judge = wrap_model(make_tiny_model("mistral", vocab_size=len(tokenizer)), tokenizer, "judge")
    write = StepWriter(ProcessConfig(), judge)
    assert tokenizer.convert_ids_to_tokens([write.tags.step, write.tags.positive, write.tags.negative]) == ["▁ки", "▁+", "▁-"]
    cut = StepCutter(tokenizer)
    steps = cut(tokenizer("ки 1 + 1 = 2\n\n- so ки\n€ 2", add_special_tokens=False)["input_ids"])
    assert [step.text for step in steps] == ["ки 1 + 1 = 2", "- so ки", "€ 2"]
    reading = write(Example(0, "", "", question="What?"), steps)
    assert reading is not None
    assert reading.ids == tokenizer("What? ки 1 + 1 = 2 ки\n- so ки ки\n€ 2 ки\n")["input_ids"] and reading.ids[0] == 1
    every_tag = [i for i, token in enumerate(reading.ids) if token == write.tags.step]
    assert len(every_tag) == 5 and reading.tags == [every_tag[i] for i in (1, 3, 4)]


def test_math_shepherds_tags_are_not_smollm2s(packaged_model: Path) -> None:
    """The default tags are refused by name; others fit, and each is found behind its step."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_model)
    judge = wrap_model(make_tiny_model("llama", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8), tokenizer, "smollm2")
    with pytest.raises(RewardError, match=r"several: step_tag = 'ки' \(2: ' к', 'и'\)\. Choose"):
        StepWriter(ProcessConfig(), judge)
    write = StepWriter(ProcessConfig(step_tag="#", positive_tag=" +", negative_tag=" -"), judge)
    steps = StepCutter(tokenizer)(tokenizer("2 * 3 = 6.\n\n# 6 + 1 = 7\nso 7").input_ids)
    assert [step.text for step in steps] == ["2 * 3 = 6.", "# 6 + 1 = 7", "so 7"]
    reading = write(Example(0, "", "", question="What?"), steps)
    assert reading is not None
    assert tokenizer.decode(reading.ids) == "What? 2 * 3 = 6. #\n# 6 + 1 = 7 #\nso 7 #\n"
    assert [tokenizer.decode(reading.ids[: tag + 1]).rpartition("?")[2] for tag in reading.tags] == [
        " 2 * 3 = 6. #",
        " 2 * 3 = 6. #\n# 6 + 1 = 7 #",
        " 2 * 3 = 6. #\n# 6 + 1 = 7 #\nso 7 #",
    ]
    assert {reading.ids[tag] for tag in reading.tags} == {write.tags.step}


def test_a_tag_melted_into_its_step_is_unscorable(packaged_model: Path) -> None:
    """Without a space before it, `+` behind `=` is another token."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_model)
    judge = wrap_model(make_tiny_model("llama", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8), tokenizer, "smollm2")
    write = StepWriter(ProcessConfig(step_tag="=", positive_tag="+", negative_tag="-", step_template="{step}{tag}\n"), judge)
    cut = StepCutter(tokenizer)
    assert write(Example(0, "", "", question="q"), cut(tokenizer("so 1").input_ids)) is not None
    assert write(Example(0, "", "", question="q"), cut(tokenizer("so +").input_ids)) is None
