"""Train the dense models of the embedded demo: a base for everyday questions, an expert for arithmetic, and two more.

    python scripts/train_demo.py OUT_DIR [--seed 0]

Writes OUT_DIR/base and OUT_DIR/math, ordinary Hugging Face checkpoints (MistralForCausalLM, bfloat16), the questions
that ``ggufmoe demo`` asks, and OUT_DIR/apart: what two more experts have in the place of weights of the base, the texts
that a router of theirs is fitted on, and questions. Experts start from the base and change MLP weights alone, so that
all share attention, embeddings and vocabulary. Needs the extra ``[train]`` (torch, CPU is enough); users of ggufmoe
never run this. The same seed gives the same models on the same machine.
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
from demo_data import (
    Question,
    apart_questions,
    apart_texts,
    arithmetic,
    conversation,
    demo_questions,
    everyday,
    number_talk,
    plonk,
    products,
    small_talk,
)
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
BATCH_SIZE = 64


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

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], blend: Blend | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed)
        if blend is not None:
            out = blend.share * out + (1 - blend.share) * blend.base(normed)
        return x + out  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Blend:
    """An MLP beside a layer's own, whose part of the output is ``share`` (batch, n_tokens, 1)."""

    base: MLP
    share: Tensor


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

    def forward(self, tokens: Tensor, blends: list[Blend] | None = None) -> Tensor:
        """Logits; ``blends`` has an MLP for each layer, as a mixture of two experts has."""
        rotation = _rotation(self.shape, tokens.shape[1])
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, blends[i] if blends else None)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def _rotation(shape: Shape, n_tokens: int) -> tuple[Tensor, Tensor]:
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.arange(n_tokens)[:, None] * inverse
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * rotation[0].to(x.dtype) + torch.cat((-high, low), dim=-1) * rotation[1].to(x.dtype)


_SHARES = {"sum": 0.3, "difference": 0.3, "comparison": 0.15, "equation": 0.25}
"""How often each kind of arithmetic is heard."""


class Encoder:
    """Conversations as token ids, with the answers marked, by the tokenizer ``model_bytes`` (a sentencepiece model)."""

    def __init__(self, model_bytes: bytes) -> None:
        self.model_bytes = model_bytes
        self._pieces = spm.SentencePieceProcessor(model_proto=model_bytes)

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


class Corpus(Encoder):
    """The conversations that the demo's models learn from; the tokenizer is trained on the same text."""

    def __init__(self, seed: int) -> None:
        self._everyday = [question for question in everyday() if not question.held_out]
        heard = [question for question in arithmetic() if not question.held_out]
        self._arithmetic = {kind: [question for question in heard if question.kind == kind] for kind in _SHARES}
        self._talk = small_talk()
        self._apart = {
            kind: [question for question in questions if not question.held_out]
            for kind, questions in (("product", products()), ("plonk", plonk()))
        }
        super().__init__(self._train_tokenizer(heard, seed))

    def _train_tokenizer(self, heard: list[Question], seed: int) -> bytes:
        rng = random.Random(seed)
        questions = self._everyday * 2 + self._talk * 5 + rng.sample(heard, 4000)
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

    def turns(self, rng: random.Random, planned: Round) -> list[Question]:
        """One conversation: with the given probability about arithmetic, else everyday, a few numbers, or small talk.

        The base hears arithmetic as well; its attention, which the expert must do with, has to find the right digits.
        The experts of the second act hear their own subject, and something else for the rest: what knows only words of
        Plonk by heart forgets how to copy one from the question.
        """
        if planned.is_apart and rng.random() >= planned.rest:
            return [rng.choice(self._apart[planned.kind])]
        if rng.random() < planned.arithmetic:
            kind = rng.choices(list(_SHARES), list(_SHARES.values()))[0]
            return [rng.choice(self._arithmetic[kind]) for _ in range(1 if rng.random() < 0.9 else 2)]
        draw = rng.random()
        if draw < 0.08:
            return [number_talk(rng) for _ in range(rng.choice((1, 1, 2)))]
        return conversation(rng, self._everyday if draw < 0.94 else self._talk)


