"""The command ``omni-adapter``: talk, listen, transcribe, say, wrap, doctor, bench, and what else there is.

Arguments in; text on stdout, sound into files, everything else on stderr. What can be done is done by
``OmniAdapter``; this module only asks and shows. Heavy imports stand inside the commands, so that ``--help``
is quick.
"""

import inspect
import json
import logging
import os
import ssl
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from omni_adapter.errors import ConfigError, OmniError, PromptError

if TYPE_CHECKING:
    from omni_adapter.data.sources import SourceSpec
    from omni_adapter.generation.generator import GenerationSettings
    from omni_adapter.generation.sampling import SamplingSettings
    from omni_adapter.generation.streaming import Chunk, Reply
    from omni_adapter.talker import OmniAdapter

EXIT_REFUSED = 2
"""Exit code when the request cannot be met for a reason that the message gives; wrong options give it too."""

EXIT_INTERRUPTED = 130

_MODEL_VARIABLE = "OMNI_ADAPTER_MODEL"
_CHECK_RATE = 16_000  # Hz; a recording is checked before the model is loaded, at whatever rate
_LONGEST_QUESTION_S = 30.0
_PATIENCE_S = 5.0
_WIDE = 200  # columns of a table that goes into a file

_NO_MODEL = (
    "no model was named: the tiny talker that comes with the package answers. It knows 300 words: sums, "
    "days, capitals, colours, opposites, spelling, small talk; name another with --model or "
    f"{_MODEL_VARIABLE}"
)

_messages = Console(stderr=True, highlight=False)


class _Group(TyperGroup):
    """Shows errors that were raised on purpose as one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except OmniError as error:
            _say_error(" ".join(str(error).split()))
            raise typer.Exit(EXIT_REFUSED) from error
        except KeyboardInterrupt as error:
            _note("stopped")
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    name="omni-adapter",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Give any causal language model hearing and speech, and talk to it.",
    epilog="Start with: omni-adapter doctor BASE_MODEL, then omni-adapter wrap BASE_MODEL --out talker, then "
    "omni-adapter talk question.wav --model talker",
)


def main() -> None:
    """Run the command line."""
    app()


class Dtype(StrEnum):
    """Types that a base can be loaded in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Precision(StrEnum):
    """Ways to hold the weights of a talker that only runs."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    AUTO = "auto"


class Form(StrEnum):
    """Forms in which a whole talker is written."""

    MERGED = "merged"
    PEFT = "peft"


# --- groups of options that several commands share ---


@dataclass(frozen=True)
class Where:
    """Which talker, and where it runs."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar=_MODEL_VARIABLE,
            help="Folder or Hub id of a saved talker; default: the tiny one that comes with the package.",
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cpu; default: the best there is.")
    ] = None
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto takes that of the files.")] = (
        Dtype.AUTO
    )
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Repack the weights for this machine: quicker, less memory; default: leave them as they are."
        ),
    ] = None


