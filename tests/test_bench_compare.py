"""``bench --compare`` on a shape that is small enough: what is measured, what follows, what is refused."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from omni_adapter import ConfigError, cli
from omni_adapter.bench import (
    PRESETS,
    SECTIONS,
    SHAPES,
    compare,
    plot,
    random_talker,
    read_comparison,
    settings_for,
    show_comparison,
    to_markdown,
    update_markdown,
)
from omni_adapter.bench.bandwidth import WAYS, BandwidthMeter, summarise
from omni_adapter.bench.cost import own_import_time
from omni_adapter.bench.modes import MODES, StepWeights, tts_layers
from omni_adapter.bench.probe import Probe, run_probe
from omni_adapter.bench.reference import ReferenceModel, ReferenceTalker, draw, random_reference, shape_of
from omni_adapter.bench.table import COLUMNS, render
from omni_adapter.bench.timing import Spread, interleave
from omni_adapter.bench.workshop import Workshop

CPU = torch.device("cpu")
QUICK = settings_for(
    "tiny",
    seconds=0.3,
    rounds=1,
    steps=1,
    reply_steps=16,
    conversation_steps=16,
    length_steps=16,
    bandwidth_rounds=1,
)
IN_PROCESS = tuple(name for name in SECTIONS if name not in ("startup", "memory"))
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def result(folder):
    settings = replace(QUICK, sections=IN_PROCESS)
    return compare(
        "tiny", settings=settings, device=CPU, say=lambda line: None, save=folder / "tiny.json", folder=folder
    )


@pytest.fixture(scope="module")
def talker():
    return random_talker("tiny", tts_layers=0, fusion="mean")


# --- what is compared ---


def test_every_section_is_measured(result):
    assert list(result["sections"]) == list(IN_PROCESS)
    assert [section["error"] for section in result["sections"].values() if "error" in section] == []
    known = set(COLUMNS)
    for section in result["sections"].values():
        assert {row["mode"] for row in section.get("rows", []) if "mode" in row} <= known
        assert section["took_s"] >= 0


def test_steps_are_set_beside_their_floor(result):
    section = result["sections"]["steps"]
    rate, frame_s = section["bandwidth"]["bytes_per_s"], section["frame_s"]
    assert frame_s == 2048 / 24000
    rows = {(row["mode"], row["tts_layers"], row["text_runs"]): row for row in section["rows"]}
    assert {("reference_fp32", 0, True), ("reference_bf16", 2, True), ("plain", 0, False)} <= rows.keys()
    for (_, variant, _), row in rows.items():
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["floor_s"] == pytest.approx(row["weight_bytes"] / rate)
        assert row["floor_ratio"] == pytest.approx(row["median_s"] / row["floor_s"])
        assert row["real_time_factor"] == pytest.approx(row["median_s"] / frame_s)
        assert row["speedup"] == pytest.approx(
            rows["reference_fp32", variant, True]["median_s"] / row["median_s"]
        )
    text_head = 256 * 64  # ids, width
    running, ended = (rows["plain", 0, text_runs]["weight_bytes"] for text_runs in (True, False))
    assert running - ended == 4 * text_head
    assert rows["plain", 2, True]["weight_bytes"] > running
    assert (
        rows["reference_bf16", 0, True]["weight_bytes"] * 2 == rows["reference_fp32", 0, True]["weight_bytes"]
    )


def test_ratios_of_the_other_sections(result):
    sections = result["sections"]
    for row in sections["length"]["rows"]:
        assert row["ratio"] == pytest.approx(row["late_s"] / row["early_s"])
    many = {(row["mode"], row["conversations"]): row for row in sections["many"]["rows"]}
    for (mode, count), row in many.items():
        assert row["throughput_ratio"] == pytest.approx(count * many[mode, 1]["median_s"] / row["median_s"])
    base = next(row for row in sections["first_audio"]["rows"] if row["mode"] == "reference_fp32")
    for row in sections["first_audio"]["rows"]:
        assert row["speedup"] == pytest.approx(base["median_s"] / row["median_s"])
    assert {row["decoding"] for row in sections["codec"]["rows"]} >= {"exact", "published"}
    assert [row["size"] for row in sections["size"]["rows"]] == ["tiny"]


def test_what_cannot_be_had_is_listed(result):
    modes = result["modes"]
    measured = {row["mode"] for row in result["sections"]["steps"]["rows"]}
    for mode in MODES:
        assert (mode.name in measured) != ("not_available" in modes[mode.name])


def test_a_run_goes_on_where_it_stopped(result, folder):
    said = []
    options = {"device": CPU, "say": said.append, "folder": folder}
    path = folder / "again.json"
    kept = {**result, "sections": {name: result["sections"][name] for name in ("steps", "codec")}}
    kept["sections"]["length"] = {"error": "it broke"}
    path.write_text(json.dumps(kept))
    again = compare("tiny", settings=replace(QUICK, sections=("steps", "length")), save=path, **options)
    assert again["sections"]["steps"] == result["sections"]["steps"]
    assert "rows" in again["sections"]["length"]
    assert json.loads(path.read_text()) == again
    assert any("kept from" in line and "steps" in line for line in said)
    assert not any("== steps" in line for line in said)
    for change, message in (
        ({"seconds": 9.0}, "holds a comparison with another settings"),
        ({"rounds": 3}, "holds a comparison with another settings"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare("tiny", settings=replace(QUICK, **change), save=path, **options)
    path.write_text(json.dumps({**kept, "machine": {**kept["machine"], "threads": 99}}))
    with pytest.raises(ConfigError, match="was measured elsewhere: threads is"):
        compare("tiny", settings=QUICK, save=path, **options)


def test_a_section_that_fails_does_not_stop_the_others(folder, monkeypatch):
    def broken(workshop):
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(sys.modules["omni_adapter.bench.compare"]._SECTIONS, "codec", broken)
    settings = replace(QUICK, sections=("codec", "error"))
    found = compare("tiny", settings=settings, device=CPU, say=lambda line: None, folder=folder)
    assert found["sections"]["codec"]["error"] == "RuntimeError: no luck"
    assert "rows" in found["sections"]["error"]
    assert "Not measured, codec: RuntimeError: no luck." in to_markdown(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sections": ("speed",)}, "no section is called speed; known are startup, memory, steps"),
        ({"sizes": ("9b",)}, "no size is called 9b; known are tiny, 0.1b"),
        ({"rounds": 0}, "rounds must be positive, got 0"),
        ({"conversations": (0,)}, r"conversations must be positive numbers, got \(0,\)"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(QUICK, **change)


def test_shapes_are_presets():
    assert set(SHAPES.values()) <= set(PRESETS)


# --- the published implementation, restated ---


def test_the_reference_computes_what_the_talker_computes(talker):
    """With the talker's weights in it, its logits are the talker's: it stands for the same network."""
    shape = replace(shape_of(talker, context_steps=40, post_layers=0), rope_theta=10_000.0)
    model = random_reference(shape, dtype=torch.float32, device=CPU)
    take_weights(model, talker)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(64, (1, shape.code_rows, 12), generator=generator)
    text = torch.randint(shape.text_vocabulary, (1, 1, 12), generator=generator)
    expected = talker.model(torch.cat((codes, text), dim=1))
    offsets = torch.arange(shape.code_rows)[None, :, None] * shape.code_vocabulary + shape.text_vocabulary
    streams = torch.cat((codes + offsets, text), dim=1).expand(2, -1, -1)
    cache = model.new_cache(post=False)
    parts = [model(streams[..., :8], torch.arange(8), cache)]
    parts += [model(streams[..., step : step + 1], torch.tensor([step]), cache) for step in range(8, 12)]
    text_logits = torch.cat([text for text, _ in parts], dim=1)
    assert torch.allclose(text_logits[0], expected.text_logits[0], atol=1e-4)
    for row in range(shape.code_rows):
        logits = torch.cat([codes[row] for _, codes in parts], dim=1)
        assert torch.allclose(logits[1], expected.code_logits[0, row], atol=1e-4)


@torch.no_grad()
def take_weights(model: ReferenceModel, talker) -> None:
    lm, omni = talker.model.backbone.lm, talker.model
    model.embedding.weight.copy_(torch.cat((lm.get_input_embeddings().weight, omni.code_embedding.weight)))
    model.head.weight.copy_(torch.cat((lm.get_output_embeddings().weight, omni.code_heads.proj.weight)))
    model.norm.weight.copy_(lm.model.norm.weight)
    model.norm.eps = lm.config.rms_norm_eps
    for block, layer in zip(model.blocks, lm.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        fused = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        block.fused.weight.copy_(torch.cat(fused))
        block.fused.bias.zero_()
        block.merged.weight.copy_(attention.o_proj.weight)
        block.gate.weight.copy_(mlp.gate_proj.weight)
        block.up.weight.copy_(mlp.up_proj.weight)
        block.down.weight.copy_(mlp.down_proj.weight)
        block.attention_norm.weight.copy_(layer.input_layernorm.weight)
        block.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
        block.attention_norm.eps = block.mlp_norm.eps = lm.config.rms_norm_eps


def test_the_reference_does_what_it_is_said_to_do(talker):
    """Two rows, a cache of full length, all heads in both rows at all steps, the whole window heard."""
    shape = shape_of(talker, context_steps=64, post_layers=2)
    model = random_reference(shape, dtype=torch.float32, device=CPU)
    reference = ReferenceTalker(
        model, encoder=talker.model.audio_encoder, codec=talker.codec, stride=4, post=True
    )
    encoded = []
    hook = talker.model.audio_encoder.register_forward_pre_hook(
        lambda module, inputs: encoded.append(inputs[0].shape[-1])
    )
    rate = talker.processor.log_mel.sampling_rate
    state = reference.begin(torch.randn(rate // 5))
    hook.remove()
    assert encoded == [talker.model.audio_encoder.window_frames]  # 30 s
    assert len(state.cache) == shape.layers + 2
    assert state.cache[0][0].shape == (2, shape.heads, 64, shape.head_width)
    steps = 10 + 3  # a fifth of a second, a mark and two marks
    assert state.text_logits.shape == (2, steps, shape.text_vocabulary)
    assert [logits.shape for logits in state.code_logits] == [(2, steps, shape.code_vocabulary)] * 7
    assert reference.first_chunk_steps == 10
    for _ in range(reference.first_chunk_steps):
        reference.step(state)
    assert state.position == steps + 10
    assert reference.decode_chunk(state).shape == (4 * 2048,)
    assert model.step_weight_bytes(post=True) > model.step_weight_bytes(post=False)


def test_ids_are_the_likeliest():
    logits = torch.tensor([0.1, 2.0, -1.0])
    assert [int(draw(logits)) for _ in range(5)] == [1] * 5


def test_networks_of_other_kinds_have_no_reference(talker):
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=8, get_text_config=lambda: config)
    other = SimpleNamespace(
        model=SimpleNamespace(backbone=SimpleNamespace(lm=SimpleNamespace(config=config)))
    )
    with pytest.raises(ConfigError, match="does not say num_attention_heads, intermediate_size"):
        shape_of(other, context_steps=8, post_layers=0)


# --- parts ---


def test_weights_of_a_step():
    preset = PRESETS["tiny"]
    counted, plain = StepWeights.of_preset(preset), StepWeights.of(random_talker("tiny", tts_layers=0))
    assert counted == plain
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**preset.lm))
    whole = sum(weight.numel() for weight in lm.parameters())
    assert counted.body + counted.text_head + 256 * 64 == whole  # head and embedding are not tied
    assert counted.total(text_runs=False, tts_layers=True) == counted.body + counted.code_heads


def test_tts_blocks_can_be_left_out_for_a_while():
    talker = random_talker("tiny")
    blocks = talker.model.tts_blocks
    with tts_layers(talker, 0):
        assert len(talker.model.tts_blocks.blocks) == 0
        talker.chat(text="word", max_new_tokens=10)
    assert talker.model.tts_blocks is blocks


def test_turns_begin_with_another_each_time():
    order = []

    def contestant(name):
        return lambda: order.append(name) or 0.5

    times = interleave({name: contestant(name) for name in "abc"}, rounds=3, repeats=2, warm_up=1)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert times == {name: [0.5] * 6 for name in "abc"}
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)


def test_the_fastest_way_to_read_counts():
    measured = BandwidthMeter(CPU, size_bytes=1 << 18).measure(1)
    assert set(measured) <= set(WAYS)
    assert {"sum", "copy", "gemv_fp32", "gemv_bf16"} <= set(measured)
    assert all(rate > 0 for rates in measured.values() for rate in rates)
    found = summarise({"sum": [1.0, 9.0, 2.0], "copy": [3.0, 3.0, 3.0]})
    assert (found.best, found.bytes_per_s) == ("copy", 3.0)
    assert found.ways["sum"] == (2.0, 9.0)


def test_own_import_time_is_told_apart():
    trace = """import time: self [us] | cumulative | imported package
