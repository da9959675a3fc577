"""The front door: wrap a causal LM, talk to it, save and share what was added.

Recordings, text or messages in; chunks of text and sound out. Everything else is done by the parts it holds.
"""

import difflib
import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from omni_adapter import hub
from omni_adapter.audio.codec import Codec
from omni_adapter.audio.features import LogMel
from omni_adapter.audio.waveform import AudioSource
from omni_adapter.backbone import Backbone, take_adapter
from omni_adapter.config import OmniConfig, dump, parse
from omni_adapter.data.layout import Task, get_task
from omni_adapter.data.processor import (
    Message,
    OmniProcessor,
    find_text_end_ids,
    task_of,
    tokenizer_fingerprint,
)
from omni_adapter.engine import PackReport, PackSettings, let_go, light, pack
from omni_adapter.errors import CheckpointError, ConfigError, PromptError
from omni_adapter.generation.batcher import Batcher, Request
from omni_adapter.generation.generator import Decoder, GenerationSettings
from omni_adapter.generation.sampling import CodeAutomaton
from omni_adapter.generation.schedule import Schedule
from omni_adapter.generation.streaming import Chunk, Rendering, Reply, stream_chunks
from omni_adapter.hearing import Blocks
from omni_adapter.model import ADDED_GROUPS, OmniModel
from omni_adapter.model_card import CardFacts
from omni_adapter.session import HearingMode, Session, SessionSettings

logger = logging.getLogger(__name__)

_QUIET = 30  # how far noise lies below full scale

EXPORT_FORMS = ("merged", "peft")
"""What becomes of LoRA when a whole talker is exported."""


