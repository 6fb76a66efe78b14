"""The model: load or build it, turn prompts into tensors, sample from it, score what was sampled, save it.

Any Qwen2.5-VL checkpoint runs through the same lines as the small one that is built here from a config. Two functions matter:

    generate(...)             samples G completions per prompt and returns their ids, lengths and log-probabilities
    completion_logprobs(...)  scores the same ids, with gradients; log pi(y_t | x, y_<t) of GRPO's ratio and KL

Both share work the same way: the prompt, which is mostly image, is run once, and its G completions on top of its repeated key-value
cache. `completion_logprobs(..., share_prompt=False)` is the plain form, one full sequence per row; the tests hold the two together.
"""

import functools
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps, ImageSequence
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

import config
import data

transformers.utils.logging.disable_progress_bar()  # loading the small model takes less time than drawing the bar

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SENTINEL = "\ue000"  # stands for one piece of user text while the chat template is rendered


@dataclass
class Processor:
    tokenizer: object
    image_processor: object

    def text(self, ids) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def device_of(model) -> torch.device:
    return next(model.parameters()).device


# -------------------------------------------------------------------------------------------------------------- processes


def world() -> tuple:
    """(rank, processes). Under torchrun every process holds the whole model and takes every n-th example of a batch; since denominators
    count the whole batch, summed gradients are those of one process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_gradients(model, loss: float) -> float:
    """Adds up the gradients of all processes, in place, in one message; returns the summed loss."""
    if world()[1] == 1:
        return loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters] + [torch.tensor([loss], device=device_of(model))])
    dist.all_reduce(flat)
    for p, gradient in zip(parameters, flat[:-1].split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
    return flat[-1].item()


# ----------------------------------------------------------------------------------------------------------- load and save


def load(path: str, dtype: torch.dtype | None = None) -> tuple:
    """(model in eval mode, Processor) from a Hugging Face folder or hub name; fp32 on the CPU, where bf16 is far slower."""
    if not Path(path).is_dir() and Path(path).is_absolute():
        raise config.UserError(f"no model folder {path}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or torch.float32, attn_implementation="sdpa").to(device).eval()
    # Without torchvision only the Pillow backend exists; its pixels are the same.
    return model, Processor(AutoTokenizer.from_pretrained(path), AutoImageProcessor.from_pretrained(path, backend="pil"))


def save(model, processor: Processor, folder: Path, dtype: torch.dtype | None = None) -> None:
    """An ordinary Hugging Face folder. `dtype`: precision of the written weights only."""
    if not config.is_main():
        return
    state = {name: value.detach().to(dtype or value.dtype) for name, value in model.named_parameters()}  # tied weights once
    model.save_pretrained(folder, state_dict=state)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def freeze_vision(model) -> None:
    """Only the language model learns (paper, section 4.1); an error where the parameter names are not what is expected."""
    frozen = [p for name, p in model.named_parameters() if ".visual." in f".{name}"]
    if not frozen or len(frozen) == len(list(model.parameters())):
        raise config.UserError(f"{type(model).__name__}: found {len(frozen)} vision parameters to freeze; this class names its vision tower otherwise")
    for parameter in frozen:
        parameter.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------- the small backbone


def train_tokenizer(texts: list, vocab_size: int):
    """Byte-level BPE on the project's own text: any string can be written with it, and words of the small world are one token each.
    Candidates ("Image 1"), tags and numbers up to two digits stay whole: shorter sequences, and one token per number of a sum."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    words = Regex(r"</?(?:think|answer)>| ?(?:Image|Video|Answer) [12]|/10\)\.?|[0-9]{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}<]+|<|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = [PAD, IM_START, IM_END, *VISION]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=IM_END, pad_token=PAD, additional_special_tokens=special[1:2] + list(VISION))
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def build_small(settings: config.Model, tokenizer) -> tuple:
    """A Qwen2.5-VL of one to two million random weights, N(0, 1/sqrt(fan_in)): the usual 0.02 learns slowly at this width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in zip(("vision_start", "vision_end", "image", "video"), VISION)}
    half = settings.hidden_size // settings.heads // 2
    width, vision = settings.hidden_size, settings.vision_hidden_size
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
                         num_attention_heads=settings.heads, num_key_value_heads=settings.heads, max_position_embeddings=4096, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]},
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(depth=settings.vision_layers, hidden_size=vision, intermediate_size=2 * vision, num_heads=4, patch_size=8, spatial_merge_size=2,
                           temporal_patch_size=2, window_size=64, out_hidden_size=width, fullatt_block_indexes=[settings.vision_layers - 1], tokens_per_second=1),
        image_token_id=ids["image"], video_token_id=ids["video"], vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=16 * 16, max_pixels=512 * 512)
    return model.eval(), Processor(tokenizer, processor)


# ----------------------------------------------------------------------------------------------------- prompts to tensors


@functools.lru_cache(maxsize=65536)
def small_patches(path: str, image_processor) -> tuple:
    """Patches of one file, kept because every epoch and every group asks for them again (24 KB each in the small world)."""
    made = image_processor(images=[read_image(path)], return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0]


def encode_media(processor: Processor, part: dict) -> tuple:
    """(patches [n, d], grid [3]) of one image or video. A video's frames are patchified two by two, which is the image processor's
    own layout with the second copy of a frame replaced by the next frame; an odd last frame is repeated."""
    if part["type"] == "image":
        return small_patches(part["image"], processor.image_processor)
    frames = [small_patches(path, processor.image_processor) for path in data.fit_clips([part["video"]], limits.frames)[0]]
    if len({tuple(grid.tolist()) for _, grid in frames}) != 1:
        raise config.UserError(f"the frames of {data.flat(part['video'])[0]} ... differ in size")
    frames += frames[-1:] * (len(frames) % 2)
    grid, size = frames[0][1], processor.image_processor.patch_size
    pairs = []
    for (first, _), (second, _) in zip(frames[::2], frames[1::2]):
        patch = first.view(first.shape[0], 3, 2, size, size).clone()  # [n, channel, time, height, width]
        patch[:, :, 1] = second.view_as(patch)[:, :, 1]
        pairs.append(patch.flatten(1))
    return torch.cat(pairs), torch.tensor([len(pairs), grid[1], grid[2]])


def tokenize(tokenizer, text: str, plain: bool) -> list:
    """`plain`: strings such as <|im_end|> in user text are spelled out, never read as control tokens."""
    core = tokenizer.backend_tokenizer
    core.encode_special_tokens = plain
    return core.encode(text, add_special_tokens=False).ids


def encode(processor: Processor, model, parts: list, prefix: str = "", response: str | None = None) -> dict:
    """One prompt as tensors: ids [L], types [L] (0 text, 1 image, 2 video), positions [3, L], patches and grids.

    The chat template is rendered with a sentinel in the place of user text; template and user text are then tokenised apart, so user
    text cannot open a turn or add a placeholder. `prefix` is opened after the assistant's turn ("<think>"); `response`, for SFT, adds
    its tokens and EOS, and "prompt_length" says where they begin."""
    tokenizer, vision = processor.tokenizer, model.config.vision_config
    texts = iter([part["text"] for part in parts if part["type"] == "text"])
    media = iter([encode_media(processor, part) for part in parts if part["type"] != "text"])
    ids, types, grids, patches = [], [], {1: [], 2: []}, {1: [], 2: []}
    for piece in rendered_template(tokenizer, tuple(part["type"] for part in parts)):
        if piece == SENTINEL:
            tokens = tokenize(tokenizer, next(texts), plain=True)
            ids += tokens
            types += [0] * len(tokens)
        elif piece in (model.config.image_token_id, model.config.video_token_id):
            kind = 1 if piece == model.config.image_token_id else 2
            patch, grid = next(media)
            count = int(grid.prod()) // vision.spatial_merge_size**2
            ids += [piece] * count
            types += [kind] * count
            grids[kind].append(grid)
            patches[kind].append(patch)
        else:
            ids.append(piece)
            types.append(0)
    tail = tokenize(tokenizer, prefix, plain=True)
    prompt_length = len(ids) + len(tail)
    if response is not None:
        tail = tail + tokenize(tokenizer, response, plain=True) + [tokenizer.eos_token_id]
    ids, types = torch.tensor(ids + tail), torch.tensor(types + [0] * len(tail))
    found = {1: torch.stack(grids[1]) if grids[1] else None, 2: torch.stack(grids[2]) if grids[2] else None}
    if any(g is not None for g in found.values()):
        positions = model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=found[1], video_grid_thw=found[2])[0][:, 0]
    else:
        positions = torch.arange(len(ids)).expand(3, -1)
    return {"ids": ids, "types": types, "positions": positions, "grids": found, "prompt_length": prompt_length,
            "patches": {kind: torch.cat(p) if p else None for kind, p in patches.items()}}


@functools.lru_cache(maxsize=256)
def rendered_template(tokenizer, kinds: tuple) -> tuple:
    """Token ids of the chat template around parts of these kinds, with SENTINEL where user text goes."""
    parts = [{"type": "text", "text": SENTINEL} if kind == "text" else {"type": kind} for kind in kinds]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    pieces = []
    for k, piece in enumerate(text.split(SENTINEL)):
        pieces += ([SENTINEL] if k else []) + tokenize(tokenizer, piece, plain=False)
    return tuple(pieces)


def collate(encoded: list, side: str, pad_id: int, device) -> dict:
    """Inputs of the model's forward for a batch, padded on `side` ("left" to continue, "right" to train). Patches follow row order."""
    length = max(len(e["ids"]) for e in encoded)
    pad = lambda x, value: F.pad(x, (length - x.shape[-1], 0) if side == "left" else (0, length - x.shape[-1]), value=value)
    batch = {
        "input_ids": torch.stack([pad(e["ids"], pad_id) for e in encoded]),  # [B, L]
        "attention_mask": torch.stack([pad(torch.ones_like(e["ids"]), 0) for e in encoded]),  # [B, L]
        "position_ids": torch.stack([pad(e["positions"], 0) for e in encoded], dim=1),  # [3, B, L]
        "mm_token_type_ids": torch.stack([pad(e["types"], 0) for e in encoded]),  # [B, L]
    }
    for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        rows = [e for e in encoded if e["grids"][kind] is not None]
        if rows:
            batch[pixels] = torch.cat([e["patches"][kind] for e in rows])
            batch[grid] = torch.cat([e["grids"][kind] for e in rows])
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


