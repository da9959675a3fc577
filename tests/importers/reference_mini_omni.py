"""What Mini-Omni computes, in plain PyTorch, written from the paper and the behaviour of its published code.

A checkpoint's own tensors and config in; logits and greedy streams out. Shares no line with the package, and
saves nothing: attention is written out, every id is one of the joint table.
"""

import torch
import whisper
from torch import Tensor

END, PAD, INPUT, ANSWER, ASR = range(5)  # marks, counted from the first id after the ordinary ones
ROWS = 7


class Reference:
    """One checkpoint.

    Args:
        state: tensors by their litgpt names.
        config: content of model_config.yaml.
        encoder: content of small.pt.
    """

    def __init__(self, state: dict[str, Tensor], config: dict, encoder: dict) -> None:
        self.state, self.config = state, config
        self.text_mark = config["text_vocab_size"] - 64
        self.code_mark = config["audio_vocab_size"] - 64
        self.whisper = whisper.model.Whisper(whisper.model.ModelDimensions(**encoder["dims"]))
        self.whisper.load_state_dict(encoder["model_state_dict"])
        self.whisper.eval()

    # --- hearing ---

    @torch.inference_mode()
    def hear(self, samples: Tensor) -> Tensor:
        """Adapter output [A, D] of a recording at 16 kHz: the whole window is encoded, then cut."""
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(samples))
        steps = len(samples) // 320 + 1  # one for every 20 ms begun
        x = self.whisper.embed_audio(mel[None])[0][:steps]
        gate = x @ self.state["whisper_adapter.fc_1.weight"].T
        up = x @ self.state["whisper_adapter.fc_2.weight"].T
        return (gate * torch.sigmoid(gate) * up) @ self.state["whisper_adapter.proj.weight"].T

    # --- prompts: eight streams of joint ids [8, T], text last ---

    def joint(self, code: int, row: int) -> int:
        """Row of the joint table that holds an id of a code row."""
        return self.config["text_vocab_size"] + self.config["audio_vocab_size"] * row + code

    def streams(self, codes: list[int], text: list[int]) -> Tensor:
        """Streams in which all code rows hold the same ids."""
        return torch.tensor([[self.joint(code, row) for code in codes] for row in range(ROWS)] + [text])

    def speech_prompt(self, steps: int, *, last_code: int, last_text: int) -> Tensor:
        """A recording of ``steps`` steps, and the marks that say what is wanted."""
        code, text = self.code_mark, self.text_mark
        return self.streams(
            [code + INPUT, *[code + PAD] * steps, code + END, code + last_code],
            [text + INPUT, *[text + PAD] * steps, text + END, text + last_text],
        )

    def text_prompt(self, ids: list[int], *, last_code: int) -> Tensor:
        """A question in writing."""
        code, text = self.code_mark, self.text_mark
        codes = [code + PAD] * (len(ids) + 2) + [code + last_code]
        return self.streams(codes, [text + INPUT, *ids, text + END, text + ANSWER])

    # --- the network ---

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm."""
        scale = (x.double().pow(2).mean(dim=-1, keepdim=True) + self.config["norm_eps"]).rsqrt()
        return (x * scale).float() * self.state[f"{name}.weight"]

    def attention(self, x: Tensor, prefix: str) -> Tensor:
        """Causal attention over all steps, head by head."""
        heads, groups = self.config["n_head"], self.config["n_query_groups"]
        size = self.config["n_embd"] // heads
        fused = x @ self.state[f"{prefix}.attn.weight"].T
        if f"{prefix}.attn.bias" in self.state:
            fused = fused + self.state[f"{prefix}.attn.bias"]
        pieces = fused.split(size, dim=-1)  # for each group: its queries, one key, one value
        per_group = heads // groups
        steps = x.shape[1]
        future = torch.triu(torch.ones(steps, steps, dtype=torch.bool), diagonal=1)
        results = []
        for group in range(groups):
            mine = pieces[group * (per_group + 2) : (group + 1) * (per_group + 2)]
            key, value = self.rotate(mine[-2]), mine[-1]
            for query in mine[:per_group]:
                scores = self.rotate(query) @ key.transpose(1, 2) / size**0.5
                results.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value)
        return torch.cat(results, dim=-1) @ self.state[f"{prefix}.proj.weight"].T

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions of one head, [B, T, W]."""
        steps, width = x.shape[1:]
        exponents = torch.arange(0, width, 2).float() / width
        angles = torch.outer(torch.arange(steps).float(), 1.0 / self.config["rope_base"] ** exponents)
        turn = torch.polar(torch.ones_like(angles), angles)
        first, second = x[..., : width // 2], x[..., width // 2 :]
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    def block(self, x: Tensor, prefix: str) -> Tensor:
        """One transformer block."""
        x = x + self.attention(self.norm(x, f"{prefix}.norm_1"), f"{prefix}.attn")
        normed = self.norm(x, f"{prefix}.norm_2")
        gate = normed @ self.state[f"{prefix}.mlp.fc_1.weight"].T
        up = normed @ self.state[f"{prefix}.mlp.fc_2.weight"].T
        return x + (gate * torch.sigmoid(gate) * up) @ self.state[f"{prefix}.mlp.proj.weight"].T

    @torch.inference_mode()
    def logits(self, streams: Tensor, heard: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Text logits [B, T, 152000] and code logits [B, 7, T, 4160] of streams [B, 8, T].

        Args:
            streams: joint ids.
            heard: adapter output [A, D], which replaces what all code rows hold from the second step on.
        """
        embedded = self.state["transformer.wte.weight"][streams]  # [B, 8, T, D]
        if heard is not None:
            embedded[:, :ROWS, 1 : len(heard) + 1] = heard
        x = embedded.sum(dim=1) / (ROWS + 1)
        for index in range(self.config["n_layer"]):
            x = self.block(x, f"transformer.h.{index}")
        joint = self.norm(x, "transformer.ln_f") @ self.state["lm_head.weight"].T
        text, codes = joint.split(
            (self.config["text_vocab_size"], self.config["cat_audio_vocab_size"]), dim=-1
        )
        if self.config["post_adapter"]:
            for index in range(self.config["post_adapter_layers"]):
                x = self.block(x, f"transformer.post_adapter.{index}")
            normed = self.norm(x, "transformer.post_adapter_audio_ln")
            codes = normed @ self.state["transformer.post_adapter_audio_lm_head.weight"].T
        return text, codes.unflatten(-1, (ROWS, -1)).transpose(1, 2)

    # --- greedy decoding; everything is computed again at every step ---

    def step(self, streams: Tensor, heard: Tensor | None) -> tuple[Tensor, Tensor]:
        """Likeliest text ids [B] and codes [B, 7] after the last step."""
        text, codes = self.logits(streams, heard)
        return text[:, -1].argmax(dim=-1), codes[:, :, -1].argmax(dim=-1)

    def column(self, codes: Tensor | None, text: int) -> Tensor:
        """The next step's ids, [8, 1]; no codes stand for pads."""
        ids = [self.code_mark + PAD] * ROWS if codes is None else codes.tolist()
        return torch.tensor([[self.joint(code, row)] for row, code in enumerate(ids)] + [[text]])

    def write(self, streams: Tensor, heard: Tensor | None, *, most: int) -> list[int]:
        """Text without speech (asr, A1T2, T1T2): until its end mark, which is not kept."""
        streams, written = streams[None], []
        for _ in range(most):
            token = int(self.step(streams, heard)[0])
            if token == self.text_mark + END:
                break
            written.append(token)
            streams = torch.cat((streams, self.column(None, token)[None]), dim=-1)
        return written

    def speak(self, streams: Tensor, heard: Tensor | None, *, most: int) -> list[list[int]]:
        """Text and codes in one row (A1A2, T1A2): [text, seven codes] of each step."""
        return self._speak(streams[None], heard, most=most)

    def speak_in_parallel(self, streams: Tensor, heard: Tensor | None, *, most: int) -> list[list[int]]:
        """Codes from one row, text from a second one whose code rows hold pads (A1A2 in a batch of two)."""
        silent = streams.clone()
        silent[:ROWS, -1] = self.column(None, 0)[:ROWS, 0]
        return self._speak(torch.stack((streams, silent)), heard, most=most)

    def _speak(self, streams: Tensor, heard: Tensor | None, *, most: int) -> list[list[int]]:
        """Until the last code row writes its end mark, a step that is not kept; pads follow a text's end."""
        said, text_is_over = [], False
        for _ in range(most):
            texts, codes = self.step(streams, heard)
            token = self.text_mark + PAD if text_is_over else int(texts[-1])
            if int(codes[0, -1]) == self.code_mark + END:
                break
            text_is_over = text_is_over or token == self.text_mark + END
            said.append([token, *codes[0].tolist()])
            columns = [self.column(codes[0], token)]
            columns += [self.column(None, token)] * (len(streams) - 1)
            streams = torch.cat((streams, torch.stack(columns)), dim=-1)
        return said