class OmniAdapter:
    """A causal LM that hears and speaks. Make one with :meth:`wrap` or :meth:`from_pretrained`.

    Attributes:
        model: the LM with everything that was grafted onto it, a ``torch.nn.Module``.
        processor: lays prompts out.
        codec: turns codes into sound.
        config: what is saved with a checkpoint.
        datasets: what it was trained on: Hub id or name, and the licence of each.
        pack_report: what ``precision`` did to the weights, None without.
    """

    def __init__(
        self,
        model: OmniModel,
        *,
        processor: OmniProcessor,
        codec: Codec,
        config: OmniConfig,
        datasets: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.codec = codec
        self.config = config
        self.datasets = dict(datasets or {})
        self.pack_report: PackReport | None = None

    @classmethod
    def wrap(  # noqa: PLR0913 - each says what a talker is made of
        cls,
        base: str | Path | PreTrainedModel,
        *,
        encoder: Any = "openai/whisper-small",
        codec: Any = "hubertsiuzdak/snac_24khz",
        tts_layers: int = 6,
        fusion: str = "add",
        tokenizer: Any = None,
        text_end_ids: Sequence[int] | None = None,
        seed: int = 0,
        precision: str | None = None,
        **settings: Any,
    ) -> Self:
        """Graft hearing and speech onto a causal LM. Its weights, embeddings and vocabulary stay as they are.

        Args:
            base: Hub id, folder, or a loaded causal LM of transformers; or an adapter of PEFT in any of these
                forms, with its base.
            encoder: Hub id, folder, a checkpoint file of the ``whisper`` package, or a loaded Whisper model.
            codec: Hub id or folder of a SNAC model, or any object with the members of ``Codec``.
            tts_layers: transformer blocks between the LM and the code heads.
            fusion: ``add`` leaves the base's text path exact; ``mean`` averages text and codes as the paper
                does.
            tokenizer: the base's tokenizer; None loads it.
            text_end_ids: ids that end a text; None takes those of the chat template, tokenizer and generation
                config.
            seed: of the new weights.
            precision: repack the weights for this machine, to run only; see :meth:`pack`.
            **settings: where to look, as in transformers: ``revision`` (of the base), ``token``,
                ``cache_dir``, ``local_files_only``; how to load the base: ``dtype``, ``device_map``,
                ``attn_implementation``, ``quantization_config``, …; ``base_adapter``, the Hub id or folder of
                an adapter of PEFT to put onto the base, which stays beside its weights and never learns, so
                that text comes out as PEFT has it, or with ``merge_base_adapter`` is added to them; and any
                other key of :class:`OmniConfig`: ``audio_adapter``, ``tts``, ``delay``, ``encoder_padding``,
                ``encoder_block_seconds``, ``prompt_format``, ``text_marks``, ``code_rule``.

        Raises:
            BackboneError: if the base lacks something that hearing or speaking needs; the message names it.
            ConfigError: if a setting is unknown or has a wrong value.
        """
        options, lm_arguments, settings = hub.sort_arguments(settings)
        lm_arguments = _in_precision(lm_arguments, precision)
        adapter, merge = settings.pop("base_adapter", None), settings.pop("merge_base_adapter", False)
        based = hub.split_base(base, base_adapter=adapter, options=options)
        lm, tokenizer, base_ref = hub.load_base(
            based.base, tokenizer=tokenizer, options=based.options, lm_arguments=lm_arguments
        )
        part_options = replace(options, revision=None)
        audio_encoder, encoder_ref = hub.load_encoder(encoder, options=part_options)
        loaded_codec, codec_ref = hub.load_codec(codec, options=part_options)
        backbone = _read_backbone(lm, precision)
        if merge and not based.adapter:
            raise ConfigError("merge_base_adapter: the base comes with no adapter; pass base_adapter=")
        if based.adapter and based.ref:
            carried = backbone.carry(based.adapter, merge=merge)
            adapter_ref = replace(based.ref, fingerprint=carried.fingerprint())
            settings |= {"base_adapter": adapter_ref, "merge_base_adapter": merge}
        if text_end_ids is None:
            text_end_ids = find_text_end_ids(tokenizer, _eos_token_ids(lm))
        settings["tts"] = {"layers": tts_layers, **_plain(settings.get("tts", {}))}
        values = {
            "base": dump(replace(base_ref, fingerprint=_base_fingerprint(backbone, tokenizer))),
            "encoder": dump(replace(encoder_ref, fingerprint=audio_encoder.fingerprint())),
            "codec": dump(replace(codec_ref, fingerprint=loaded_codec.fingerprint())),
            "codec_spec": dump(loaded_codec.spec),
            "width": backbone.width,
            "hidden_width": backbone.hidden_width,
            "encoder_width": audio_encoder.width,
            "encoder_stride": audio_encoder.stride,
            "text_end_ids": list(text_end_ids),
            "fusion": fusion,
        }
        config = parse(
            OmniConfig, {**values, **{key: _plain(value) for key, value in settings.items()}}, source="wrap"
        )
        with torch.random.fork_rng(), light(lm, precision=precision):
            torch.manual_seed(seed)
            model = OmniModel(backbone, audio_encoder, config=config)
        _place_added(model)
        processor = OmniProcessor(tokenizer, audio_encoder.log_mel(), config=config)
        talker = cls(model.eval(), processor=processor, codec=loaded_codec, config=config)
        return talker if precision is None else talker.pack(precision)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        encoder: Any = None,
        codec: Any = None,
        tokenizer: Any = None,
        base_adapter: str | Path | None = None,
        subfolder: str = "",
        precision: str | None = None,
        **loading: Any,
    ) -> Self:
        """Load a saved talker: its base by reference, then what was added.

        Args:
            name: folder or Hub id of a talker.
            base: another place of the same base, or the loaded base; None takes the one that the talker
                names.
            encoder: likewise for the audio encoder.
            codec: likewise for the codec.
            tokenizer: the base's tokenizer; None loads it.
            base_adapter: another place of the adapter that the base came with.
            subfolder: folder of the talker inside ``name``.
            precision: repack the weights for this machine, to run only; see :meth:`pack`. Weights that are
                mapped from files are read one by one, so that memory holds no more than the packed ones.
            **loading: where to look: ``revision`` (of the talker), ``token``, ``cache_dir``,
                ``local_files_only``; and how to load the base, as for :meth:`wrap`.

        Raises:
            ConfigError: if an argument is unknown.
            CheckpointError: if files are missing or broken, tensors do not fit, or a part is not the one the
                talker was made with; the message names both values.
        """
        options, lm_arguments, unknown = hub.sort_arguments(loading)
        lm_arguments = _in_precision(lm_arguments, precision)
        if unknown:
            raise ConfigError(
                f"from_pretrained does not know {', '.join(unknown)}; settings of a talker are fixed when it "
                "is wrapped"
            )
        given = {"base": base, "encoder": encoder, "codec": codec}
        folder = hub.fetch_folder(
            name,
            options=options,
            subfolder=subfolder,
            without=[part for part, value in given.items() if value is not None],
        )
        config = hub.read_config(folder)
        trusted = Path(name).is_dir()
        carried = None
        if base is not None and not isinstance(base, str | Path):
            base, carried = take_adapter(base)
        lm, tokenizer, _ = hub.load_base(
            base if base is not None else hub.part_location(config.base, folder, trusted=trusted),
            tokenizer=tokenizer,
            options=replace(options, revision=config.base.revision if base is None else None),
            lm_arguments=lm_arguments,
        )
        backbone = _read_backbone(lm, precision)
        hub.check_fingerprint("base", config.base, _base_fingerprint(backbone, tokenizer))
        if config.base_adapter is not None:
            if carried is None:
                place = base_adapter or hub.part_location(config.base_adapter, folder, trusted=trusted)
                revision = None if base_adapter else config.base_adapter.revision
                carried, _ = hub.load_adapter(place, options=replace(options, revision=revision))
            carried = backbone.carry(carried, merge=config.merge_base_adapter)
            hub.check_fingerprint("base adapter", config.base_adapter, carried.fingerprint())
        elif carried is not None or base_adapter is not None:
            raise CheckpointError(
                f"{name} was made with a base that carries no adapter; pass the plain base, or wrap this one"
            )
        audio_encoder, _ = hub.load_encoder(
            encoder if encoder is not None else hub.part_location(config.encoder, folder, trusted=trusted),
            options=replace(options, revision=config.encoder.revision if encoder is None else None),
        )
        hub.check_fingerprint("encoder", config.encoder, audio_encoder.fingerprint())
        if precision is not None:
            let_go(audio_encoder)
        loaded_codec, _ = hub.load_codec(
            codec if codec is not None else hub.part_location(config.codec, folder, trusted=trusted),
            options=replace(options, revision=config.codec.revision if codec is None else None),
        )
        hub.check_fingerprint("codec", config.codec, loaded_codec.fingerprint())
        if precision is not None and isinstance(loaded_codec, torch.nn.Module):
            let_go(loaded_codec)
        hub.check_geometry(config, vocab_size=backbone.vocab_size, encoder=audio_encoder, codec=loaded_codec)
        with light(lm, precision=precision):
            model = OmniModel(backbone, audio_encoder, config=config)
        hub.load_added(folder, model)
        _place_added(model)
        processor = OmniProcessor(tokenizer, LogMel.from_pretrained(folder), config=config)
        talker = cls(
            model.eval(),
            processor=processor,
            codec=loaded_codec,
            config=config,
            datasets=hub.read_datasets(folder),
        )
        return talker if precision is None else talker.pack(precision)

    @property
    def precision(self) -> str | None:
        """How the weights are packed, ``fp32``, ``bf16`` or ``int8``; None if they are as they came."""
        return self.pack_report.precision if self.pack_report else None

    def pack(self, precision: str = "auto", *, settings: PackSettings | None = None) -> Self:
        """Repack the weights for the machine that they are on, in place; the talker only runs from then on.

        For each shape of weight the quickest kernel is found by a short measurement. LoRA becomes part of the
        base's weights. What was done is logged and stays in ``pack_report``.

        Args:
            precision: ``fp32`` computes as exactly as before; ``bf16`` and ``int8`` narrow the weights of
                linear layers, while all between them stays in float32; ``auto`` goes by the machine.
            settings: how to choose kernels; the default measures.

        Returns:
            Itself.

        Raises:
            ConfigError: if there is no such precision, or the weights are packed already.
        """
        self.pack_report = pack(self.model, precision, settings=settings)
        return self

    def warm_up(self, *, seconds: float = 1.0) -> float:
        """Answer some noise and throw the answer away, so that no later call waits for what is done once.

        What is done once: finding out how this LM is best run, taking memory, choosing kernels. Replies are
        the same with and without.

        Args:
            seconds: length of the noise; longer recordings may still touch memory that is new.

        Returns:
            Seconds that it took.
        """
        began = time.perf_counter()
        rate = self.processor.log_mel.sampling_rate
        noise = torch.randn(int(seconds * rate), generator=torch.Generator().manual_seed(0)) / _QUIET
        steps = CodeAutomaton.least_steps(self.processor.rules.delays) + 1
        settings = GenerationSettings(max_new_tokens=steps)
        self.chat((noise.numpy(), rate), settings=settings)
        return time.perf_counter() - began

    @property
    def tokenizer(self) -> Any:
        """The base LM's own tokenizer."""
        return self.processor.tokenizer

    @property
    def sampling_rate(self) -> int:
        """Samples a second of what is said, Hz."""
        return self.codec.spec.sampling_rate

    def to(self, device: torch.device | str) -> Self:
        """Move model and codec to ``device``; returns itself.

        Raises:
            ConfigError: if the weights are packed for another device.
        """
        if self.precision and torch.device(device).type != self.model.device.type:
            raise ConfigError(
                f"the weights are packed for {self.model.device.type} ({self.precision}) and stay there; "
                "load the talker without precision, move it, then call pack()"
            )
        self.model.to(device)
        if isinstance(self.codec, torch.nn.Module):
            self.codec.to(device)
        return self

    def stream(
        self,
        audio: AudioSource | None = None,
        *,
        text: str | None = None,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        speak: bool = True,
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Answer, and yield text and sound as soon as they exist.

        Args:
            audio: the question, as a file or as samples with their rate; see ``read_waveform``.
            text: the question in words, alone or after ``audio``.
            system: a system prompt.
            messages: a whole conversation instead of ``audio``, ``text`` and ``system``.
            tools: handed on to the chat template.
            speak: answer in speech and text; otherwise in text only.
            settings: how to decode.
            **options: single fields of :class:`GenerationSettings`, such as ``max_new_tokens`` or ``seed``.

        Raises:
            AudioError: if the recording cannot be used.
            PromptError: if there is no question, or it does not fit the base's chat template or positions.
        """
        conversation = _conversation(audio, text=text, system=system, messages=messages)
        chunks = self.stream_many([conversation], tools=tools, speak=speak, settings=settings, **options)
        return (chunk for _, chunk in chunks)

    def stream_many(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        task: str | None = None,
        speak: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Chunk]]:
        """Answer several conversations at once; yield (conversation, chunk) as soon as a chunk exists.

        Args:
            conversations: messages of each.
            task: key of ``TASKS``; None goes by whether there are recordings and by ``speak``.
            speak: answer in speech and text; otherwise in text only.
            tools: handed on to the chat template.
            settings: how to decode.
            **options: single fields of :class:`GenerationSettings`.
        """
        started_s = time.perf_counter()
        if not conversations:
            raise PromptError("no conversations; pass at least one")
        chosen = _settings(settings, options)
        names = {task or task_of(messages, speak=speak) for messages in conversations}
        if len(names) > 1:
            raise PromptError(
                f"conversations of one call share a task, got {', '.join(sorted(names))}; "
                "call once for those with recordings and once for those without"
            )
        name = names.pop()
        spec = get_task(name)
        samples = [self.processor(messages, task=name, tools=tools) for messages in conversations]
        given = [self.processor.text_ids(_last_text(m)) for m in conversations] if spec.text_given else None
        return stream_chunks(
            self._decoder(spec, chosen).run(samples, given=given),
            rendering=self._rendering(spec, chosen),
            num_conversations=len(samples),
            started_s=started_s,
        )

    def serve(
        self,
        *,
        max_conversations: int = 8,
        max_waiting: int = 32,
        max_steps: int = 2 * 1024,
        lead_s: float | None = 0.5,
        patience_s: float = 2.0,
        exact_sound: bool = True,
    ) -> Batcher:
        """Return a server that answers many conversations at once, which come and go at any moment.

        ``submit`` takes what :meth:`stream` takes, and ``task``, from any thread, and returns a handle at
        once: iterate over it for the chunks, which are those of :meth:`stream`, or ``cancel`` it. Prompts are
        laid out in the thread that submits; inside ``with``, a thread of the server does all else.

            with talker.serve() as server:
                for chunk in server.submit("question.wav"):
                    ...

        Args:
            max_conversations: answered at once; others wait.
            max_waiting: that wait; one more is refused with ``BusyError``.
            max_steps: columns of prompt and reply together, for which memory is made once per conversation;
                longer ones are refused.
            lead_s: seconds of sound that listeners keep in hand while the prompts and first steps of
                newcomers come first; None lets all go on in step, and prompts that wait be read in one batch,
                which takes least time in all.
            patience_s: seconds after which a prompt that waits is read although a listener may notice.
            exact_sound: make each sound bit for bit as :meth:`stream` does; otherwise the codec decodes the
                frames of all conversations in one call, which takes less time: within rounding, and in chunks
                that begin elsewhere.

        Raises:
            ConfigError: if a number is below its least.
        """
        return Batcher(
            self._request,
            max_conversations=max_conversations,
            max_waiting=max_waiting,
            max_steps=max_steps,
            schedule=Schedule(lead_s=lead_s, patience_s=patience_s),
            exact_sound=exact_sound,
        )

    def _request(
        self,
        audio: AudioSource | None = None,
        *,
        text: str | None = None,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        task: str | None = None,
        speak: bool = True,
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> Request:
        """What a server needs to know of a conversation."""
        conversation = _conversation(audio, text=text, system=system, messages=messages)
        name = task or task_of(conversation, speak=speak)
        spec, chosen = get_task(name), _settings(settings, options)
        return Request(
            self.processor(conversation, task=name, tools=tools),
            self._decoder(spec, chosen),
            self._rendering(spec, chosen),
            tuple(self.processor.text_ids(_last_text(conversation))) if spec.text_given else None,
        )

    def _decoder(self, task: Task, settings: GenerationSettings) -> Decoder:
        """The loop for one task and setting."""
        return Decoder(
            self.model,
            rules=self.processor.rules,
            task=task,
            text_end_ids=self.config.text_end_ids,
            settings=settings,
        )

    def _rendering(self, task: Task, settings: GenerationSettings) -> Rendering:
        """What turns ids of one task and setting into text and sound."""
        return Rendering(
            tokenizer=self.tokenizer,
            text_end_ids=self.config.text_end_ids,
            codec=self.codec,
            speaks=task.speaks,
            rules=self.processor.rules,
            stride=settings.stride,
            seed=settings.seed,
            lookahead_frames=settings.lookahead_frames,
        )

    def chat(
        self,
        audio: AudioSource | None = None,
        *,
        text: str | None = None,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        speak: bool = True,
        **options: Any,
    ) -> Reply:
        """Answer and return the whole reply: :meth:`stream`, collected, with its arguments."""
        return Reply.collect(
            self.stream(audio, text=text, system=system, messages=messages, speak=speak, **options)
        )

    def chat_many(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[Reply]:
        """Answer several conversations at once: :meth:`stream_many`, collected."""
        chunks: list[list[Chunk]] = [[] for _ in conversations]
        for index, chunk in self.stream_many(conversations, **options):
            chunks[index].append(chunk)
        return [Reply.collect(parts) for parts in chunks]

    def session(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        speak: bool = True,
        hearing: HearingMode = "exact",
        block_seconds: float = Blocks.seconds,
        lookahead_seconds: float = Blocks.lookahead_seconds,
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> Session:
        """Open a conversation that is heard while it is spoken: ``append_audio``, ``reply``, and so on.

        Args:
            system: a system prompt.
            messages: turns that were before, instead of ``system``.
            tools: handed on to the chat template.
            speak: answer in speech and text; otherwise in text only.
            hearing: ``exact`` gives the replies of :meth:`stream`: questions are encoded while they are
                spoken if the talker was made with ``encoder_block_seconds``, else at their end. ``blocks``
                encodes them while they are spoken in any case; for a talker made without, that is an
                approximation (see ``omni_adapter.hearing.measure_hearing_error``).
            block_seconds: length of a block with ``blocks``, where the talker has none of its own.
            lookahead_seconds: sound after a block that it waits for then; the more, the nearer to ``exact``.
            settings: how to decode.
            **options: single fields of :class:`GenerationSettings`.

        Raises:
            ConfigError: if the talker cannot hear so.
            PromptError: if the messages do not fit the base's chat template.
        """
        if system is not None:
            if messages:
                raise PromptError("pass either messages= or system=")
            messages = [{"role": "system", "content": system}]
        return Session(
            self.model,
            processor=self.processor,
            decoder=self._decoder,
            rendering=self._rendering,
            settings=SessionSettings(
                speak,
                tools,
                hearing,
                Blocks(block_seconds, lookahead_seconds),
                generation=_settings(settings, options),
            ),
            messages=messages,
        )

    def transcribe(self, audio: AudioSource, **options: Any) -> Reply:
        """Write down what was said. ``options`` are fields of :class:`GenerationSettings`."""
        return self.chat_many([_conversation(audio)], task="asr", **options)[0]

    def say(self, text: str, **options: Any) -> Reply:
        """Read ``text`` out, word for word. ``options`` are fields of :class:`GenerationSettings`."""
        return self.chat_many([_conversation(text=text)], task="tts", **options)[0]

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        include: Collection[str] = (),
        name: str | None = None,
        evaluation: Mapping[str, float] | None = None,
        samples: Sequence[str | Path] = (),
        datasets: Mapping[str, str] | None = None,
    ) -> None:
        """Write what was added: safetensors, JSON and a model card.

        A talker that was saved there before is replaced in one go: interrupted at any moment, the folder
        holds the one or the other. Files of others stay.

        Args:
            folder: made if missing.
            include: whole parts to save beside it: ``base``, ``encoder``, ``codec``; others are referred to
                by id. Parts that were loaded from inside a talker's folder are always saved along.
            name: name for the model card; None takes the folder's.
            evaluation: figures for the model card, by name; those that name a data set after a comma, such
                as ``"WER, LibriSpeech test-clean"``, go into its metadata too.
            samples: recordings for the model card, copied beside it.
            datasets: what it was trained on, beside ``self.datasets``: Hub id or name, and its licence.

        Raises:
            CheckpointError: if a part has no name to refer to and is not included.
        """
        folder = Path(folder)
        facts = CardFacts(
            name or folder.resolve().name,
            self._num_added(),
            evaluation=evaluation or {},
            samples=samples,
            datasets={**self.datasets, **(datasets or {})},
        )
        self._save(folder, include=include, facts=facts)

    def export(self, folder: str | Path, *, form: str = "merged", name: str | None = None) -> None:
        """Write the whole talker into one folder, which loads by itself, offline.

        ``base`` in it is a plain causal LM of transformers with its tokenizer, ``encoder`` a Whisper encoder;
        beside them lie the codec and the added weights.

        Args:
            folder: made if missing.
            form: ``merged`` adds LoRA to the base's weights; ``peft`` leaves the base as it was and writes
                LoRA as an adapter of PEFT into ``lora``.
            name: name for the model card; None takes the folder's.

        Raises:
            ConfigError: if there is no such form.
            CheckpointError: if LoRA is to be written and there is none.
        """
        if form not in EXPORT_FORMS:
            raise ConfigError(f"a talker is exported as {' or '.join(EXPORT_FORMS)}, got {form!r}")
        if form == "peft" and not self.model.backbone.has_lora:
            raise CheckpointError(
                "this talker has no LoRA, so there is nothing for PEFT; export it as merged"
            )
        facts = CardFacts(name or Path(folder).resolve().name, self._num_added(), datasets=self.datasets)
        self._save(Path(folder), include=hub.PARTS, facts=facts, merged=form == "merged", whole=True)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload talker",
        **saving: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes as one commit; returns the commit's address.

        Args:
            repo_id: repository on the Hub, made if missing.
            private: whether to make it private; None takes the account's default.
            token: access token; None for the one that was logged in with.
            revision: branch, made if missing.
            commit_message: first line of the commit.
            **saving: other arguments of :meth:`save_pretrained`, such as ``include`` and ``evaluation``.

        Raises:
            CheckpointError: if the Hub refuses or the connection breaks; the repository is then as it was.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            options = hub.PushOptions(token, private, revision, commit_message)
            return hub.push_folder(Path(folder), repo_id, options=options)

    def _num_added(self) -> int:
        groups = self.model.groups()
        return sum(weight.numel() for group in (*ADDED_GROUPS, "lora") for weight in groups[group].values())

    def _save(
        self,
        folder: Path,
        *,
        include: Collection[str],
        facts: CardFacts,
        merged: bool = False,
        whole: bool = False,
    ) -> None:
        """Write the talker; with LoRA ``merged``, as a ``whole`` without adapters of others."""
        if self.precision:
            raise CheckpointError(
                f"the weights are packed for this machine ({self.precision}) and cannot be written exactly; "
                "load the talker without precision to save or export it"
            )
        config = self.config
        backbone = self.model.backbone
        # A base that is written with the adapter of others in its weights needs no other place for it.
        folded = "base" in include and (whole or not backbone.stacks)
        if folded:
            config = replace(config, base_adapter=None, merge_base_adapter=False)
        inside = hub.parts_inside(config, include)
        lm = hub.plain_lm(self.model, lora=merged, adapter=whole) if "base" in inside else backbone.lm
        with hub.replacing(folder) as staging:
            config = hub.save_parts(
                staging,
                inside,
                config=config,
                lm=lm,
                tokenizer=self.tokenizer,
                encoder=self.model.audio_encoder,
                codec=self.codec,
                adapter=backbone.carried,
            )
            hub.save_added(staging, self.model, config=config, with_lora=not merged)
            self.processor.save_pretrained(staging)
            hub.save_card(staging, config=config, facts=facts)


def _in_precision(lm_arguments: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """How to load a base for a precision: float32 asks for weights in float32, unless told otherwise."""
    if precision == "fp32" and lm_arguments.get("dtype", "auto") == "auto":
        return {**lm_arguments, "dtype": "float32"}
    return lm_arguments


def _read_backbone(lm: PreTrainedModel, precision: str | None) -> Backbone:
    """The base, tried out while its weights are those of the files."""
    with light(lm, precision=precision):
        backbone = Backbone(lm)
        if precision is not None:
            backbone.settle()
    return backbone


def _settings(settings: GenerationSettings | None, options: Mapping[str, Any]) -> GenerationSettings:
    """Settings with single fields replaced."""
    known = [field.name for field in fields(GenerationSettings)]
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
            raise ConfigError(f"unknown generation setting {key!r}; {advice}")
    return replace(settings or GenerationSettings(), **options)


def _conversation(
    audio: AudioSource | None = None,
    *,
    text: str | None = None,
    system: str | None = None,
    messages: Sequence[Message] | None = None,
) -> list[Message]:
    """The messages of a call."""
    if messages is not None:
        if audio is not None or text is not None or system is not None:
            raise PromptError("pass either messages=, or audio, text= and system=")
        return list(messages)
    if audio is None and text is None:
        raise PromptError("no question; pass a recording, text= or messages=")
    parts: list[dict[str, Any]] = []
    if audio is not None:
        parts.append({"type": "audio", "audio": audio})
    if text is not None:
        parts.append({"type": "text", "text": text})
    turns: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return [*turns, {"role": "user", "content": parts}]


def _last_text(messages: Sequence[Message]) -> str:
    """Text of the last user turn."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content or ())
    if not content.strip():
        raise PromptError("nothing to say: the text is empty")
    return content


def _eos_token_ids(lm: PreTrainedModel) -> list[int]:
    """Ids that the LM's generation config stops at."""
    config = getattr(lm, "generation_config", None)
    ids = config.eos_token_id if config is not None else None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _base_fingerprint(backbone: Backbone, tokenizer: Any) -> dict[str, Any]:
    sizes = {"vocab_size": backbone.vocab_size, "width": backbone.width}
    return {**sizes, **tokenizer_fingerprint(tokenizer), **backbone.fingerprint()}


def _place_added(model: OmniModel) -> None:
    """Give what was added the base's type and device, and the encoder the base's device."""
    for part in (model.audio_adapter, model.code_embedding, model.tts_blocks, model.code_heads):
        part.to(device=model.backbone.device, dtype=model.backbone.dtype)
    model.audio_encoder.to(model.backbone.device)


def _plain(value: Any) -> Any:
    """A config dataclass as plain values; anything else as it is."""
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