# --------------------------------------------------------------------------------------------------------------- sampling


class PromptCache(DynamicLayer):
    """One layer's keys and values in memory allocated once: prompts repeated G times, then the completions, written in place. A cache
    that grows by concatenation copies everything at every token."""

    def __init__(self, keys, values, repeats: int, room: int):
        super().__init__()
        self.length, self.is_initialized = keys.shape[2], True
        self.keys, self.values = (F.pad(x.repeat_interleave(repeats, 0), (0, 0, 0, room)) for x in (keys, values))

    def update(self, keys, values, *args, **kwargs):
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


def banned_ids(model, tokenizer) -> torch.Tensor:
    """Tokens that are never sampled: a sampled placeholder would ask the next forward for an image that is not there."""
    return torch.tensor(sorted({tokenizer.convert_tokens_to_ids(token) for token in VISION} | {model.config.image_token_id, model.config.video_token_id}))


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, banned: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / T) at `ids`, in fp32, without the banned tokens: exactly the distribution `generate` samples from.
    logits [..., V], ids [...] -> [...]"""
    logits = logits.float() / temperature
    logits = logits.index_fill(-1, banned, float("-inf"))
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


@dataclass
class Completions:
    ids: torch.Tensor  # [N, T], pad after the end
    lengths: torch.Tensor  # [N], EOS counted
    logprobs: torch.Tensor  # [N, T], 0 after the end
    truncated: torch.Tensor  # [N], no EOS within max_new_tokens

    @property
    def mask(self) -> torch.Tensor:
        """[N, T] from lengths, never from `ids != pad`: EOS belongs to the completion and is trained on, nothing after it is."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


