"""One step of decoding for Qwen2.5-VL's text layers: `model.generate` runs this in place of the model's own forward, which stays for every other
backbone and, with ENABLED = False, as the readable form of the same numbers (tests/test_decode.py holds the two together).

The layers are those of the paper (arXiv 2502.13923) and of transformers: x + attention(norm(x)), then x + mlp(norm(x)), where queries and keys are
turned by M-RoPE, which is plain RoPE for text. Only attention is done in another way. Its softmax runs over two parts:

    the prompt      its keys and values stand in memory once; all its completions ask them in one matrix product
    the completion  its own keys and values, written in place into memory that grows by BLOCK tokens; what is not used yet is masked, since a
                    product over rows with gaps between them takes four times as long as one over all

Letters of shapes: B rows, P prompts, S seats for rows at each prompt, L prompt tokens, T room for new tokens, H heads of queries,
K of keys and values, R = H / K, d numbers a head. A prompt with fewer rows than another has empty seats: one costs attention as
much as a full one, and the rest of a layer nothing.
"""

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

ENABLED = True
BLOCK = 16  # tokens by which memory grows


def fits(model) -> bool:
    """Whether `model` has the layers that are written here. One that was spread over processes is of another class, and linear layers that are
    quantised or adapted are more than their weights."""
    here = ENABLED and type(model) is Qwen2_5_VLForConditionalGeneration and "sliding_attention" not in model.config.text_config.layer_types
    return here and all(type(getattr(one.self_attn, f"{x}_proj")) is torch.nn.Linear for one in model.model.language_model.layers for x in "qkv")