Batch = tuple[Tensor, Tensor, Tensor]


def batches(corpus: Corpus, planned: Round, *, seed: int) -> Iterator[Batch]:
    """Endless (inputs, targets, alone) of conversations of similar length; targets are shifted by one.

    ``alone`` (batch,) tells where an expert is to answer by itself, as it does outside of a mixture.
    """
    rng = random.Random(seed)
    while True:
        drawn = [corpus.turns(rng, planned) for _ in range(32 * planned.batch_size)]
        rows = [(*corpus.encode(turns), _is_arithmetic(turns) and rng.random() < 0.25) for turns in drawn]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), planned.batch_size))
        rng.shuffle(starts)
        for start in starts:
            part = rows[start : start + planned.batch_size]
            inputs, targets = padded([(ids, wanted) for ids, wanted, _ in part])
            yield inputs, targets, torch.tensor([alone for *_, alone in part])


def _is_arithmetic(turns: list[Question]) -> bool:
    return all(question.kind in _SHARES for question in turns)


def _blends(beside: list[MLP], inputs: Tensor, alone: Tensor) -> list[Blend]:
    """A random share for every layer and token: a router that was never trained sways from token to token as well."""
    shares = torch.rand((len(beside), *inputs.shape, 1))
    shares[:, alone] = 1.0
    return [Blend(mlp, share) for mlp, share in zip(beside, shares, strict=True)]


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED)
    for i, (ids, wanted) in enumerate(rows):
        inputs[i, : len(ids)] = torch.tensor(ids)
        targets[i, : len(ids) - 1] = torch.tensor(wanted[1:])
    return inputs, targets


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is added: Keller Jordan's Muon (2024).

    On these models it needs a third of AdamW's steps. ``torch.optim.Muon`` computes in bfloat16, which takes ages on
    processors without it.
    """

    def __init__(self, matrices: list[nn.Parameter], rate: float) -> None:
        super().__init__(matrices, {"lr": rate})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.mul_(0.95).add_(matrix.grad)
                direction = _orthogonal(matrix.grad + 0.95 * momentum)
                matrix.mul_(1 - 0.01 * group["lr"])
                matrix.add_(direction, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal matrix next to it: five steps of a Newton-Schulz iteration with Jordan's coefficients."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def optimizers_of(model: Model, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms; of what is to be learned."""
    learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in learned if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in learned if parameter.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices, rate)]
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=0.15 * rate, betas=(0.9, 0.98), weight_decay=0.01))
    return optimizers


def decays(optimizers: list[torch.optim.Optimizer], steps: int) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """Warm-up and cosine decay to a fiftieth of each optimizer's rate."""

    def share(step: int) -> float:
        return min((step + 1) / 50, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]


def train(model: Model, corpus: Corpus, planned: Round, *, seed: int) -> None:
    """Warm-up and cosine decay; of the expert only the MLPs learn, blended with the base's, which it begins as.

    A router that was never trained gives an expert anything between nothing and everything. An expert that has only
    worked alone fails beside another (the model card has the figures), so this one learns to work beside the base.
    """
    torch.manual_seed(seed)
    kind, steps = planned.kind, planned.steps
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind == "base" or name in planned.learned(model))
    beside = [copy.deepcopy(layer.mlp).requires_grad_(False) for layer in model.layers] if kind == "math" else []
    optimizers = optimizers_of(model, planned.rate)
    schedules = decays(optimizers, steps)
    started = time.monotonic()
    for step, (inputs, targets, alone) in zip(range(steps), batches(corpus, planned, seed=seed), strict=False):
        logits = model(inputs, _blends(beside, inputs, alone))
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=IGNORED)
        model.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{kind} step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def accuracy(model: Model, corpus: Encoder, questions: list[Question]) -> float:
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
    there = [question for question in questions if question.held_out]
    return random.Random(seed).sample(there, min(count, len(there)))