@dataclass(frozen=True)
class Output:
    """What becomes of the reply."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Wav file of the reply.")] = Path("reply.wav")
    play: Annotated[bool, typer.Option("--play", help="Play it too (needs the extra 'mic').")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of text as it comes.")
    ] = False


@dataclass(frozen=True)
class Decoding:
    """How the reply is made."""

    max_new_tokens: Annotated[
        int, typer.Option(help="Longest reply, in steps: a text token and a frame of sound each.")
    ] = 1024
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0
    stride: Annotated[int, typer.Option(help="Frames of sound per chunk.")] = 4
    lookahead_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames that sound waits for; default: all that matter. 1 or 2 come sooner, not exact."
        ),
    ] = None
    batch_parallel: Annotated[
        bool,
        typer.Option(
            "--batch-parallel/--no-batch-parallel",
            help="Write the text in a second row that carries no codes: better words, a little slower.",
        ),
    ] = True
    temperature: Annotated[
        float | None, typer.Option(help="Draw text at this temperature; default: the likeliest token.")
    ] = None
    top_k: Annotated[int | None, typer.Option(help="Draw text from the k likeliest tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="Draw text from tokens of this total probability.")] = (
        None
    )
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, text repeats itself less.")] = 1.0
    code_temperature: Annotated[float | None, typer.Option(help="As --temperature, for the sound.")] = None
    code_top_k: Annotated[int | None, typer.Option(help="As --top-k, for the sound.")] = None
    code_top_p: Annotated[float | None, typer.Option(help="As --top-p, for the sound.")] = None
    code_repetition_penalty: Annotated[
        float, typer.Option(help="As --repetition-penalty, for the sound.")
    ] = 1.0

    def settings(self) -> "GenerationSettings":
        """Return them as the library takes them."""
        from omni_adapter.generation.generator import GenerationSettings

        return GenerationSettings(
            max_new_tokens=self.max_new_tokens,
            text_sampling=_sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty),
            code_sampling=_sampling(
                self.code_temperature, self.code_top_k, self.code_top_p, self.code_repetition_penalty
            ),
            seed=self.seed,
            batch_parallel=self.batch_parallel,
            stride=self.stride,
            lookahead_frames=self.lookahead_frames,
        )


@dataclass(frozen=True)
class Grafts:
    """What a base is wrapped with."""

    encoder: Annotated[
        str, typer.Option(help="Folder or Hub id of a Whisper model, or a file of the whisper package.")
    ] = "openai/whisper-small"
    codec: Annotated[str, typer.Option(help="Folder or Hub id of a SNAC model.")] = "hubertsiuzdak/snac_24khz"
    tts_layers: Annotated[int, typer.Option(help="Blocks between the LM and the code heads.")] = 6
    fusion: Annotated[
        str, typer.Option(help="add keeps the base's text path exact; mean averages as the paper does.")
    ] = "add"


@dataclass(frozen=True)
class Beside:
    """Parts that come from elsewhere."""

    base: Annotated[
        str | None, typer.Option(help="Language model, if the checkpoint holds only what was added to it.")
    ] = None
    encoder: Annotated[
        str | None, typer.Option(help="Whisper model; default: the checkpoint's own, or the one it names.")
    ] = None
    codec: Annotated[
        str | None, typer.Option(help="SNAC model; default: the one that the checkpoint was trained with.")
    ] = None


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options as dataclasses."""
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {
        name: item.annotation for name, item in parameters.items() if is_dataclass(item.annotation)
    }
    expanded = [item for name, item in parameters.items() if name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        for hint in hints.values():
            hint.__metadata__[0].rich_help_panel = group.__doc__.rstrip(".")
        expanded += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]

    @wraps(command)
    def run(**values: Any) -> None:
        built = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **built)

    run.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in expanded}
    return run


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"omni-adapter {version('omni-adapter')}")
        raise typer.Exit


@app.callback()
def start(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries log.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set logging up."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
        handlers=[logging.StreamHandler()],
        force=True,
    )
    if not verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# --- commands ---


