"""What a talker learns from a batch: one loss for the text row and each code row.

Batch in, sums of losses and counts of labels per row out; what they add up to is decided once the labels of
all micro-batches and processes are counted. Logits exist only for labelled steps, and only a chunk at a time;
they become their own gradient on the spot. Knows nothing of stages, optimizers or processes.

Where weights are sharded between processes, they are whole only while their own module is called. Each head
is therefore called as a module, with the chunked loss in place of its forward, and every pass takes the same
way through the model whatever its batch holds: a batch without text, codes or recordings learns from one
step, or one silent recording, of weight zero.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from omni_adapter.audio.clips import Clips
from omni_adapter.config import Positive
from omni_adapter.data.collator import Batch
from omni_adapter.errors import ConfigError, PromptError
from omni_adapter.model import OmniModel
from omni_adapter.training.alignment import transcript_loss
from omni_adapter.vocab import IGNORE_INDEX

Weight = Annotated[float, Field(ge=0)]
Normalisation = Literal["joint", "rows"]

_VOCABULARY_SLICE = 8192  # rows of a head whose gradient is widened at a time


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LossSettings:
    """How the losses of the rows become one number. The defaults are the paper's.

    Args:
        text_weight: weight of the text row.
        row_weights: weight of each code row, length K; None for 1 each.
        pad_weight: weight of a step at which a row that speaks, or writes, in this answer is silent: before
            its first and after its last id, between the first and the last labelled step of the answer.
        normalisation: ``joint`` is the mean over all labels of all rows together, the paper's negative
            log-likelihood of text and audio; ``rows`` is the mean over rows of each row's own mean, as
            SLAM-Omni has it, where a row without labels counts as zero.
        distil: text answers to speech are learned from the base itself: from the distribution that it gives,
            without LoRA, for the same question in text (Ultravox). Teaches hearing without moving the base.
        temperature: by which logits are divided then.
        ctc_weight: weight of what recordings say, ``text_in`` of their rows, as a loss on what the LM is fed
            for them (``omni_adapter.training.alignment``), added to that of the text row. Hearing is learned
            in a fraction of the steps. 0 for the paper's stages.
        chunk_logits: logits that exist at a time.
    """

    text_weight: Weight = 1.0
    row_weights: tuple[Weight, ...] | None = None
    pad_weight: Weight = 0.0
    normalisation: Normalisation = "joint"
    distil: bool = False
    temperature: Annotated[float, Field(gt=0)] = 2.0
    ctc_weight: Weight = 0.0
    chunk_logits: Positive = 1 << 25


class Losses(NamedTuple):
    """Losses of a batch, by row: the K code rows, then text.

    Attributes:
        sums: what is learned, summed over labels, [K + 1]; the only part with a gradient.
        counts: labels, padding by its weight, [K + 1].
        nll: negative log-likelihood, summed, [K + 1]; equal to ``sums`` but for text that is distilled.
        correct: labels whose logit was the largest, [K + 1].
        weights: weight of each row, [K + 1].
        normalisation: how ``total`` divides.
    """

    sums: Tensor
    counts: Tensor
    nll: Tensor
    correct: Tensor
    weights: Tensor
    normalisation: Normalisation

    def total(self, counts: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        """Return the number to minimise.

        The gradients of all micro-batches of all processes add up to those of one large batch if each total
        is taken with the same ``counts``, those of all of them together.

        Args:
            counts: labels of each row that the step as a whole learns from, [K + 1]; None for this batch.
            scale: what to multiply with, to undo a division by processes or micro-batches further on.
        """
        counts = self.counts if counts is None else counts.to(self.sums)
        if self.normalisation == "joint":
            labels = (self.weights * counts).sum()
            mean = (self.weights * self.sums).sum() / labels.masked_fill(labels == 0, 1)
        else:
            means = self.sums / counts.masked_fill(counts == 0, 1)
            mean = (self.weights * means).sum() / self.weights.sum()
        return scale * mean

    @property
    def losses(self) -> Tensor:
        """Mean negative log-likelihood of each row, [K + 1]; nan for a row without labels."""
        return self.nll / self.counts


class TrainingModel(nn.Module):
    """A talker whose forward is its loss, so that whatever wraps it for training sees one call.

    Which weights learn must be settled before: see ``omni_adapter.training.stages.prepare_stage``.

    Args:
        model: the talker.
        settings: how the losses of the rows become one number.

    Raises:
        ConfigError: if there is not one row weight for each code row, or no weight at all.
    """

    def __init__(self, model: OmniModel, settings: LossSettings | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings = settings or LossSettings()
        rows = model.config.codec_spec.num_codebooks
        row_weights = (1.0,) * rows if settings.row_weights is None else settings.row_weights
        if len(row_weights) != rows:
            raise ConfigError(f"row_weights needs {rows} entries, one per code row, got {len(row_weights)}")
        if not sum(row_weights) + settings.text_weight:
            raise ConfigError("text_weight and row_weights are all zero, so nothing would be learned")
        self._weights = (*row_weights, settings.text_weight)
        # Looked up now, since sharding changes the class of modules. In a tuple: it is the LM's already.
        head = model.backbone.linear_head
        self._text_head = () if head is None else (head,)
        self._projects = head is None and model.backbone.projects

    def counts(self, batch: Batch) -> Tensor:
        """Return the labels of each row of a batch, [K + 1], without running the model."""
        return self._targets(batch).counts

    def forward(self, batch: Batch) -> Losses:
        """Return the losses of a batch.

        Args:
            batch: what to learn. With ``settings.distil`` text is not learned from its labels but from what
                the base without LoRA makes of ``batch.teacher``, the same answers after prompts in text: the
                divergence from its distribution at ``temperature``.

        Raises:
            PromptError: if the answers of ``batch.teacher`` are others.
            ConfigError: if the base itself learns, so that it cannot teach.
        """
        targets = self._targets(batch)
        attention_mask, position_ids = _attention(batch)
        embeddings, heard = self._embed(batch)
        output = self.model.backbone(
            embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=0 if self._needs_logits else 1,
        )
        places, labels = targets.places[-1], targets.labels[-1]
        criterion: _Criterion = _Labels((labels,), (targets.weights[-1],))
        if self.settings.distil:
            teach = self._teach(batch.teacher or _no_lesson(batch), labels)
            criterion = _Answers(labels, targets.weights[-1], teach, self.settings.temperature)
        states = output.logits if self._needs_logits else output.hidden
        text, text_report = self._text_loss(states, places, criterion)
        text = text + self._transcript_loss(heard, batch)
        codes, code_report = self._code_loss(output.tapped, targets, attention_mask, position_ids)
        report = torch.cat((code_report, text_report)).detach()
        weights = torch.tensor(self._weights, device=report.device)
        return Losses(
            torch.cat((codes, text)),
            targets.counts,
            report[:, 0],
            report[:, 1],
            weights,
            self.settings.normalisation,
        )

    @property
    def _needs_logits(self) -> bool:
        """Whether logits come out of the LM's whole forward only, so that they cannot be made in chunks."""
        return not self._text_head and not self._projects

    def _targets(self, batch: Batch) -> "_Targets":
        """Where each row has labels, and which."""
        labels = batch.labels
        if self.settings.pad_weight:
            marks = self.model.config.text_marks
            text_pad = IGNORE_INDEX if marks is None else marks.pad
            labels = _with_pads(batch, code_pad=self.model.config.vocabulary.pad, text_pad=text_pad)
        return _Targets.of(batch, labels, pad_weight=self.settings.pad_weight)

    def _embed(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What the LM is fed, [B, S, D], and the embeddings of each recording in it, [A, D]."""
        if batch.clips is not None or not _learns(self.model.audio_adapter):
            heard = self.model.hear(batch.clips) if batch.clips is not None else []
            return self.model.embed(batch.grid, places=batch.places, heard=heard), heard
        (silence,) = self.model.hear(self._silence(batch.grid.device))
        return self.model.embed(batch.grid) + 0 * silence.sum(), []

    def _transcript_loss(self, heard: list[Tensor], batch: Batch) -> Tensor | float:
        """What recordings say, weighed, where the audio adapter learns it."""
        weight, embed = self.settings.ctc_weight, self.model.backbone.embed
        if not weight or not _learns(self.model.audio_adapter):
            return 0.0
        return weight * transcript_loss(heard, batch.transcripts, embed, device=batch.grid.device)

    def _silence(self, device: torch.device) -> Clips:
        """A recording that nobody hears."""
        encoder, padding = self.model.audio_encoder, self.model.config.encoder_padding
        frames = encoder.stride if padding == "true_length" else encoder.window_frames
        features = torch.zeros(1, encoder.num_mel_bins, frames, device=device)
        return Clips(features, torch.tensor([frames], device=device), (1,))

    def _text_loss(self, states: Tensor, places: Tensor, criterion: "_Criterion") -> tuple[Tensor, Tensor]:
        """Loss [1] and report [1, 2] of the text row, by the LM's own head."""
        states = states.flatten(0, 1)
        if self._text_head:
            return self._linear_loss(self._text_head[0], states, (places,), criterion)
        if self._needs_logits:
            return _apply(_Scored, states[places], criterion, slice(None))
        return self._own_loss(states[places], criterion)

    def _own_loss(self, states: Tensor, criterion: "_Criterion") -> tuple[Tensor, Tensor]:
        """The same where the LM scales or caps its logits: each chunk is run again in the backward pass."""

        def score(chunk: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
            return _apply(_Scored, self.model.backbone.project(chunk[None])[0], criterion, piece)

        count = states.shape[0]
        pieces = list(_pieces(count, self._chunk_size(self.model.backbone.vocab_size)))
        # Processes that share sharded weights must call each module equally often, be it with empty pieces.
        pieces += [slice(count, count)] * (_most(len(pieces), states.device) - len(pieces))
        results = [
            checkpoint(score, states[piece], piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
        losses, reports = zip(*results, strict=True)
        return torch.stack(losses).sum(dim=0), torch.stack(reports).sum(dim=0)

    def _code_loss(
        self,
        hidden: Tensor,
        targets: "_Targets",
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [K] and report [K, 2] of the code rows."""
        model = self.model
        rows = len(targets.places) - 1
        speaking = (model.tts_blocks, model.code_heads, model.code_embedding)
        if not any(map(_learns, speaking)) and not bool(targets.counts[:-1].any()):
            return hidden.new_zeros(rows, dtype=torch.float32), hidden.new_zeros(rows, 2, dtype=torch.float32)
        spoken = model.tts_blocks(
            hidden.to(model.code_heads.proj.weight.dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        criterion = _Labels(targets.labels[:-1], targets.weights[:-1])
        return self._linear_loss(model.code_heads.proj, spoken.flatten(0, 1), targets.places[:-1], criterion)

    def _linear_loss(
        self, head: nn.Linear, states: Tensor, places: Sequence[Tensor], criterion: "_Criterion"
    ) -> tuple[Tensor, Tensor]:
        """Losses [G] and report [G, 2] of one matrix that holds the heads of G rows."""
        learns = torch.is_grad_enabled()
        chunk = self._chunk_size(head.out_features // len(places))

        def score(states: Tensor) -> tuple[Tensor, Tensor]:
            return _apply(_LinearLoss, states, head.weight, places, criterion, chunk, learns)

        return _call_as(head, score, states)

    def _chunk_size(self, vocabulary_size: int) -> int:
        """Steps whose logits exist at a time."""
        return max(1, self.settings.chunk_logits // vocabulary_size)

    def _teach(self, teacher: Batch, labels: Tensor) -> Callable[[slice], Tensor]:
        """What the base without LoRA answers to prompts in text: logits [n, V] of a piece of the labels."""
        backbone = self.model.backbone
        if any(parameter.requires_grad for parameter in self.model.groups()["language_model"].values()):
            raise ConfigError(
                "the base cannot teach while it learns itself; distil with LoRA or a frozen base"
            )
        targets = _Targets.of(teacher, teacher.labels, pad_weight=0)
        places = targets.places[-1]
        if not torch.equal(targets.labels[-1], labels):
            raise PromptError(
                "the teacher's batch must hold the same answers in the same order: expected "
                f"{len(labels)} labels of text, got {len(places)}, or others"
            )
        attention_mask, position_ids = _attention(teacher)
        was_training = backbone.training
        backbone.eval()
        with torch.no_grad(), backbone.lora_disabled():
            output = backbone(
                backbone.embed(teacher.grid[:, -1]),
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=0 if self._needs_logits else 1,
            )
        backbone.train(was_training)
        given: Tensor = output.logits if self._needs_logits else output.hidden
        states = given.flatten(0, 1)[places]

        def answer(piece: slice) -> Tensor:
            if self._needs_logits:
                return states[piece]
            if self._text_head:
                weight = self._text_head[0].weight
                return states[piece].to(weight.dtype) @ weight.T
            with torch.no_grad(), backbone.lora_disabled():
                return backbone.project(states[piece][None])[0]

        return answer


def _no_lesson(batch: Batch) -> Batch:
    """A step without labels: what the base reads where it teaches nothing, as others may wait for it."""
    step = slice(int(batch.attention_mask[0].argmax()), int(batch.attention_mask[0].argmax()) + 1)
    return Batch(
        batch.grid[:1, :, step],
        torch.full_like(batch.labels[:1, :, step], IGNORE_INDEX),
        batch.attention_mask[:1, step],
        torch.zeros_like(batch.position_ids[:1, step]),
    )


class _Targets(NamedTuple):
    """Labels of each of K + 1 rows, and the steps whose states are to predict them.

    A row without labels has one step of weight zero, so that its head is used all the same.
    """

    places: list[Tensor]  # [n] each, into B * S steps
    labels: list[Tensor]  # [n] each
    weights: list[Tensor | None]  # [n] each, None for 1 everywhere
    counts: Tensor  # [K + 1] float32

    @classmethod
    def of(cls, batch: Batch, labels: Tensor, *, pad_weight: float) -> "_Targets":
        """Shift labels [B, K + 1, S] by a step and collect them; ids of padding weigh ``pad_weight``."""
        shifted = F.pad(labels[:, :, 1:], (0, 1), value=IGNORE_INDEX).transpose(0, 1).flatten(1)
        is_pad = ((labels != batch.labels).transpose(0, 1).roll(-1, dims=-1)).flatten(1)  # [K + 1, B * S]
        first = batch.attention_mask.flatten().argmax()[None]  # a step that is no padding
        places, found, weights, counts = [], [], [], []
        for row, pad in zip(shifted, is_pad, strict=True):
            where = (row != IGNORE_INDEX).nonzero()[:, 0]
            weight = None if not pad_weight else torch.where(pad[where], pad_weight, 1.0)
            counts.append(torch.tensor(float(len(where))) if weight is None else weight.sum())
            if not len(where):
                where, weight = first, torch.zeros(1, device=row.device)
            places.append(where)
            found.append(row[where].clamp(min=0))
            weights.append(weight)
        return cls(places, found, weights, torch.stack([count.to(labels.device) for count in counts]))


def _with_pads(batch: Batch, *, code_pad: int, text_pad: int) -> Tensor:
    """Labels [B, K + 1, S] with the padding inside of each answer labelled too.

    An answer is a run of steps of which each has a label in some row. Rows are completed where others of
    their kind have labels in the same run: codes in answers that speak, text where text is learned.
    """
    labels, grid = batch.labels.clone(), batch.grid
    is_labelled = labels != IGNORE_INDEX
    inside = is_labelled.any(dim=1)  # [B, S]
    starts = inside & ~F.pad(inside, (1, 0))[:, :-1]
    run = starts.cumsum(dim=1)  # [B, S], 0 before the first answer
    for rows, pad in ((slice(0, -1), code_pad), (slice(-1, None), text_pad)):
        own = is_labelled[:, rows].any(dim=1).long()  # [B, S]
        total = torch.zeros_like(run).scatter_add(1, run, own)  # labels of each run; there are fewer than S
        learned = inside & (total.gather(1, run) > 0)
        silent = learned[:, None] & ~is_labelled[:, rows] & (grid[:, rows] == pad)
        labels[:, rows] = torch.where(silent, grid[:, rows], labels[:, rows])
    return labels


def _attention(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Mask and positions; none for rows that are padded on the right only, where causality is enough."""
    if batch.segments is not None:
        return batch.model_mask, batch.position_ids
    mask = batch.attention_mask
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return None, None
    return mask, batch.position_ids


class _Criterion(Protocol):
    """Turns logits into their gradient, in place."""

    def __call__(self, row: int, piece: slice, logits: Tensor) -> Tensor:
        """Return learned loss, negative log-likelihood and hits, summed, [3].

        Args:
            row: which of the rows.
            piece: which of its labels.
            logits: [n, V], replaced by the gradient of the learned loss.
        """


class _Labels(NamedTuple):
    """Cross-entropy with labels."""

    labels: Sequence[Tensor]
    weights: Sequence[Tensor | None]

    def __call__(self, row: int, piece: slice, logits: Tensor) -> Tensor:
        labels, weight = self.labels[row][piece], self.weights[row]
        nll, hits = _nll_(logits, labels)
        if weight is None:
            return torch.stack((nll.sum(), nll.sum(), hits.sum()))
        weight = weight[piece].to(logits.dtype)
        logits.mul_(weight[:, None])
        return torch.stack(((weight * nll).sum(), (weight * nll).sum(), (weight * hits).sum()))


class _Answers(NamedTuple):
    """Divergence from what a teacher says, at a temperature."""

    labels: Tensor
    weights: Tensor | None
    teach: Callable[[slice], Tensor]
    temperature: float

    def __call__(self, row: int, piece: slice, logits: Tensor) -> Tensor:
        labels = self.labels[piece]
        weight = (
            torch.ones(len(labels)).to(logits) if self.weights is None else self.weights[piece].to(logits)
        )
        theirs = F.log_softmax(self.teach(piece).to(logits.dtype) / self.temperature, dim=-1)
        ours = F.log_softmax(logits / self.temperature, dim=-1)
        nll, hits = _nll_(logits, labels)
        share = theirs.exp()
        divergence = (share * (theirs - ours)).sum(dim=-1)
        logits.copy_(ours.exp_().sub_(share)).mul_(weight[:, None] / self.temperature)
        return torch.stack([(weight * value).sum() for value in (divergence, nll, hits)])


def _nll_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods [n] and hits [n]; ``logits`` [n, V] become the gradient of the former."""
    top, best = logits.max(dim=-1)
    logits.sub_(top[:, None])
    chosen = logits.gather(1, labels[:, None])[:, 0]
    total = logits.exp_().sum(dim=-1)
    logits.div_(total[:, None])
    logits.scatter_add_(1, labels[:, None], -torch.ones_like(total)[:, None])
    return total.log() - chosen, (best == labels).to(logits.dtype)


class _LinearLoss(torch.autograd.Function):
    """Losses of heads that are one matrix, chunk by chunk; gradients are made in the forward pass.

    A head that does not learn costs no gradient of its size. Gradients of half-precision heads are summed in
    float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,  # [N, D]
        weight: Tensor,  # [G * V, D]
        places: Sequence[Tensor],  # [n] each, length G
        criterion: _Criterion,
        chunk: int,
        learns: bool,
    ) -> tuple[Tensor, Tensor]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        wide = torch.promote_types(dtype, torch.float32)
        matrices = weight.to(dtype).view(len(places), -1, weight.shape[1])  # [G, V, D]
        needs_states, needs_weight = (learns and needed for needed in ctx.needs_input_grad[:2])
        outer = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        sums = torch.zeros(len(places), 3, dtype=wide, device=states.device)
        inner: list[Tensor] = []
        with torch.autocast(kind, enabled=False):
            for row, where in enumerate(places):
                kept = states.new_empty(len(where) if needs_states else 0, states.shape[1])
                for piece in _pieces(len(where), chunk):
                    chosen = states[where[piece]].to(dtype)  # [n, D]
                    logits = F.linear(chosen, matrices[row]).to(wide)  # [n, V]
                    sums[row] += criterion(row, piece, logits)
                    gradient = logits.to(dtype)
                    if needs_states:
                        kept[piece] = gradient @ matrices[row]
                    if outer is not None:
                        _add_outer(outer.view(len(places), -1, outer.shape[1])[row], gradient, chosen)
                inner.append(kept)
        ctx.shape, ctx.places = states.shape, places
        ctx.inner, ctx.outer = inner, None if outer is None else outer.to(weight.dtype)
        losses, report = sums[:, 0].clone(), sums[:, 1:].clone()
        ctx.mark_non_differentiable(report)
        return losses, report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inner, outer = ctx.inner, ctx.outer
        ctx.inner = ctx.outer = None  # nobody else holds them, so they become .grad without a copy
        grad_states = None
        if ctx.needs_input_grad[0]:
            grad_states = inner[0].new_zeros(ctx.shape)
            for where, kept, scale in zip(ctx.places, inner, scales, strict=True):
                grad_states.index_add_(0, where, kept.mul_(scale))
        if outer is not None:
            outer.view(len(scales), -1, outer.shape[1]).mul_(scales[:, None, None])
        return grad_states, outer, None, None, None, None


class _Scored(torch.autograd.Function):
    """Losses of logits [n, V], which are left as they are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, criterion: _Criterion, piece: slice) -> tuple[Tensor, Tensor]:
        gradient = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        sums = criterion(0, piece, gradient)[None]
        ctx.save_for_backward(gradient.to(logits.dtype))
        losses, report = sums[:, 0].clone(), sums[:, 1:].clone()
        ctx.mark_non_differentiable(report)
        return losses, report

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None


def _apply(function: type[torch.autograd.Function], *inputs: Any) -> tuple[Tensor, Tensor]:
    """Losses, with a gradient, and report, without."""
    losses, report = function.apply(*inputs)  # type: ignore[no-untyped-call]
    return losses, report


def _add_outer(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Add ``gradient.T @ states`` to ``total`` [V, D], slice by slice where the types differ."""
    if total.dtype == gradient.dtype:
        total.addmm_(gradient.T, states)
        return
    for part in _pieces(total.shape[0], _VOCABULARY_SLICE):
        total[part] += gradient[:, part].T @ states


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Cut ``count`` into pieces of ``size``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _most(count: int, device: torch.device) -> int:
    """The largest ``count`` of all processes that learn together."""
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def _learns(module: nn.Module) -> bool:
    """Whether any weight of a module learns."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _call_as(
    module: nn.Module, function: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor
) -> tuple[Tensor, Tensor]:
    """Call a module with another forward; its hooks, which may gather its weight, run around it."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        losses, report = module(states)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
    return losses, report