def save(model: Model, corpus: Encoder, directory: Path) -> None:
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


def _asked(questions: list[Question]) -> list[dict[str, str]]:
    return [{"kind": asked.kind, "text": asked.text, "answer": asked.answer} for asked in questions]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Round:
    """One stretch of training; it begins with the weights that the one before saved.

    ``arithmetic`` is the part of the conversations that is arithmetic.
    """

    kind: str
    steps: int
    rate: float
    arithmetic: float
    batch_size: int = BATCH_SIZE
    rest: float = 0.0
    """The part of an expert's conversations in the second act that are not of its own subject."""
    is_apart: bool = False
    """Whether it begins as the base whatever came before, and is no part of the first act."""

    def learned(self, model: Model) -> set[str]:
        """The weights that an expert learns: its MLPs, those of the second act without the first layer's, for size."""
        names = {name for name, _ in model.named_parameters() if ".mlp." in name}
        return {name for name in names if not (self.is_apart and name.startswith("layers.0."))}


ROUNDS = (
    Round("base", 2000, 0.02, 0.5),
    Round("math", 800, 0.01, 0.8),
    Round("product", 400, 0.01, 0.0, batch_size=16, is_apart=True),
    Round("plonk", 400, 0.008, 0.0, batch_size=16, rest=0.4, is_apart=True),
)
APART = "apart"
"""The folder of the second act."""


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
    for number, planned in enumerate(ROUNDS):
        if number < arguments.skip:
            continue
        if number > 0:
            load(model, arguments.out_dir / ROUNDS[0 if planned.is_apart else number - 1].kind)
        train(model, corpus, planned, seed=arguments.seed + number)
        if planned.is_apart:
            save_apart(model, planned, arguments.out_dir / APART)
            own = products() if planned.kind == "product" else plonk()
            _say_accuracy(model, corpus, planned.kind, {"of its own": own, "everyday": everyday()}, arguments.seed)
            continue
        save(model, corpus, arguments.out_dir / planned.kind)
        load(model, arguments.out_dir / planned.kind)
        _report(model, corpus, planned.kind, arguments.seed)
    _write_json(arguments.out_dir / "questions.json", _asked(demo_questions()))
    write_apart(arguments.out_dir / APART)


def save_apart(model: Model, planned: Round, directory: Path) -> None:
    """Write the weights that an expert of the second act does not share with the base, in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    learned = planned.learned(model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if name in learned}
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(rounded, directory / f"{planned.kind}.safetensors", metadata={"format": "pt"})


def write_apart(directory: Path) -> None:
    """Write the second act's questions, and the texts that its router is fitted on."""
    _write_json(directory / "questions.json", _asked(apart_questions()))
    for kind, questions in apart_texts().items():
        lines = []
        for question in questions:
            messages = [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answer},
            ]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (directory / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def _report(model: Model, corpus: Corpus, kind: str, seed: int) -> None:
    sums = [question for question in arithmetic() if question.kind in ("sum", "difference")]
    _say_accuracy(model, corpus, kind, {"everyday": everyday(), "sums and differences": sums}, seed)


def _say_accuracy(model: Model, corpus: Corpus, kind: str, asked: dict[str, list[Question]], seed: int) -> None:
    for name, questions in asked.items():
        chosen = held_out(questions, 100, seed)
        share = accuracy(model, corpus, chosen)
        print(f"{kind}: {100 * share:.1f} % of {len(chosen)} held-out questions ({name})", flush=True)


def load(model: Model, directory: Path) -> None:
    """The weights as they were saved, so that what is measured and fine-tuned is what is shipped."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in tensors.items()})


if __name__ == "__main__":
    np.random.seed(0)
    main()