class Decoder:
    """What a batch remembers from one token to the next, made anew for every batch of `generate`: weights move during training. Queries, keys and
    values are one product, head by head of the keys: R queries, a key, a value. Rows of queries and keys are reordered so that the two numbers
    which RoPE turns together stand beside each other, as one complex number."""

    def __init__(self, model, cache, mask: torch.Tensor):
        """`cache`: of the prompts' forward; mask [P, L], 0 where a prompt is padded. A row for each prompt; batch_select_indices makes more."""
        self.text, self.head, self.length = model.model.language_model, model.lm_head, 0
        prompts, self.heads, _, self.size = cache.layers[0].keys.shape
        self.pairs = pairs = torch.arange(self.size, device=mask.device).view(2, -1).mT.flatten()  # 0, d/2, 1, d/2 + 1, ...
        heads = lambda x: x.unflatten(0, (self.heads, -1, self.size))  # [K, R or 1, d, width]
        mix = lambda q, k, v: torch.cat([heads(q)[:, :, pairs], heads(k)[:, :, pairs], heads(v)], 1).flatten(0, 2)
        parts = [(a.q_proj, a.k_proj, a.v_proj) for a in (layer.self_attn for layer in self.text.layers)]
        self.weights = [(mix(q.weight, k.weight, v.weight), mix(q.bias, k.bias, v.bias)) for q, k, v in parts]
        self.prompts = [(layer.keys[..., pairs].flatten(0, 1), layer.values.flatten(0, 1)) for layer in cache.layers]  # [P * K, L, d] each
        self.own = [[x.new_empty(prompts * self.heads, 0, self.size) for x in pair] for pair in self.prompts]  # [P * K * S, T, d]
        self.padding = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, float("-inf")).repeat_interleave(self.heads, 0)
        self.seat(torch.arange(prompts, device=mask.device))

    def seat(self, prompt: torch.Tensor) -> None:
        """Row b belongs to prompt[b], from 0 on, rows of one prompt beside each other."""
        self.prompt, counts = prompt, prompt.bincount()
        head, place = torch.arange(self.heads, device=prompt.device), torch.arange(len(prompt), device=prompt.device)
        place = place - (counts.cumsum(0) - counts)[prompt]  # of a row among those of its prompt
        seats = int(counts.max())
        self.taken = ((prompt[:, None] * self.heads + head) * seats + place[:, None]).flatten()  # [B, K]: its seat of [P, K, S]
        self.sitting = self.taken.new_zeros(len(counts) * self.heads * seats)  # [P, K, S]: who of [B, K] sits there; the first in empty seats
        self.sitting[self.taken] = torch.arange(len(self.taken), device=prompt.device)

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Goes on with these rows, sorted; a row may come several times, and prompts without one are dropped."""
        old = self.taken.view(-1, self.heads)[rows].flatten()  # where the rows these go on from sat
        left, prompt = self.prompt[rows].unique_consecutive(return_inverse=True)
        if len(left) * self.heads < len(self.padding):
            kept = (left[:, None] * self.heads + torch.arange(self.heads, device=left.device)).flatten()
            self.prompts, self.padding = [(keys[kept], values[kept]) for keys, values in self.prompts], self.padding[kept]
        self.seat(prompt)
        for pair in self.own:  # layer by layer, or all of it would be there twice
            pair[:] = [x[old[self.sitting]] for x in pair]

    def attend(self, q, prompt_keys, prompt_values, keys, values, unused) -> torch.Tensor:
        """softmax(q k' / sqrt(d)) v over the tokens of the prompt and of the completion.
        q [P * K * S, R, d], prompt_keys, prompt_values [P * K, L, d], keys, values [P * K * S, T, d], unused [T] -> [P * K * S, R, d]
        Scores are fp32, as in SDPA's kernels: Qwen2.5's are in the hundreds, where bf16 knows no fractions."""
        seats, scale, length = q.shape[0], self.size**-0.5, prompt_keys.shape[1]
        together = lambda x: x.reshape(len(prompt_keys), -1, x.shape[-1])  # all seats at one prompt: [P * K, S * R, ...]
        first = torch.baddbmm(self.padding[:, None], together(q).float(), prompt_keys.mT.float(), alpha=scale).view(seats, -1, length)
        second = torch.baddbmm(unused, q.float(), keys.mT.float(), alpha=scale)  # [P * K * S, R, T]
        share = torch.cat([first, second], -1).softmax(-1).to(q.dtype)
        first = torch.bmm(together(share)[..., :length], prompt_values).view(q.shape)
        return torch.baddbmm(first, share[..., length:], values)

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of what follows `token` [B], which stands at `position` [B]."""
        norm = lambda layer, x: F.rms_norm(x, x.shape[-1:], layer.weight, layer.variance_epsilon)
        if self.length == self.own[0][0].shape[1]:
            for pair in self.own:
                pair[:] = [F.pad(x, (0, 0, 0, BLOCK)) for x in pair]
        x, now, self.length = self.text.embed_tokens(token), self.length, self.length + 1
        unused = torch.zeros(self.own[0][0].shape[1], device=x.device)
        unused[self.length :] = float("-inf")
        tables = self.text.rotary_emb(x, position.expand(3, 1, -1))  # cos and sin, their second half like the first
        turn = torch.complex(*(table[0, :, None, None, : self.size // 2].float() for table in tables))  # [B, 1, 1, d / 2]
        for layer, weights, prompt, (keys, values) in zip(self.text.layers, self.weights, self.prompts, self.own):
            mixed = F.linear(norm(layer.input_layernorm, x), *weights).view(len(x), self.heads, -1, self.size)  # [B, K, R + 2, d]
            mixed[:, :, :-1] = torch.view_as_real(torch.view_as_complex(mixed[:, :, :-1].float().unflatten(-1, (-1, 2))) * turn).flatten(-2)
            mixed = mixed.flatten(0, 1)[self.sitting]  # [P * K * S, R + 2, d]
            keys[:, now], values[:, now] = mixed[:, -2], mixed[:, -1]
            made = self.attend(mixed[:, :-2], *prompt, keys, values, unused).flatten(1)[self.taken].view(len(x), -1)  # [B, H * d]
            x = x + layer.self_attn.o_proj(made)
            x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
        return self.head(norm(self.text.norm, x))