@torch.no_grad()
def generate(model, processor: Processor, prompts: list, group_size: int = 1, max_new_tokens: int = 2048, temperature: float = 1.0,
             batch_rows: int = 256, generator: torch.Generator | None = None, label: str = "") -> Completions:
    """Samples `group_size` completions for each encoded prompt; row p * G + g is completion g of prompt p. temperature 0 is greedy.

    Our own loop, since a checkpoint's generation_config.json can silently set top-k or a temperature near 0, and GRPO needs the
    log-probabilities of the very distribution that was sampled. Each prompt is run once and its cache repeated; rows that have ended
    are dropped from the batch as soon as a quarter of it has; prompts are batched by length."""
    device, eos = device_of(model), processor.tokenizer.eos_token_id
    banned = banned_ids(model, processor.tokenizer).to(device)
    total = len(prompts) * group_size
    ids = torch.full((total, max_new_tokens), processor.tokenizer.pad_token_id, device=device)
    logprobs, lengths = torch.zeros(total, max_new_tokens, device=device), torch.full((total,), max_new_tokens, device=device)
    truncated = torch.ones(total, dtype=torch.bool, device=device)
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]["ids"]))
    size = max(1, batch_rows // group_size)
    batches = [order[k : k + size] for k in range(0, len(order), size)]
    for batch in config.progress(batches, label) if label else batches:
        inputs = collate([prompts[p] for p in batch], "left", processor.tokenizer.pad_token_id, device)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = Cache(layers=[PromptCache(layer.keys, layer.values, group_size, max_new_tokens) for layer in output.past_key_values.layers])
        rows = torch.tensor([p * group_size + g for p in batch for g in range(group_size)], device=device)
        logits = output.logits[:, -1].repeat_interleave(group_size, 0)  # [B, V]
        mask = F.pad(inputs["attention_mask"].repeat_interleave(group_size, 0), (0, max_new_tokens), value=1)
        position = inputs["position_ids"].amax((0, 2)).repeat_interleave(group_size) + 1  # [B]
        alive = torch.ones(len(rows), dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            scores = (logits.float() / (temperature or 1.0)).index_fill(-1, banned, float("-inf"))
            token = scores.argmax(-1) if temperature == 0 else torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            chosen = scores.gather(-1, token[:, None])[:, 0] - scores.logsumexp(-1)
            live = rows[alive]
            ids[live, step], logprobs[live, step] = token[alive], chosen[alive]
            ended = alive & (token == eos)
            lengths[rows[ended]], truncated[rows[ended]] = step + 1, False
            alive = alive & ~ended
            left = int(alive.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            if left <= 0.75 * len(alive):  # drop the rows that have ended
                keep = alive.nonzero()[:, 0]
                rows, mask, position, token, alive = rows[keep], mask[keep], position[keep], token[keep], alive[keep]
                for layer in cache.layers:
                    layer.batch_select_indices(keep)
            output = model(input_ids=token[:, None], attention_mask=mask[:, : cache.get_seq_length() + 1], past_key_values=cache,
                           position_ids=(position + step)[None, :, None].expand(3, -1, 1), use_cache=True)
            logits = output.logits[:, -1]
    width = int(lengths.max())
    return Completions(ids[:, :width], lengths, logprobs[:, :width], truncated)


# ---------------------------------------------------------------------------------------------------------------- scoring


def completion_logprobs(model, processor: Processor, prompts: list, ids: torch.Tensor, lengths: torch.Tensor, temperature: float = 1.0,
                        share_prompt: bool = True, with_entropy: bool = False):
    """log pi(y_t | x, y_<t) of sampled completions, in fp32: ids [P * G, T], lengths [P * G] -> [P * G, T] (0 after the end).

    share_prompt: the prompt is run once, with gradient, and its G completions on top of its cache repeated G times; the gradient of
    every completion flows back into the one prompt pass. Otherwise prompt and completion are run as one sequence per row, the plain
    form: same numbers, G times the prompt's cost. Only completion positions reach the vocabulary-sized logits. `with_entropy` adds the
    per-token entropy of the sampling distribution [P * G, T], without gradient."""
    device, tokenizer = device_of(model), processor.tokenizer
    banned = banned_ids(model, tokenizer).to(device)
    group_size, width = ids.shape[0] // len(prompts), ids.shape[1]
    mask = torch.arange(width, device=device) < lengths[:, None]
    if not share_prompt:
        prompts, group_size = [p for p in prompts for _ in range(group_size)], 1
    inputs = collate(prompts, "left", tokenizer.pad_token_id, device)
    start = inputs["position_ids"].amax((0, 2)).repeat_interleave(group_size) + 1  # [B]
    positions = (start[:, None] + torch.arange(width, device=device)).expand(3, -1, -1)  # [3, B, T]
    prompt_mask = inputs["attention_mask"].repeat_interleave(group_size, 0)
    full_mask = torch.cat([prompt_mask, mask.long()], 1)
    if share_prompt:
        prefill = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = prefill.past_key_values
        cache.batch_repeat_interleave(group_size)
        logits = prefill.logits.repeat_interleave(group_size, 0)  # [B, 1, V] predicts the first completion token
        if width > 1:
            rest = model(input_ids=ids[:, :-1], attention_mask=full_mask[:, :-1], position_ids=positions[:, :, :-1], past_key_values=cache, use_cache=True).logits
            logits = torch.cat([logits, rest], 1)  # [B, T, V]
    else:
        inputs |= {"input_ids": torch.cat([inputs["input_ids"], ids], 1), "attention_mask": full_mask,
                   "position_ids": torch.cat([inputs["position_ids"], positions], 2),
                   "mm_token_type_ids": F.pad(inputs["mm_token_type_ids"], (0, width))}
        logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]  # [B, T, V]
    logprobs = token_logprobs(logits, ids, banned, temperature).masked_fill(~mask, 0.0)
    if not with_entropy:
        return logprobs
    with torch.no_grad():
        log_p = (logits.float() / temperature).index_fill(-1, banned, float("-inf")).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1).masked_fill(~mask, 0.0)
    return logprobs, entropy


# ------------------------------------------------------------------------------------------------------------------ media

limits = config.Data()  # pixels and frames of what is shown in this process; config.main puts the run's own here
MAX_FRAMES, VIDEO_FILES = 10_000, (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")  # five minutes at 30 a second; read by PyAV
BROKEN = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, 8 bits a channel, on white where it is transparent, at most limits.max_pixels."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would show everything above 255 as white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    scale = min(1.0, (limits.max_pixels / (image.width * image.height)) ** 0.5)
    return image.convert("RGB").resize([int(side * scale) or 1 for side in image.size], Image.Resampling.BICUBIC)


def frames_of(path: str, wanted=()):
    """For each frame of an image, animation or video file: the picture if its number is `wanted`, else None. Any fault is one line."""
    video, broken = path.lower().endswith(VIDEO_FILES), BROKEN
    try:
        if video:
            import av
            broken += (av.FFmpegError,)
        with av.open(path) if video else Image.open(path) as file:
            if not video and (max(file.size) > 200 * min(file.size) or file.mode == "F"):  # the image processors, too, refuse such sides
                raise ValueError(f"{file.width} x {file.height} pixels of mode {file.mode}; no side may be over 200 times the other, nor pixels floats")
            for k, frame in enumerate(file.decode(video=0) if video else ImageSequence.Iterator(file)):
                if k == MAX_FRAMES:
                    raise ValueError(f"more than {MAX_FRAMES} frames; cut it, or give a list of frames")
                yield None if k not in wanted else to_rgb(frame.to_image() if video else frame)
    except ImportError:
        raise config.UserError(f"{path}: video files need PyAV (pip install av); folders of frames and animated GIF, WebP and PNG do not")
    except broken as error:
        raise config.UserError(f"cannot read {path}: {error}")


@functools.lru_cache(maxsize=4)
def read_clip(path: str, count: int, max_pixels: int) -> tuple:
    """(`count` frames spread evenly over a file, how many it has); kept, since its frames are asked for one by one."""
    length = sum(1 for _ in frames_of(path))
    wanted = data.spread(length, count) if length else []
    made = dict(zip(range(max(wanted, default=-1) + 1), frames_of(path, wanted)))
    return [made[k] for k in wanted], length


def read_image(path: str) -> Image.Image:
    """An image file, or a frame of a clip: "clip.gif#3of8" is the third of eight spread evenly over it."""
    frame = re.fullmatch(r"(.+)#([0-9]+)of([0-9]+)", path)
    if not frame and path.lower().endswith(VIDEO_FILES):
        raise config.UserError(f"{path} is a video where an image belongs")
    return read_clip(frame[1], int(frame[3]), limits.max_pixels)[0][int(frame[2]) - 1] if frame else next(frames_of(path, (0,)))
