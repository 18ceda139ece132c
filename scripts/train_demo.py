"""Train the two dense models of the embedded demo: a base for everyday questions and an expert for arithmetic.

    python scripts/train_demo.py OUT_DIR [--seed 0]

Writes OUT_DIR/base and OUT_DIR/math, ordinary Hugging Face checkpoints (MistralForCausalLM, bfloat16). The expert
starts from the base and changes its MLP weights alone, so that both share attention, embeddings and vocabulary. Needs
the extra ``[train]`` (torch, CPU is enough); users of ggufmoe never run this. The same seed and number of steps give
the same models on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F  # noqa: N812
from demo_data import Question, arithmetic, conversation, everyday, number_talk, small_talk
from safetensors.torch import save_file
from torch import Tensor, nn

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
IGNORED = -100
BATCH_SIZE = 48


@dataclass(frozen=True)
class Shape:
    """The hyper-parameters of both models; every row length is a multiple of 256, so K-quants apply."""

    n_vocab: int = 1024
    n_embd: int = 256
    n_ff: int = 768
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    n_ctx: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class RMSNorm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.n_embd))
        self._eps = shape.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        kv = shape.n_head_kv * shape.head_dim
        self.q_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, kv, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, kv, bias=False)
        self.o_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, n_tokens, _ = x.shape
        heads = (batch, n_tokens, -1, self._shape.head_dim)
        q = _rotate(self.q_proj(x).view(heads).transpose(1, 2), rotation)
        k = _rotate(self.k_proj(x).view(heads).transpose(1, 2), rotation)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        group = self._shape.n_head // self._shape.n_head_kv
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, n_tokens, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.up_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.down_proj = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], base: MLP | None, share: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed)
        if base is not None and share is not None:
            out = share * out + (1 - share) * base(normed)
        return x + out  # type: ignore[no-any-return]


class Model(nn.Module):
    """A Mistral, with the parameter names of its Hugging Face checkpoint (less the leading ``model.``)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layer))
        self.norm = RMSNorm(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = 0.02 / math.sqrt(2 * shape.n_layer) if name.endswith(("o_proj", "down_proj")) else 0.02
                nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: Tensor, base: list[MLP] | None = None, share: Tensor | None = None) -> Tensor:
        """Logits; with ``base``, MLPs beside the model's own, whose part is ``share`` (batch, 1, 1)."""
        rotation = _rotation(self.shape, tokens.shape[1])
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, base[i] if base else None, share)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def _rotation(shape: Shape, n_tokens: int) -> tuple[Tensor, Tensor]:
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.arange(n_tokens)[:, None] * inverse
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * rotation[0].to(x.dtype) + torch.cat((-high, low), dim=-1) * rotation[1].to(x.dtype)


class Corpus:
    """Conversations as token ids, with the answers marked; the tokenizer is trained on the same text."""

    def __init__(self, seed: int) -> None:
        self._everyday = [question for question in everyday() if not question.held_out]
        self._arithmetic = [question for question in arithmetic() if not question.held_out]
        self._sums = [question for question in self._arithmetic if question.kind in ("sum", "difference")]
        self._talk = small_talk()
        self.model_bytes = self._train_tokenizer(seed)
        self._pieces = spm.SentencePieceProcessor(model_proto=self.model_bytes)

    def _train_tokenizer(self, seed: int) -> bytes:
        rng = random.Random(seed)
        questions = self._everyday * 2 + self._talk * 5 + rng.sample(self._arithmetic, 4000)
        questions += [number_talk(rng) for _ in range(2000)]
        sentences = [f"[INST] {question.text} [/INST] {question.answer}" for question in questions]
        rng.shuffle(sentences)
        out = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=out,
            model_type="bpe",
            vocab_size=Shape.n_vocab,
            byte_fallback=True,
            split_digits=True,
            split_by_unicode_script=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
        return out.getvalue()

    def base_turns(self, rng: random.Random) -> list[Question]:
        """One training conversation of the base: mostly everyday, some numbers, and sums enough to know what they are.

        Without the sums its attention, which the expert must do with, would not learn to look at the right digits.
        """
        draw = rng.random()
        if draw < 0.3:
            return [rng.choice(self._sums)]
        if draw < 0.42:
            return [number_talk(rng) for _ in range(rng.choice((1, 1, 2)))]
        return conversation(rng, self._everyday if draw < 0.96 else self._talk)

    def math_turns(self, rng: random.Random) -> list[Question]:
        """One training conversation of the expert: arithmetic, and now and then what the base was trained on."""
        if rng.random() < 0.2:
            return conversation(rng, self._everyday)
        return [rng.choice(self._arithmetic) for _ in range(1 if rng.random() < 0.85 else 2)]

    def encode(self, turns: list[Question]) -> tuple[list[int], list[int]]:
        """Ids and targets; only answers and their end are learned."""
        ids, targets = [self._pieces.bos_id()], [IGNORED]
        for turn in turns:
            question = self._pieces.encode(f"[INST] {turn.text} [/INST]")
            answer = self._pieces.encode(f"[INST] {turn.text} [/INST] {turn.answer}")[len(question) :]
            ids += [*question, *answer, self._pieces.eos_id()]
            targets += [IGNORED] * len(question) + answer + [self._pieces.eos_id()]
        return ids, targets

    def decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids).strip()

    def prompt(self, question: Question) -> list[int]:
        return [self._pieces.bos_id(), *self._pieces.encode(f"[INST] {question.text} [/INST]")]

    @property
    def eos_id(self) -> int:
        return int(self._pieces.eos_id())