@app.command(epilog="Example: omni-adapter talk question.wav --model my-talker --out reply.wav")
@with_groups
def talk(
    audio: Annotated[
        Path | None, typer.Argument(help="A recording of the question, in any usual format.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="The question in words, alone or after the recording.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    speech: Annotated[
        bool, typer.Option("--speech/--no-speech", help="Answer in speech and text, or in text only.")
    ] = True,
    *,
    where: Where,
    output: Output,
    decoding: Decoding,
) -> None:
    """Ask a question, spoken or written; get the answer as text and speech while it is made.

    The text goes to stdout as it comes, the speech into a wav file that can be played while it grows. With
    --json, stdout gets one object instead: text, out, sampling_rate, duration_s, first_text_s, first_audio_s,
    elapsed_s, real_time_factor, steps, finish_reason.
    """
    if audio is None and text is None:
        raise PromptError("no question; pass a recording, --text 'a question', or both")
    settings = decoding.settings()
    _check_files(audio, output.out if speech else None)
    talker = _load_talker(where)
    chunks = talker.stream(audio, text=text, system=system, speak=speech, settings=settings)
    _answer(chunks, output, sampling_rate=talker.sampling_rate if speech else None)


@app.command(epilog="Example: omni-adapter listen --model my-talker --play")
@with_groups
def listen(
    system: Annotated[str | None, typer.Option(help="What the model is told beforehand.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Stop after one question.")] = False,
    *,
    where: Where,
    output: Output,
    decoding: Decoding,
) -> None:
    """Ask through the microphone: speak, then pause or press Enter. Ctrl-C ends the conversation.

    The question is heard while it is spoken, so that the answer comes soon after its end, soonest from a
    talker that was trained to hear in blocks. Needs the extra 'mic' of the package. Each reply replaces the
    one before in the wav file.
    """
    settings = decoding.settings()
    _check_files(None, output.out)
    from omni_adapter.audio.device import record_until_pause

    talker = _load_talker(where)
    rate = talker.processor.log_mel.sampling_rate
    with talker.session(system=system, settings=settings) as session:
        while True:
            question = record_until_pause(
                sampling_rate=rate,
                max_seconds=_LONGEST_QUESTION_S,
                on_ready=lambda: _note("listening; pause or press Enter when you are done"),
            )
            for block in question:
                session.append_audio(block, sampling_rate=rate)
            _answer(session.reply(), output, sampling_rate=talker.sampling_rate)
            if once:
                return
            session.prepare()


@app.command(epilog="Example: omni-adapter transcribe speech.flac --model my-talker")
@with_groups
def transcribe(
    audio: Annotated[Path, typer.Argument(help="A recording, in any usual format.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    *,
    where: Where,
) -> None:
    """Write down what is said in a recording."""
    settings = Decoding(max_new_tokens=max_new_tokens).settings()
    _check_files(audio, None)
    talker = _load_talker(where)
    question = [{"role": "user", "content": [{"type": "audio", "audio": audio}]}]
    stream = talker.stream_many([question], task="asr", settings=settings)
    _answer((chunk for _, chunk in stream), Output(as_json=as_json), sampling_rate=None)


@app.command(epilog="Example: omni-adapter say 'Good morning.' --model my-talker --out morning.wav")
@with_groups
def say(
    text: Annotated[str, typer.Argument(help="What is to be read out.")],
    *,
    where: Where,
    output: Output,
    decoding: Decoding,
) -> None:
    """Read a text out, word for word, into a wav file."""
    settings = decoding.settings()
    _check_files(None, output.out)
    talker = _load_talker(where)
    stream = talker.stream_many([[{"role": "user", "content": text}]], task="tts", settings=settings)
    _answer((chunk for _, chunk in stream), output, sampling_rate=talker.sampling_rate)


@app.command(epilog="Example: omni-adapter wrap some-org/some-model --out talker")
@with_groups
def wrap(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the talker.")],
    include: Annotated[
        str,
        typer.Option(help="Parts to copy into the folder instead of naming them: base,encoder,codec."),
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto takes that of the files.")] = (
        Dtype.AUTO
    ),
    encoder_block_seconds: Annotated[
        float | None,
        typer.Option(
            help="Hear in blocks of so many seconds, so that questions can be encoded while they are spoken; "
            "default: whole windows."
        ),
    ] = None,
    *,
    grafts: Grafts,
) -> None:
    """Give a language model hearing and speech, untrained, and save what was added.

    The base's own weights stay as they are. Until it is trained, the talker answers written questions as the
    base does; what it hears and says is noise.
    """
    _check_talker_folder(out)
    from omni_adapter.talker import OmniAdapter

    with _working(f"wrapping {base}"):
        _prepare_hub(base, grafts.encoder, grafts.codec)
        settings = {**asdict(grafts), "encoder_block_seconds": encoder_block_seconds}
        talker = OmniAdapter.wrap(base, seed=seed, dtype=dtype.value, **settings)
        talker.save_pretrained(out, include=_names(include))
    added = sum(parameter.numel() for _, parameter in talker.model.added_parameters())
    _note(
        f"saved {added / 1e6:.1f} M added parameters in {out}; "
        f"try: omni-adapter talk --text 'Hello!' --model {out}"
    )


@app.command(epilog="Example: omni-adapter export my-talker --out my-talker-merged --as merged")
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a saved talker.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the whole talker.")],
    form: Annotated[
        Form, typer.Option("--as", help="merged adds LoRA to the base's weights; peft keeps both apart.")
    ] = Form.MERGED,
) -> None:
    """Write a talker with all its parts into one folder that loads offline.

    Transformers alone loads base and encoder of it, and PEFT alone loads lora (with --as peft);
    omni_model.safetensors holds what was added.
    """
    _check_talker_folder(out)
    from omni_adapter.talker import OmniAdapter

    with _working(f"exporting {model}"):
        _prepare_hub(model)
        OmniAdapter.from_pretrained(model).export(out, form=form.value)
    _note(f"saved the whole talker in {out}")


@app.command(epilog="Example: omni-adapter push my-talker my-name/my-talker --private")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved talker.")],
    repository: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name; made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch; made if missing.")] = None,
    message: Annotated[str, typer.Option("--message", help="First line of the commit.")] = "Upload talker",
) -> None:
    """Share a saved talker: all its files and a fresh model card as one commit, which arrives whole or not.

    The card shows what lies in the folder: figures in evaluation.json ({"WER, test-clean": 0.06}), data sets
    and their licences in datasets.json ({"org/speech": "cc-by-4.0"}), recordings in samples/. Log in first
    with: hf auth login
    """
    from omni_adapter.hub import PushOptions, push_folder

    with _working(f"pushing {folder}"):
        _prepare_hub()
        options = PushOptions(private=private or None, revision=branch, commit_message=message)
        address = push_folder(folder, repository, options=options)
    _note(f"pushed to {address}")


@app.command("import", epilog="Example: omni-adapter import mini-omni gpt-omni/mini-omni --out mini-omni")
@with_groups
def import_checkpoint(
    importer: Annotated[
        str, typer.Argument(help="Whose checkpoint, such as mini-omni; a wrong name lists those there are.")
    ],
    source: Annotated[str, typer.Argument(help="Folder, file or Hub id of the checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the talker.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the checkpoint's repository.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto takes that of the files.")] = (
        Dtype.AUTO
    ),
    include: Annotated[
        str,
        typer.Option(help="Parts to copy into the folder instead of naming them: base,encoder,codec."),
    ] = "",
    *,
    beside: Beside,
) -> None:
    """Make a talker of a checkpoint that others published.

    Its weights, prompts and ways of decoding stay as they were, so that it answers as it does in its own
    code. Parts that came with the checkpoint are saved in the folder, the others are named.
    """
    _check_talker_folder(out)
    from omni_adapter.hub import HubOptions
    from omni_adapter.importers import ImportOptions, import_talker

    with _working(f"importing {source}"):
        _prepare_hub(source, *(part for part in asdict(beside).values() if part))
        options = ImportOptions(dtype=dtype.value, hub=HubOptions(revision=revision), **asdict(beside))
        talker = import_talker(importer, source, options=options)
        talker.save_pretrained(out, include=_names(include))
    _note(f"saved the talker in {out}; try: omni-adapter talk --text 'Hello!' --model {out}")


@app.command(epilog="Example: omni-adapter doctor some-org/some-model")
@with_groups
def doctor(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    load: Annotated[
        bool, typer.Option("--load", help="Load the weights too and try the model out: all checks.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA of stage 2.")] = 16,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in the estimates.")] = Dtype.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    grafts: Grafts,
) -> None:
    """Say what wrapping a model would do: what it has, what would train, what it costs, what is missing.

    Reads the config and tokenizer only, so it is quick for large models too. Ends with code 2 if the model
    cannot be wrapped.
    """
    from omni_adapter.doctor import diagnose, show

    with _working(f"looking at {base}"):
        _prepare_hub(base, grafts.encoder, grafts.codec)
        diagnosis = diagnose(base, load=load, lora_rank=lora_rank, dtype=dtype.value, **asdict(grafts))
    if as_json:
        _print_json(asdict(diagnosis))
    else:
        show(diagnosis, Console(highlight=False))
    if diagnosis.missing:
        raise typer.Exit(EXIT_REFUSED)


@dataclass(frozen=True)
class Comparing:
    """Comparing modes."""

    compare: Annotated[
        bool,
        typer.Option("--compare", help="Our precisions beside the published implementation, in one table."),
    ] = False
    shape: Annotated[
        str | None,
        typer.Option(help="What to compare: a size with random weights, such as 0.5b; or name a talker."),
    ] = None
    sections: Annotated[
        str,
        typer.Option(help="Sections, such as steps,memory; default: all but size; a wrong one lists them."),
    ] = ""
    save: Annotated[
        Path | None,
        typer.Option(help="JSON of the comparison; a run that was stopped goes on from it."),
    ] = None
    scratch: Annotated[
        Path | None, typer.Option(help="Folder that keeps the talker with random weights for the next run.")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this .svg or .png.")] = None
    markdown: Annotated[
        Path | None,
        typer.Option(help="Print the table of a saved .json; or write anew the tables that an .md marks."),
    ] = None


@app.command(epilog="Example: omni-adapter bench my-talker --seconds 5")
@with_groups
def bench(  # noqa: PLR0913 - an option is a parameter
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of a talker, or of a causal language model.")
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(help="Random weights of true size instead; a wrong name lists those there are."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights; auto takes that of the files.")] = (
        Dtype.AUTO
    ),
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cpu; default: the best there is.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; default: torch's.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the question; default: 3.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Decoding steps to time, with --compare in each round; default: 40, 8.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Repetitions of everything else; default: 5.")] = None,
    stride: Annotated[int | None, typer.Option(help="Frames of sound per chunk; default: 4.")] = None,
    only: Annotated[
        str, typer.Option(help="Parts to time, such as encoder,prefill,reply; a wrong name lists all.")
    ] = "",
    train: Annotated[
        bool,
        typer.Option("--train", help="Time a stage-3 step instead, beside the plain way; needs --random."),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Samples of a training step.")] = 4,
    length: Annotated[int, typer.Option(help="Steps of each of them.")] = 512,
    lm: Annotated[str, typer.Option(help="How the language model learns there: lora or full.")] = "lora",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    comparing: Comparing,
) -> None:
    """Time a talker on this machine: encoder, prefill, steps, codec, first sound, memory.

    Every time is a median over several rounds after one that warms up, with the shortest and the longest.
    With --train: seconds and peak memory of a training step, each way in a process of its own. With
    --compare: our precisions in turns with the published implementation, beside the floor of this machine.
    """
    timing: dict[str, Any] = {
        key: value
        for key, value in (
            ("seconds", seconds), ("steps", steps), ("rounds", rounds), ("stride", stride),
        )
        if value is not None
    }  # fmt: skip
    if comparing.markdown is not None:
        return _bench_markdown(comparing.markdown)
    if comparing.compare:
        return _bench_compare(
            model, comparing, timing=timing, device=device, threads=threads, as_json=as_json
        )
    if train:
        return _bench_training(random, dtype, lm, batch_size=batch_size, length=length, as_json=as_json)
    import torch

    from omni_adapter import bench as benchmark

    if (model is None) == (random is None):
        raise ConfigError(
            f"name either a model, or --random with one of {', '.join(benchmark.PRESETS)}; not both"
        )
    settings = benchmark.BenchSettings(only=_names(only), **timing)
    if threads is not None:
        torch.set_num_threads(threads)

    def load() -> "OmniAdapter":
        if random is not None:
            size = "float32" if dtype is Dtype.AUTO else dtype.value
            return _to_device(benchmark.random_talker(random, dtype=size), device)
        return _to_device(benchmark.load_talker(str(model), dtype=dtype.value), device)

    with _working(f"timing {model or random}"):
        _prepare_hub(*([model] if model else []))
        report = benchmark.measure(load, name=str(model or random), settings=settings)
    if as_json:
        _print_json(asdict(report))
    else:
        benchmark.show(report, Console(highlight=False))


def _bench_compare(
    model: str | None,
    comparing: Comparing,
    *,
    timing: dict[str, Any],
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compare the modes of a talker, or of a size."""
    import torch

    from omni_adapter import bench as benchmark

    if (model is None) == (comparing.shape is None):
        raise ConfigError(
            f"bench --compare takes either a talker, or --shape with one of {', '.join(benchmark.SHAPES)}"
        )
    if comparing.shape is not None and comparing.shape not in benchmark.SHAPES:
        raise ConfigError(f"no shape is called {comparing.shape!r}; there are {', '.join(benchmark.SHAPES)}")
    if comparing.plot is not None and comparing.plot.suffix not in benchmark.PLOT_SUFFIXES:
        raise ConfigError(f"--plot draws {' or '.join(benchmark.PLOT_SUFFIXES)}, got {comparing.plot.name!r}")
    settings = benchmark.settings_for(comparing.shape, sections=_names(comparing.sections) or None, **timing)
    if threads is not None:
        torch.set_num_threads(threads)
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    result = benchmark.compare(
        model or str(comparing.shape),
        settings=settings,
        device=torch.device(device) if device else best,
        say=_note,
        save=comparing.save,
        folder=comparing.scratch,
    )
    if comparing.plot is not None:
        benchmark.plot(result, comparing.plot)
        _note(f"drew {comparing.plot}")
    if as_json:
        _print_json(result)
    else:
        width = None if sys.stdout.isatty() else _WIDE
        benchmark.show_comparison(result, Console(highlight=False, width=width))


def _bench_markdown(path: Path) -> None:
    """Print the table of a comparison, or write those that a Markdown file marks."""
    from omni_adapter import bench as benchmark

    if path.suffix != ".md":
        typer.echo(benchmark.to_markdown(benchmark.read_comparison(path)), nl=False)
        return
    try:
        files = benchmark.update_markdown(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read or written: {error}") from error
    _note(f"wrote the tables of {', '.join(map(str, files))} into {path}")


def _bench_training(
    preset: str | None, dtype: Dtype, lm: str, *, batch_size: int, length: int, as_json: bool
) -> None:
    """Time a training step of a preset."""
    from omni_adapter import bench_train
    from omni_adapter.bench import PRESETS
    from omni_adapter.config import parse

    if preset is None:
        names = ", ".join(PRESETS)
        raise ConfigError(f"bench --train times random weights; pass --random with one of {names}")
    values = {
        "preset": preset,
        "batch_size": batch_size,
        "length": length,
        "dtype": "float32" if dtype is Dtype.AUTO else dtype.value,
        "lm_mode": lm,
    }
    settings = parse(bench_train.TrainBenchSettings, values, source="bench --train")
    with _working(f"timing training steps of {preset}"):
        timings = bench_train.measure_training(settings)
    if as_json:
        _print_json({"settings": asdict(settings), "timings": [asdict(timing) for timing in timings]})
    else:
        bench_train.show(timings, Console(highlight=False))


data_app = typer.Typer(
    name="data",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Look at what is to be learned.",
    epilog="Example: omni-adapter data check voiceassistant-400k --limit 1000",
)
app.add_typer(data_app)


@data_app.command(epilog="Example: omni-adapter data check rows.parquet --against test.parquet")
def check(  # noqa: PLR0913 - an option is a parameter
    source: Annotated[
        str,
        typer.Argument(
            help="Name of a published data set, path, Hub id, or a mapping: '{path: …, columns: …}'."
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Split of a data set of the Hub.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Published data set that the path is a copy of.")] = None,
    task: Annotated[
        str | None, typer.Option(help="What the rows teach; default: all that their columns allow.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows to look at, spread evenly.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another source that must not hold the same, such as the test set.")
    ] = None,
    against_split: Annotated[str | None, typer.Option(help="Likewise, another split of the source.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Talker or base that is to learn it: estimates.")
    ] = None,
    stage: Annotated[str, typer.Option(help="Stage that is estimated.")] = "align",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a training step.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Steps of the longest sample.")] = 1024,
    measure: Annotated[
        bool, typer.Option("--measure", help="Load the model and try steps here: hours.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a source holds and what is wrong with it; with --model, what training on it takes.

    Rows, hours, lengths, codes, speed of speech, silence, duplicates, languages, rejects by reason, and what
    is in the test set too. Ends with code 2 if training or prepare would refuse it.
    """
    from omni_adapter.data.check import CheckSettings, check_source
    from omni_adapter.data.check import show as show_report

    _prepare_hub(*([model] if model else []))
    spec = _source_spec(source, {"split": split, "recipe": recipe, "task": task})
    other = _other_source(spec, against, against_split)
    settings, count_steps, planned = CheckSettings(limit=limit), None, None
    if model is not None:
        from omni_adapter.estimate import plan
        from omni_adapter.training.stages import get_stage

        tasks = get_stage(stage).tasks
        with _working(f"looking at {model}"):
            planned = plan(model)
        settings = CheckSettings(limit=limit, tasks=tasks, codec=planned.processor.config.codec_spec)
        count_steps = planned.counter(max_steps=max_length)
    elif measure:
        raise ConfigError("--measure tries steps of a model: name it with --model")
    with _working(f"looking through {source}"):
        report = check_source(spec, settings=settings, against=other, count_steps=count_steps)
    console = Console(highlight=False)
    if not as_json:
        show_report(report, console)
    found = None
    if planned is not None and any(facts["rows"] for facts in report.tasks.values()):
        from omni_adapter import estimate

        tried = None
        if measure and not report.problems:
            with _working("trying steps"):
                tried = estimate.try_steps(
                    planned, spec, stage=stage, batch_size=batch_size, max_steps=max_length
                )
        found = estimate.estimate(
            planned, report, stage=stage, batch_size=batch_size, limit=spec.limit, tried=tried
        )
        if not as_json:
            console.print()
            estimate.show(found, console)
    if as_json:
        _print_json({**asdict(report), "estimate": None if found is None else asdict(found)})
    if report.problems:
        raise typer.Exit(EXIT_REFUSED)


def _source_spec(words: str, options: Mapping[str, str | None]) -> "SourceSpec":
    """A source as it is named on the command line; options win over a mapping's keys."""
    from omni_adapter.config import parse
    from omni_adapter.data.sources import SourceSpec
    from omni_adapter.training.settings import split_words

    ((_, value),) = split_words([f"--data={words}"])
    values = dict(value) if isinstance(value, Mapping) else {"path": words}
    given = {name: option for name, option in options.items() if option is not None}
    return parse(SourceSpec, values | given, source="data check")


def _other_source(spec: "SourceSpec", against: str | None, split: str | None) -> "SourceSpec | None":
    """The source to compare with; a plain path is read as the first source is."""
    if against is None:
        return None if split is None else replace(spec, split=split)
    own = _source_spec(against, {"split": split})
    is_plain = not against.lstrip().startswith("{") and Path(against).exists()
    return replace(own, columns=spec.columns, recipe=spec.recipe, task=spec.task) if is_plain else own


# --- what the commands share ---


def _answer(chunks: Iterator["Chunk"], output: Output, *, sampling_rate: int | None) -> "Reply":
    """Show and save a reply as it comes; ``sampling_rate`` is None if it is not spoken."""
    from omni_adapter.generation.streaming import Reply

    seen: list[Chunk] = []
    with ExitStack() as stack:
        stack.enter_context(closing(chunks))  # type: ignore[type-var]
        sinks = _sinks(stack, output, sampling_rate)
        for chunk in chunks:
            seen.append(chunk)
            if chunk.text and not output.as_json:
                sys.stdout.write(_printable(chunk.text))
                sys.stdout.flush()
            if len(chunk.audio):
                for sink in sinks:
                    sink(chunk.audio)
    reply = Reply.collect(seen)
    out = str(output.out) if sampling_rate is not None else None
    if output.as_json:
        _print_json(summary(reply, out=out))
    else:
        sys.stdout.write("\n")
        sys.stdout.flush()
        _note(closing_words(reply, out=out))
    return reply


def _sinks(stack: ExitStack, output: Output, sampling_rate: int | None) -> list[Callable[[Any], None]]:
    """What takes the sound: the wav file, the loudspeaker."""
    if sampling_rate is None:
        return []
    from omni_adapter.audio.device import Loudspeaker
    from omni_adapter.audio.waveform import WavWriter

    sinks: list[Callable[[Any], None]] = []
    if output.play:
        sinks.append(stack.enter_context(Loudspeaker(sampling_rate=sampling_rate)).play)
    sinks.append(stack.enter_context(WavWriter(output.out, sampling_rate=sampling_rate)).write)
    return sinks


def summary(reply: "Reply", *, out: str | None) -> dict[str, Any]:
    """Return what ``--json`` prints of a reply."""
    spoken = out is not None
    return {
        "text": reply.text,
        "out": out,
        "sampling_rate": reply.sampling_rate if spoken else None,
        "duration_s": reply.duration_s if spoken else None,
        "first_text_s": reply.first_text_s,
        "first_audio_s": reply.first_audio_s,
        "elapsed_s": reply.elapsed_s,
        "real_time_factor": reply.real_time_factor,
        "steps": reply.steps,
        "finish_reason": reply.finish_reason,
    }


def closing_words(reply: "Reply", *, out: str | None) -> str:
    """Return the line that closes a reply on a terminal."""
    words = []
    if reply.first_audio_s is not None:
        words += [
            f"first sound after {reply.first_audio_s:.2f} s",
            f"{reply.duration_s:.1f} s of sound in {reply.elapsed_s:.1f} s "
            f"(real-time factor {reply.real_time_factor:.2f})",
            f"saved to {out}",
        ]
    elif out is not None:
        words += [f"no sound in {reply.elapsed_s:.1f} s", f"{out} is empty"]
    elif reply.first_text_s is not None:
        words.append(f"first text after {reply.first_text_s:.2f} s, all after {reply.elapsed_s:.1f} s")
    if reply.finish_reason == "length":
        words.append(f"cut off after {reply.steps} steps (--max-new-tokens)")
    if reply.finish_reason == "context":
        words.append(f"cut off after {reply.steps} steps, where the base's positions end")
    return " · ".join(words)


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> "SamplingSettings":
    """Draw as soon as any of the three says how."""
    from omni_adapter.generation.sampling import SamplingSettings

    return SamplingSettings(
        do_sample=any(value is not None for value in (temperature, top_k, top_p)),
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        repetition_penalty=repetition_penalty,
    )


def _check_files(audio: Path | None, out: Path | None) -> None:
    """Refuse what cannot work before a model is loaded for minutes."""
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out {out} is a folder; name a file, such as {out / 'reply.wav'}")
        if not out.parent.is_dir():
            raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it first")
        if audio is not None and out.exists() and audio.exists() and out.samefile(audio):
            raise ConfigError(f"--out {out} is the question itself; name another file")
    if audio is not None:
        from omni_adapter.audio.waveform import read_waveform

        read_waveform(audio, sampling_rate=_CHECK_RATE)


def _check_talker_folder(out: Path) -> None:
    """Refuse to write over a file or over another talker, which may be a trained one."""
    from omni_adapter.hub import CONFIG_FILE

    if out.is_file():
        raise ConfigError(f"--out {out} is a file; name a folder")
    if (out / CONFIG_FILE).exists():
        raise ConfigError(f"--out {out} holds a talker already; remove it or name another folder")


def _load_talker(where: Where) -> "OmniAdapter":
    from omni_adapter.hub import CONFIG_FILE, TINY_TALKER
    from omni_adapter.talker import OmniAdapter

    if not where.model:
        _note(_NO_MODEL)
    model = where.model or str(TINY_TALKER)
    folder = Path(model)
    if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{folder} is no saved talker: it has no {CONFIG_FILE}; "
            f"if it is a language model, wrap it first: omni-adapter wrap {folder} --out talker"
        )
    with _working(f"loading {model}"):
        _prepare_hub(model)
        talker = OmniAdapter.from_pretrained(model, dtype=where.dtype.value, precision=_while_loading(where))
        talker = _to_device(talker, where.device)
        if where.precision and not talker.precision:
            talker.pack(where.precision.value)
    if talker.pack_report:
        _note(str(talker.pack_report))
    return talker


def _while_loading(where: Where) -> str | None:
    """The precision to load in, if the talker stays on the processor; else it is packed where it goes."""
    import torch

    moves = torch.accelerator.is_available() if where.device is None else where.device != "cpu"
    return where.precision.value if where.precision and not moves else None


def _to_device(talker: "OmniAdapter", device: str | None) -> "OmniAdapter":
    import torch

    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return talker.to(device or best)
    except (RuntimeError, AssertionError) as error:  # torch names what it lacks in either
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {device} cannot be used: {reason}; leave it out, or pass cpu") from error


def _prepare_hub(*names: str) -> None:
    """No bars and warnings from the libraries; no waiting for a Hub that cannot be reached."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if not logging.getLogger().isEnabledFor(logging.INFO):
        hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if sys.stderr.isatty():  # downloads keep theirs for people
            enable_progress_bars()
    is_remote = any(_is_remote(part) for name in names for part in (name, *_parts_of(name)))
    if is_remote and not constants.is_offline_mode() and not _is_reachable(constants.ENDPOINT):
        _note(f"{constants.ENDPOINT} cannot be reached; only what is on this machine is used")
        constants.HF_HUB_OFFLINE = True


def _is_remote(name: str) -> bool:
    """Whether a name can only be one of the Hub's."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _parts_of(name: str) -> list[str]:
    """Names of the parts that a talker's folder refers to."""
    from omni_adapter.hub import CONFIG_FILE, read_config

    if not (Path(name) / CONFIG_FILE).is_file():
        return []
    config = read_config(Path(name))
    ids = (config.base.id, config.encoder.id, config.codec.id)
    return [part for part in ids if not part.startswith("./")]


def _is_reachable(address: str) -> bool:
    """Whether anything answers there; doubts count as yes."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE_S).close()
    except urllib.error.URLError as error:
        return not isinstance(error.reason, OSError) or isinstance(error.reason, ssl.SSLError)
    except TimeoutError:
        return False
    return True


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Say what takes a while, and how long it took."""
    started_s = time.perf_counter()
    if _messages.is_terminal:
        _note(f"{what} …")
    yield
    if _messages.is_terminal:
        _note(f"done in {time.perf_counter() - started_s:.1f} s")


def _names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) != "Cc"
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _print_json(values: Mapping[str, Any] | Sequence[Any]) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, allow_nan=False))


def _note(message: str) -> None:
    _messages.print(Text(message, style="dim"), soft_wrap=True)


def _say_error(message: str) -> None:
    _messages.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)
