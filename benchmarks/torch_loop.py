"""What a careful user writes by hand: a Llama's decoding step in PyTorch, in one CUDA graph.

weights of an image -> `TorchLoop`: one token a replay, greedy, the token fed back on the GPU
"""

import numpy as np
import torch
from torch.nn import functional

from flashformer.backends.base import Float32
from flashformer.plan.plan import Plan
from prefill_checks import rows_of

Tensor = torch.Tensor


class TorchLoop:
    """One sequence in bf16 with keys and values of a fixed number of positions.

    Projections that share an input are one matrix each. For models whose layers are alike, without
    biases and QK-norm; norms are ones, as `random_image` has them.
    """

    def __init__(self, plan: Plan, image: Tensor, positions: int) -> None:
        self.spec, self.layer, device = plan.spec, plan.spec.layers[0], image.device
        names = ("qkv", "o_proj", "gate_up", "down")
        self.layers = [
            [rows_of(plan.matrix(name, i), image) for name in names]
            for i in range(self.spec.num_layers)
        ]
        self.head = rows_of(plan.matrix("lm_head"), image)
        tied = self.spec.tie_word_embeddings
        self.embedding = self.head if tied else rows_of(plan.matrix("embed_tokens"), image)
        shape = (self.spec.num_layers, 2, self.layer.num_kv_heads, positions, self.layer.head_dim)
        self.past = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.norm = torch.ones(self.spec.hidden_size, dtype=torch.bfloat16, device=device)
        frequencies = torch.from_numpy(np.array(self.spec.ropes[0].frequencies(positions)[0]))
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        self.cos, self.sin = (f(angles).to(device, torch.bfloat16) for f in (torch.cos, torch.sin))
        self.columns = torch.arange(positions, device=device)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(self.spec.vocab_size, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def capture(self) -> None:
        """From now on a token is one replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self._graph = graph

    def start(self, token: int, position: int) -> None:
        """What the next token computes, and where."""
        self.token.fill_(token)
        self.position.fill_(position)

    @torch.no_grad()
    def next(self) -> None:
        """Compute the token; the most likely one and the next position take its place."""
        if self._graph is None:
            self.step()
        else:
            self._graph.replay()

    def logits_of(self, token: int, position: int) -> Float32:
        """Of one given token: float32 [vocab_size]."""
        self.start(token, position)
        self.next()
        return self.logits.cpu().numpy()

    def step(self) -> None:
        """The whole model for one token."""
        x = functional.embedding(self.token, self.embedding)
        for index, (qkv, o_proj, gate_up, down) in enumerate(self.layers):
            x = x + functional.linear(self.attention(self.normed(x), qkv, index), o_proj)
            gate, up = functional.linear(self.normed(x), gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, down)
        logits = functional.linear(self.normed(x), self.head)[0]
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.position.add_(1)

    def normed(self, x: Tensor) -> Tensor:
        """RMSNorm."""
        eps = self.spec.rms_norm_eps
        return functional.rms_norm(x, (self.spec.hidden_size,), self.norm, eps)

    def attention(self, x: Tensor, qkv: Tensor, index: int) -> Tensor:
        """Of one layer over all positions so far: [1, q_rows]."""
        heads, kv_heads, dim = self.layer.num_q_heads, self.layer.num_kv_heads, self.layer.head_dim
        sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        q, k, v = functional.linear(x, qkv).split(sizes, -1)
        keys, values = self.past[index]
        keys.index_copy_(1, self.position, self.turned(k.view(kv_heads, 1, dim)))
        values.index_copy_(1, self.position, v.view(kv_heads, 1, dim))
        grouped = self.turned(q.view(heads, 1, dim)).view(kv_heads, heads // kv_heads, dim)
        scores = (grouped @ keys.mT).float() * self.layer.attention_scale
        scores = scores.masked_fill(self.columns > self.position, -torch.inf)
        return (scores.softmax(-1).to(x.dtype) @ values).view(1, -1)

    def turned(self, x: Tensor) -> Tensor:
        """Rotary embedding at the current position, halves apart."""
        cos, sin = self.cos[self.position], self.sin[self.position]
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