Batch = tuple[Tensor, Tensor, Tensor]


def batches(corpus: Corpus, kind: str, *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless (inputs, targets, shares) of conversations of similar length; targets are shifted by one.

    A share is the part that the expert will have in a mixture: much of it for arithmetic, little for the rest.
    """
    rng = random.Random(seed)
    turns = corpus.base_turns if kind == "base" else corpus.math_turns
    while True:
        drawn = [turns(rng) for _ in range(32 * batch_size)]
        rows = [(*corpus.encode(turn), _share(rng, turn)) for turn in drawn]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), batch_size))
        rng.shuffle(starts)
        for start in starts:
            part = rows[start : start + batch_size]
            inputs, targets = _padded([(ids, wanted) for ids, wanted, _ in part])
            yield inputs, targets, torch.tensor([share for *_, share in part])[:, None, None]


def _share(rng: random.Random, turns: list[Question]) -> float:
    is_math = all(question.kind not in ("everyday", "talk") for question in turns)
    return rng.uniform(0.4, 1.0) if is_math else rng.uniform(0.0, 0.6)


def _padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (ids, wanted) in enumerate(rows):
        inputs[i, : len(ids)] = torch.tensor(ids)
        targets[i, : len(ids) - 1] = torch.tensor(wanted[1:])
    return inputs, targets


def train(model: Model, corpus: Corpus, kind: str, *, steps: int, seed: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay; for the expert only the MLPs learn, blended with the base's.

    A router that was never trained seldom gives an expert everything. An expert that has only worked alone fails when
    the base has a third of the say (the model card has the figures), so it learns to work beside it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind == "base" or ".mlp." in name)
    beside = [copy.deepcopy(layer.mlp).requires_grad_(False) for layer in model.layers] if kind == "math" else None
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    started = time.monotonic()
    for step, (inputs, targets, shares) in zip(
        range(steps), batches(corpus, kind, batch_size=BATCH_SIZE, seed=seed), strict=False
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, beside, shares)
        loss = F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{kind} step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: Model, corpus: Corpus, questions: list[Question]) -> float:
    """Share of questions answered to the letter, greedily."""
    right = 0
    for question in questions:
        ids = corpus.prompt(question)
        start = len(ids)
        while len(ids) < start + 40:
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token == corpus.eos_id:
                break
            ids.append(token)
        right += corpus.decode(ids)[len(corpus.decode(ids[:start])) :].strip() == question.answer
    return right / len(questions)


def held_out(questions: list[Question], count: int, seed: int) -> list[Question]:
    """A seeded sample of questions that were never trained on."""
    return random.Random(seed).sample([question for question in questions if question.held_out], count)


def save(model: Model, corpus: Corpus, directory: Path) -> None:
    """Write an ordinary Hugging Face checkpoint in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.model").write_bytes(corpus.model_bytes)
    _write_json(directory / "config.json", _config(model.shape))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    _write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "vocab_size": shape.n_vocab,
        "max_position_embeddings": shape.n_ctx,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": Shape.n_ctx,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


ROUNDS = (("base", 2500, 2e-3), ("base", 1500, 1e-3), ("math", 2500, 1.5e-3))
"""What is trained, for how many steps, at which rate; each round begins with the weights that the last one saved."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--skip", type=int, default=0, metavar="N", help="go on after N rounds, from what is in OUT_DIR"
    )
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    corpus = Corpus(arguments.seed)
    model = Model(Shape())
    print(json.dumps(asdict(model.shape)), sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    for number, (kind, steps, rate) in enumerate(ROUNDS):
        if number < arguments.skip:
            continue
        if number > 0:
            _load(model, arguments.out_dir / ROUNDS[number - 1][0])
        train(model, corpus, kind, steps=steps, seed=arguments.seed + number, rate=rate)
        save(model, corpus, arguments.out_dir / kind)
        _load(model, arguments.out_dir / kind)
        _report(model, corpus, kind, arguments.seed)


def _report(model: Model, corpus: Corpus, kind: str, seed: int) -> None:
    sums = [question for question in arithmetic() if question.kind in ("sum", "difference")]
    for name, questions in (("everyday questions", everyday()), ("sums and differences", sums)):
        share = accuracy(model, corpus, held_out(questions, 100, seed))
        print(f"{kind}: {100 * share:.1f} % of 100 held-out {name}", flush=True)


def _load(model: Model, directory: Path) -> None:
    """The weights as they were saved, so that what is measured and fine-tuned is what is shipped."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})


if __name__ == "__main__":
    np.random.seed(0)
    main()
