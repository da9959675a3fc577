"""A tiny talker learns eight spoken answers by heart in three stages, and says them code for code."""

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from examples.untrained_talker import make_parts
from omni_adapter import OmniAdapter, SamplingSettings
from omni_adapter.data.rows import parse_row
from omni_adapter.data.sources import JsonLines
from omni_adapter.train import run
from omni_adapter.training.log import read_log
from omni_adapter.training.loop import EXIT_FINISHED
from tests.recipes.world import small_words, write_parts, write_rows

GREEDY = SamplingSettings(temperature=0)
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}


def make_family(name: str, *, vocabulary: int, end: int) -> torch.nn.Module:
    config = FAMILIES[name](
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        tie_word_embeddings=name == "qwen2", bos_token_id=None,
        initializer_range=0.1,
        eos_token_id=end,
    )  # fmt: skip
    # The head stays as it is and its states have one norm: with small weights no answer could be certain.
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "mistral"))]
)
def test_eight_spoken_answers_by_heart(tmp_path, family):
    parts = make_parts()
    tokenizer = parts.tokenizer
    parts = parts._replace(lm=make_family(family, vocabulary=len(tokenizer), end=tokenizer.eos_token_id))
    with torch.no_grad():  # an untrained encoder tells sounds apart if they are louder than its positions
        for convolution in (parts.whisper.encoder.conv1, parts.whisper.encoder.conv2):
            convolution.weight.mul_(5)
    named = write_parts(tmp_path, parts)
    rows = write_rows(tmp_path, frames=4)
    words = [
        "--data", f"{{path: {rows}, task: TASK}}", "data.mode=pad", "data.batch_size=8",
        "optim.warmup_steps=5", "optim.weight_decay=0", "optim.final_share=0.1", "watch.log_every=20",
    ]  # fmt: skip

    def train(stage: str, out: str, start: list[str], tasks: list[str], *more: str) -> None:
        sources = [word.replace("TASK", task) for task in tasks for word in words[:2]]
        settings = small_words(tmp_path / out, *words[2:], *more)
        assert run(stage, [*start, *sources, *settings, f"stage={stage}"]) == EXIT_FINISHED
        AcceleratorState._reset_state(True)

    parts_words = [word for name, folder in named.items() for word in (f"--{name}", folder)]
    train("align", "one", [*parts_words, "model.wrap={tts_layers: 1}"], ["tts", "asr"], "optim.num_steps=60")
    lora = "model.lora={rank: 32, targets: all-linear}"
    start = ["--start", str(tmp_path / "one" / "talker")]
    train("adapt", "two", start, ["speech_to_text"], "optim.num_steps=40", lora)
    start = ["--start", str(tmp_path / "two" / "talker")]
    # Two tasks: what is said comes from the one with codes, what is written from the one without.
    both = ["speech_to_speech", "speech_to_text"]
    train("finetune", "three", start, both, "optim.num_steps=160", lora)
    last = read_log(tmp_path / "three")[-1]
    assert {name: value for name, value in last.items() if name.endswith("accuracy") and value < 1} == {}

    talker = OmniAdapter.from_pretrained(tmp_path / "three" / "talker")
    source = JsonLines([rows], name=str(rows))
    for index in range(len(source)):
        row = parse_row(source[index], task="speech_to_speech", root=tmp_path)
        reply = talker.chat(
            messages=row.messages(), max_new_tokens=64, text_sampling=GREEDY, code_sampling=GREEDY
        )
        assert reply.text == row.text_out
        with torch.inference_mode():
            expected = talker.codec.decode(row.codes_out[None])[0]
        assert torch.equal(torch.from_numpy(reply.audio), expected), f"other codes in row {index}"