import time:       100 |        100 |     torch._C
import time:      2000 |       2100 |   torch
import time:       500 |       2600 | omni_adapter.talker
import time:         7 |          7 | omni_adapter_other
"""
    assert own_import_time(trace) == (pytest.approx(500e-6), pytest.approx(2607e-6))


def test_a_probe_tells_memory_and_times(result, folder):
    found = run_probe(
        Probe(
            mode="plain",
            source=str(folder / "talker-tiny"),
            device="cpu",
            threads=torch.get_num_threads(),
            seconds=0.3,
            steps=14,
            stride=4,
        )
    )
    assert 0 < found.libraries_bytes <= found.peak_bytes
    assert 0 < found.loaded_bytes <= found.peak_bytes
    assert set(found.resident_kinds) == {"anonymous", "file", "shared"}
    assert found.device_peak_bytes is None
    assert min(found.load_s, found.first_reply_s, found.second_reply_s) > 0
    json.dumps(asdict(found))


@pytest.mark.slow
def test_memory_and_start_in_processes_of_their_own(folder, result):
    settings = replace(QUICK, sections=("startup", "memory"))
    found = compare("tiny", settings=settings, device=CPU, say=lambda line: None, folder=folder)
    assert found["sections"]["memory"]["not_available"] == {}
    names = [row["mode"] for row in found["sections"]["memory"]["rows"]]
    assert {"plain", "reference_fp32", "reference_bf16"} <= set(names)
    startup = found["sections"]["startup"]
    assert 0 < startup["own_s"] < startup["traced_s"]


# --- what is shown ---


def test_table(result, capsys):
    from rich.console import Console

    console = Console(width=220)
    with console.capture() as shown:
        show_comparison(result, console)
    for words in (
        "tiny (tiny, random weights", "published, fp32", "× faster than published fp32", "× its floor",
        "end of a 0.3 s question → first sound", "step 16 / step 10", "2 at once / in turn", "exact",
        "omni-adapter bench --compare --shape tiny --seconds 0.3 --rounds 1 --steps 1 --threads",
    ):  # fmt: skip
        assert words in shown.get(), words


def test_a_busy_machine_is_told(result):
    for load, is_told in ((9.0, True), (0.1, False)):
        sections = {"codec": {**result["sections"]["codec"], "load_average": [load, 9.0]}}
        machine = {**result["machine"], "cores": 2}
        text = to_markdown({**result, "machine": machine, "sections": sections})
        assert ("busy with other work (load average 9.0 on 2 cores" in text) == is_told


def test_markdown_is_written_between_its_marks(result, folder):
    (folder / "figures.json").write_text(json.dumps(result))
    readme = folder / "README.md"
    readme.write_text("# A\n\n<!-- bench: figures.json -->\nold\n<!-- bench ends -->\n\nB\n")
    assert update_markdown(readme) == [folder / "figures.json"]
    text = readme.read_text()
    assert text == f"# A\n\n<!-- bench: figures.json -->\n{to_markdown(result)}<!-- bench ends -->\n\nB\n"
    assert render(text, folder)[0] == text
    (folder / "figures.svg").write_text("<svg/>")
    assert "](figures.svg)\n<!-- bench ends -->" in render(text, folder)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    for wrong, message in (
        ("# A\n", "there is no table to make"),
        ("<!-- bench: figures.json -->\n", "has no end"),
        ("<!-- bench: missing.json -->\n<!-- bench ends -->", "missing.json cannot be read as the JSON"),
    ):
        with pytest.raises(ConfigError, match=message):
            render(wrong, folder)


def test_the_readme_shows_what_the_json_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    updated, files = render(text, ROOT)
    assert updated == text, "make it anew: omni-adapter bench --markdown README.md"
    for file in files:
        sections = read_comparison(file)["sections"]
        assert [name for name, section in sections.items() if "error" in section] == []
        assert f"omni-adapter bench --compare --shape {read_comparison(file)['name']}" in text


def test_curves(result, folder):
    plot(result, folder / "curves.svg")
    drawn = (folder / "curves.svg").read_text()
    assert drawn.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    for words in ("step of the reply", "conversations at once", "million weights"):
        assert words in drawn
    plot(result, folder / "curves.png")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"curves are drawn as \.svg or \.png, got 'curves\.pdf'"):
        plot(result, folder / "curves.pdf")
    with pytest.raises(ConfigError, match="no curves to draw"):
        plot({**result, "sections": {}}, folder / "none.svg")


def test_files_that_hold_no_comparison(folder):
    path = folder / "other.json"
    for text in ("{}", "[1]", '{"format_version": 99, "sections": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no comparison of format 1; make one with"):
            read_comparison(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as the JSON of a comparison"):
        read_comparison(path)


def test_command(result, folder):
    def run(*arguments: str):
        return CliRunner().invoke(cli.app, ["bench", *arguments])

    path = folder / "command.json"
    kept = {key: value for key, value in result.items() if key != "settings"}
    small = ("--compare", "--shape", "tiny", "--sections", "codec", "--rounds", "1", "--steps", "1")
    done = run(*small, "--seconds", "0.3", "--save", str(path), "--scratch", str(folder), "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["sections"]) == ["codec"]
    assert read_comparison(path)["sections"].keys() == {"codec"}
    (folder / "shown.json").write_text(json.dumps({**kept, "settings": result["settings"]}))
    assert run("--markdown", str(folder / "shown.json")).stdout == to_markdown(result)
    for arguments, message in (
        (("--compare",), "takes either a talker, or --shape with one of tiny, 0.1b"),
        (("--compare", "--shape", "9b"), "no shape is called '9b'; there are tiny, 0.1b"),
        (("--compare", "--shape", "tiny", "--sections", "speed"), "no section is called speed"),
        (("--compare", "--shape", "tiny", "--plot", "a.pdf"), "--plot draws .svg or .png"),
        (("--markdown", str(folder / "absent.json")), "cannot be read as the JSON of a comparison"),
        (("--markdown", str(folder / "absent.md")), "absent.md cannot be read or written"),
    ):
        refused = run(*arguments)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert message in " ".join(refused.stderr.split())


# --- a talker of the user's own ---


def test_a_talker_by_name_keeps_its_own_blocks(folder, result):
    workshop = Workshop(
        str(folder / "talker-tiny"), settings=QUICK, device=CPU, folder=Path("nowhere"), say=lambda line: None
    )
    workshop.prepare()
    assert workshop.variants == (None,)
    with workshop.varied("plain", 0) as talker:
        assert len(talker.model.tts_blocks.blocks) == 2
    assert workshop.running("plain", steps=2)() > 0
    assert workshop.reference("reference_fp32", variant=None).post
