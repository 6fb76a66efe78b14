"""One step of decoding for Qwen2.5-VL's text layers: `model.generate` runs this in place of the model's own forward, which stays for every other
backbone and, with ENABLED = False, as the readable form of the same numbers (tests/test_decode.py holds the two together).

The layers are those of the paper (arXiv 2502.13923) and of transformers: x + attention(norm(x)), then x + mlp(norm(x)), where queries and keys are
turned by M-RoPE, which is plain RoPE for text. Only attention is done in another way. Its softmax runs over two parts:

    the prompt      its keys and values stand in memory once; all its completions ask them in one matrix product
    the completion  its own keys and values, written in place into memory that grows by BLOCK tokens; what is not used yet is masked, since a
                    product over rows with gaps between them takes four times as long as one over all

Letters of shapes: B rows, P prompts, S seats for rows at each prompt, L prompt tokens, T room for new tokens, H heads of queries,
K of keys and values, R = H / K, d numbers a head. With rows dropped a prompt may have fewer rows than seats; the empty ones cost little.
"""

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

ENABLED = True
BLOCK = 16  # tokens by which memory grows


def fits(model) -> bool:
    """Whether `model` has the layers that are written here; one that was spread over processes is of another class."""
    return ENABLED and type(model) is Qwen2_5_VLForConditionalGeneration and "sliding_attention" not in model.config.text_config.layer_types


class Decoder:
    """What a batch remembers from one token to the next. Weights are the model's own and never copied: they move during training."""

    def __init__(self, model, cache, mask: torch.Tensor, group_size: int):
        """`cache`: of the prompts' forward; mask [P, L], 0 where a prompt is padded; `group_size` rows for each prompt."""
        self.text, self.head, self.length = model.model.language_model, model.lm_head, 0
        self.prompts = [(layer.keys, layer.values) for layer in cache.layers]  # [P, K, L, d] each
        prompts, self.heads, _, self.size = self.prompts[0][0].shape
        self.own = [[x.new_empty(prompts * group_size, self.heads, 0, self.size) for x in pair] for pair in self.prompts]  # [B, K, T, d]
        self.bias = torch.zeros_like(mask, dtype=self.prompts[0][0].dtype).masked_fill(mask == 0, float("-inf"))
        self.seat(torch.arange(prompts, device=mask.device).repeat_interleave(group_size))

    def seat(self, prompt: torch.Tensor) -> None:
        """Row b belongs to prompt[b], rows of one prompt beside each other; prompts without a row are dropped."""
        left, self.prompt, counts = prompt.unique_consecutive(return_inverse=True, return_counts=True)
        if len(left) < len(self.bias):
            self.prompts, self.bias = [(keys[left], values[left]) for keys, values in self.prompts], self.bias[left]
        head, place = torch.arange(self.heads, device=prompt.device), torch.arange(len(prompt), device=prompt.device)
        place = place - (counts.cumsum(0) - counts)[self.prompt]  # of a row among those of its prompt
        self.seats = int(counts.max())
        self.index = ((self.prompt[:, None] * self.heads + head) * self.seats + place[:, None]).flatten()  # [B * K] into [P, K, S]

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone, in their order."""
        self.own = [[x[rows] for x in pair] for pair in self.own]
        self.seat(self.prompt[rows])

    def seated(self, x: torch.Tensor) -> torch.Tensor:
        """[B * K, n] -> [P * K * S, n], 0 in empty seats"""
        return x.new_zeros(len(self.bias) * self.heads * self.seats, x.shape[1]).index_copy_(0, self.index, x)

    def attend(self, q, prompt_keys, prompt_values, keys, values, unused) -> torch.Tensor:
        """softmax(q k' / sqrt(d)) v over the tokens of the prompt and of the completion. q [B, H, d], keys and values [B, K, T, d] -> [B, H * d]"""
        (rows, _, size), (prompts, heads, length, _), scale = q.shape, prompt_keys.shape, self.size**-0.5
        take = lambda x, width: x.view(prompts * heads * self.seats, -1).index_select(0, self.index).view(rows * heads, -1, width)
        bias = self.bias[:, None, None].expand(-1, heads, -1, -1).flatten(0, 1)  # [P * K, 1, L]
        asked = self.seated(q.reshape(rows * heads, -1)).view(prompts * heads, -1, size)  # [P * K, S * R, d]
        first = take(torch.baddbmm(bias, asked, prompt_keys.flatten(0, 1).mT, alpha=scale), length)  # [B * K, R, L]
        second = torch.baddbmm(unused, q.reshape(rows * heads, -1, size), keys.flatten(0, 1).mT, alpha=scale)  # [B * K, R, T]
        first, second = torch.cat([first, second], -1).softmax(-1).split([length, keys.shape[2]], -1)
        first = take(self.seated(first.flatten(1)).view(prompts * heads, -1, length) @ prompt_values.flatten(0, 1), size)  # [B * K, R, d]
        return torch.baddbmm(first, second, values.flatten(0, 1)).view(rows, -1)

    def step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of what follows `token` [B], which stands at `position` [B]."""
        norm = lambda layer, x: F.rms_norm(x, x.shape[-1:], layer.weight, layer.variance_epsilon)
        if self.length == self.own[0][0].shape[2]:
            self.own = [[F.pad(x, (0, 0, 0, BLOCK)) for x in pair] for pair in self.own]
        x, now, self.length = self.text.embed_tokens(token), self.length, self.length + 1
        unused = x.new_zeros(self.own[0][0].shape[2])
        unused[self.length :] = float("-inf")
        cos, sin = (table[0] for table in self.text.rotary_emb(x, position.expand(3, 1, -1)))  # [B, d]
        for layer, prompt, (keys, values) in zip(self.text.layers, self.prompts, self.own):
            attention, y = layer.self_attn, norm(layer.input_layernorm, x)
            q, k, v = (project(y).view(len(y), -1, self.size) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, keys[:, :, now] = apply_rotary_pos_emb(q, k, cos, sin)
            values[:, :, now] = v
            x = x + attention.o_proj(self.attend(q, *prompt, keys, values, unused))
            x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
        return self.head(norm(self.text.norm, x))
