"""A decoder of two layers in float32 over KV pages, and the same model without pages."""

import torch

from kernels.attention import PagedContext, Scoring, attention_reference
from kernels.kv_append import HeadStates, append_kv_reference
from kernels.kv_pages import KvPages

VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 60, 32, 4, 2, 8, 2
SCORING = Scoring(softmax_scale=HEAD_DIM**-0.5)


def normalize(x):
    return x / x.norm(dim=-1, keepdim=True) * HIDDEN**0.5


class SmallDecoder:
    """Learned positions, grouped queries, a residual MLP; logits far enough apart to be greedy."""

    def __init__(self, context_length=128, device="cpu"):
        generator = torch.Generator().manual_seed(3)

        def weight(*shape):
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

        self.vocabulary, self.context_length = VOCABULARY, context_length
        self.device = torch.device(device)
        self.weight_bytes = 4096
        self.chunks_wait = False
        self.forwards = 0
        self.batches = []
        self._embedding, self._positions = (
            weight(VOCABULARY, HIDDEN),
            weight(context_length, HIDDEN),
        )
        self._qkv = [weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN) * 3 for _ in range(LAYERS)]
        self._out = [weight(HIDDEN, HEADS * HEAD_DIM) * 3 for _ in range(LAYERS)]
        self._mlp = [(weight(64, HIDDEN), weight(HIDDEN, 64)) for _ in range(LAYERS)]
        self.head = weight(VOCABULARY, HIDDEN) * 2

    def new_pages(self, pages, *, kv_bits, page_size=16):
        assert kv_bits == 16
        empty = torch.zeros(0)
        shape = (pages, KV_HEADS, 2, page_size, HEAD_DIM)
        return tuple(
            # what nobody wrote must not be read
            KvPages(
                codes=torch.full(shape, torch.nan, device=self.device),
                scale=empty, zero_point=empty, bits=16, head_dim=HEAD_DIM,
            )
            for _ in range(LAYERS)
        )  # fmt: skip

    def forward(self, batch, pages):
        self.batches.append(batch)
        x = self._embed(batch.token_ids.long(), batch.positions.long())
        for layer in range(LAYERS):
            q, k, v = self._project(layer, x)
            states = HeadStates(query=None, key=k, value=v)
            append_kv_reference(pages[layer], states, batch.kv_slots)
            x = self._finish(layer, x, self._attend(q, pages[layer], batch))
        x = x if batch.logit_rows is None else x[batch.logit_rows]
        return normalize(x) @ self.head.T

    def plain(self, token_ids):
        """Logits ``[tokens, V]`` of a whole text, with one causal mask."""
        ids = torch.tensor(token_ids, device=self.device)
        x = self._embed(ids, torch.arange(len(ids), device=self.device))
        for layer in range(LAYERS):
            q, k, v = (states.transpose(0, 1) for states in self._project(layer, x))
            k, v = (each.repeat_interleave(HEADS // KV_HEADS, dim=0) for each in (k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = self._finish(layer, x, mixed.transpose(0, 1))
        return normalize(x) @ self.head.T

    def greedy(self, prompt, count):
        """Continue a text one token at a time."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.plain(ids)[-1].argmax()))
        return tuple(ids[len(prompt) :])

    def _embed(self, ids, positions):
        return 3 * (self._embedding[ids] + self._positions[positions])

    def _project(self, layer, x):
        qkv = normalize(x) @ self._qkv[layer].T
        heads = qkv.view(len(x), -1, HEAD_DIM)
        return heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)

    def _attend(self, q, pages, batch):
        def part(rows, sequences, cu_seqlens=None):
            context = PagedContext(
                block_table=batch.block_table[sequences], lengths=batch.lengths[sequences]
            )
            return attention_reference(q[rows], pages, context, SCORING, cu_seqlens).float()

        decodes = slice(0, batch.decodes)
        parts = [part(decodes, decodes)]
        if batch.cu_seqlens is not None:
            behind = slice(batch.decodes, None)
            parts.append(part(behind, behind, batch.cu_seqlens))
        return torch.cat(parts)

    def _finish(self, layer, x, mixed):
        x = x + mixed.reshape(len(x), -1) @ self._out[layer].T
        up, down = self._mlp[layer]
        return x + torch.tanh(x @ up.T) @ down.T
