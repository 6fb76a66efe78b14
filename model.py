"""The model: load it, turn prompts into tensors, sample from it, score what was sampled, save it.

Checkpoints of Qwen2.5-VL, Qwen3-VL and LLaVA-OneVision run through the same lines as the small one of base/pretrain.py. Two functions matter:

    generate(...)             samples G completions per prompt and returns their ids, lengths and log-probabilities
    completion_logprobs(...)  scores the same ids, with gradients; log pi(y_t | x, y_<t) of GRPO's ratio and KL

Both share work: the prompt, which is mostly image, is run once, and its G completions on top of its key-value cache; `generate` runs
completions as one text until they part, `completion_logprobs` runs equal ones once. `completion_logprobs(..., share_prompt=False)` is the
plain form, one full sequence per row; the tests hold the two together. What a frozen vision tower makes of a prompt they share (`encode_vision`).
"""

import collections
import contextlib
import ctypes
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from jinja2 import TemplateError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file

import config
import decode
import media

torch.backends.cuda.enable_cudnn_sdp(False)  # the default on H100: NaN gradients under masks (pytorch issue 196678), and a new plan for each length
transformers.utils.logging.disable_progress_bar()  # loading the small model takes less time than drawing the bar
if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc gives freed memory back at once, and the next layer waits for as many zeroed pages
    libc.mallopt(-1, 2**30), libc.mallopt(-3, 2**25)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD; 5 to 10% of all time on a CPU

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SENTINEL = "\ue000"  # stands for one piece of user text while the chat template is rendered
BACKBONES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
LANGUAGE_WEIGHTS = ("model.language_model.", "lm_head.")
VISION_WEIGHTS = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.image_newline")
PIECE = 2**25  # logits that are in memory at a time, as scores are taken: 128 MB in fp32
SEEN = 2**16  # patches that pass the vision tower at a time: 4 GB of activations in bf16
PATCHES = {}  # of image files, for each kind of image processor; every stage asks for the same files
SAFE = {"trust_remote_code": False, "use_safetensors": True}  # a checkpoint is data: neither its code nor its pickles are run
KEPT_FILES = ("processor_config.json", "video_preprocessor_config.json", "chat_template.json")  # of a real checkpoint, for other programs


@dataclass
class Processor:
    tokenizer: object
    image_processor: object
    files: dict = field(default_factory=dict)  # {name: text} of KEPT_FILES
    patches: dict = field(default_factory=dict)  # of image files, see image_patches

    def text(self, ids: torch.Tensor) -> str:
        """Without the EOS at the end; other control tokens are text like any other, and none that a format reward would overlook."""
        ended = len(ids) and ids[-1] == self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[: -1 if ended else None], clean_up_tokenization_spaces=False)


device_of = lambda model: next(model.parameters()).device

# ----------------------------------------------------------------------------------------------------------- load and save

def load(path: str, dtype: torch.dtype | None = None, shard: bool = False) -> tuple:
    """(model in eval mode, Processor) of one of BACKBONES, from a Hugging Face folder or hub name. bf16 on a GPU (sft.optimizer_for keeps fp32
    weights beside it); fp32 on the CPU, where bf16 is far slower, and for small models, which gain nothing. `shard`, under torchrun: this process
    keeps its part of the weights, in fp32, and FSDP2 fetches the rest of a layer, rounded so, while the layer runs. UserError: nothing to load."""
    if not Path(path).is_dir() and Path(path).is_absolute():
        raise config.UserError(f"no model folder {path}")
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise config.UserError(f"{path} holds no model; the folder of a trained stage does, as runs/small/grpo")
    gpu, optional = torch.cuda.is_available(), {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if kind.model_type not in BACKBONES:
            raise config.UserError(f"{path} is a {kind.model_type}; this project runs {', '.join(BACKBONES)}")
        dtype, shard = dtype or (torch.bfloat16 if gpu and kind.text_config.hidden_size >= 512 else torch.float32), shard and config.world()[1] > 1
        model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation="sdpa",
                                                                    output_loading_info=True, **SAFE)
        files = {name: Path(file).read_text(encoding="utf-8") for name in KEPT_FILES if (file := cached_file(path, name, **optional))}
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)  # no torchvision
        tokenizer.chat_template = tokenizer.chat_template or json.loads(files.get("chat_template.json", "{}")).get("chat_template")
        rendered_template(tokenizer, ("text",))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError, TemplateError) as error:
        raise config.UserError(f"cannot load {path}: {config.one_line(error)[:200]}")
    if report["missing_keys"]:
        raise config.UserError(f"{path} lacks {min(report['missing_keys'])}; is the folder complete?")
    if not model.config.image_token_id < len(tokenizer) <= model.get_input_embeddings().num_embeddings:
        raise config.UserError(f"{path}: the tokenizer has {len(tokenizer)} entries and is not that of the model")
    if kind.model_type == "llava_onevision":
        model.model.register_forward_pre_hook(llava_inputs, with_kwargs=True)
    model = shard_model(model, dtype) if shard else model.to("cuda" if gpu else "cpu")
    return model.eval(), Processor(tokenizer, image_processor, files, PATCHES.setdefault(image_processor.to_json_string(), {}))


def shard_model(model, dtype: torch.dtype):
    """The weights dealt out to the processes, layer by layer; gradients come back added up over all of them. It computes and is saved in `dtype`."""
    policy, model.config.dtype = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32), dtype
    for part in [*model.model.language_model.layers, model]:
        fully_shard(part.float(), mp_policy=policy).set_gradient_divide_factor(1.0)  # layer by layer: host memory never holds all in fp32
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.set_reduce_scatter_unused_params(True)  # a picture-less share, too, sends the gradients of the vision tower
    return model


def gather_weights(model, whole: bool) -> None:
    """Of a model that was dealt out, every process holds all weights from here on, or again its part: sampling runs each process as long as its own
    completions take, and layers fetched on the way would have to be asked for by all at once."""
    for part in [part for part in model.modules() if isinstance(part, FSDPModule)]:
        part.set_reshard_after_forward(not whole and part is not model, recurse=False)  # the head is used after the model's forward
        part.unshard() if whole else part.reshard()


def save(model, processor: Processor, folder: Path, dtype: torch.dtype | None = None) -> None:
    """An ordinary Hugging Face folder. `dtype`: precision of the written weights only."""
    whole = lambda value: value.full_tensor().to(model.config.dtype) if isinstance(value, DTensor) else value  # all processes together
    place = "cpu" if config.is_main() else "meta"  # which holds nothing
    state = {name: whole(value.detach()).to(place, dtype) for name, value in model.named_parameters()}  # tied weights once
    if not config.is_main():
        return
    own = model.config.dtype
    model.save_pretrained(folder, state_dict=state)  # writes the type of the parameters, which are fp32 where they are sharded
    model.config.dtype = own
    model.config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    for name, text in processor.files.items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def freeze_vision(model) -> None:
    """Only the language model learns (paper, section 4.1), neither vision tower nor projector; parameters named otherwise are an error."""
    learns = {name: name.startswith(LANGUAGE_WEIGHTS) for name, _ in model.named_parameters() if name.startswith(LANGUAGE_WEIGHTS + VISION_WEIGHTS)}
    if len(learns) < len(list(model.parameters())) or len(set(learns.values())) < 2:
        raise config.UserError(f"{type(model).__name__}: parameters of the vision tower or the language model are named otherwise than was expected")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns[name])


# ----------------------------------------------------------------------------------------------------- prompts to tensors

def image_patches(processor: Processor, path: str, tiled: bool = True) -> tuple:
    """(patches [n, d], or tiles [n, 3, height, width]; grid [3]) of one file as its backbone takes them, fp32; a gigabyte is kept, as every
    epoch and every group asks for them again."""
    key = path, media.version(path), tiled
    if key not in processor.patches:
        image = media.read_image(path)
        made = processor.image_processor(images=[image] if tiled else [[image] * 2], return_tensors="pt")
        if "image_sizes" in made:  # LLaVA: tiles [n, 3, height, width], (n, height, width of the image)
            tiles = made["pixel_values"][0]
            made = {"pixel_values": tiles, "image_grid_thw": F.pad(made["image_sizes"], (1, 0), value=len(tiles))}
        if len(processor.patches) * made["pixel_values"].nbytes > 2**30:
            processor.patches.clear()
        processor.patches[key] = made["pixel_values"], made["image_grid_thw"][0]
    return processor.patches[key]


def encode_media(processor: Processor, part: dict, tiled: bool = True) -> tuple:
    """(patches [n, d], grid [3]) of one image or video. A video's frames are patchified two by two, which is the image processor's
    own layout with the second copy of a frame replaced by the next frame; an odd last frame is repeated."""
    if part["type"] == "image":
        return image_patches(processor, part["image"], tiled)
    frames = [image_patches(processor, path) for path in part["video"]]
    if hasattr(processor.image_processor, "image_grid_pinpoints"):
        clip = torch.stack([tiles[0] for tiles, _ in frames])  # LLaVA: the first tile is the whole image in the size of a frame
        return clip, torch.tensor([len(clip), *clip.shape[2:]])
    if len({tuple(grid.tolist()) for _, grid in frames}) != 1:
        raise config.UserError(f"the frames of {part['video'][0]} ... differ in size")
    frames += frames[-1:] * (len(frames) % 2)
    grid, size = frames[0][1], processor.image_processor.patch_size
    clip = torch.stack([patch for patch, _ in frames]).view(len(frames) // 2, 2, -1, 3, 2, size, size)[..., 0, :, :]  # one of the two equal copies
    pairs = clip.permute(0, 2, 3, 1, 4, 5)  # [pair, frame, n, channel, height, width] -> [pair, n, channel, time, height, width]
    return pairs.flatten(2).flatten(0, 1), torch.tensor([len(pairs), grid[1], grid[2]])


def tokenize(tokenizer, text: str, plain: bool) -> list:
    """`plain`: strings such as <|im_end|> in user text are spelled out, never read as control tokens."""
    core = tokenizer.backend_tokenizer
    core.encode_special_tokens = plain
    return core.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids  # half a surrogate pair, from a terminal, becomes "?"


def encode(processor: Processor, model, parts: list, prefix: str = "", response: str | None = None) -> dict:
    """One prompt as tensors: ids [L], types [L] (0 text, 1 image, 2 video), positions [3, L]; for types 1 and 2, patches [n, d] and grids [media, 3].

    The chat template is rendered with a sentinel in the place of user text; template and user text are then tokenised apart, so user
    text cannot open a turn or add a placeholder. `prefix` is opened after the assistant's turn ("<think>"); `response`, for SFT, adds
    its tokens and EOS, and "prompt_length" says where they begin. UserError: longer than the model takes, or a medium that cannot be read."""
    tokenizer, kinds = processor.tokenizer, {model.config.image_token_id: 1, model.config.video_token_id: 2}
    parts = [part | {"video": media.fit_clips([part["video"]])[0]} if part["type"] == "video" else part for part in parts]
    tiled = model.config.model_type != "llava_onevision" or sum(part["type"] == "image" for part in parts) == 1
    texts, *pictures = (iter([part for part in parts if part["type"] == name]) for name in ("text", "image", "video"))
    ids, grids, patches = [], {1: [], 2: []}, {1: [], 2: []}
    for piece in rendered_template(tokenizer, tuple(part["type"] for part in parts)):
        if piece == SENTINEL:
            ids += tokenize(tokenizer, next(texts)["text"], plain=True)
        elif kind := kinds.get(piece):
            part = next(pictures[kind - 1])  # LLaVA's template shows all images before all videos
            patch, grid = encode_media(processor, part, tiled)
            if kind == 2 and model.config.model_type == "qwen3_vl":
                ids.pop()  # the template's start: each pair of frames brings its own, and the last one ends with the template's end
            ids += placeholders(tokenizer, model, part, piece, grid)
            grids[kind].append(grid)
            patches[kind].append(patch)
        else:
            ids.append(piece)
    if any(map(list, pictures)):
        raise config.UserError("the chat template leaves out an image or a video of the prompt")
    ids += tokenize(tokenizer, prefix, plain=True)
    prompt_length = len(ids)
    if response is not None:
        ids += tokenize(tokenizer, response, plain=True) + [tokenizer.eos_token_id]
    if len(ids) > (most := model.config.text_config.max_position_embeddings):
        raise config.UserError(f"{len(ids)} tokens, and the model takes {most}: {[part['text'][:80] for part in parts if 'text' in part]}")
    ids, types = torch.tensor(ids), torch.tensor([kinds.get(token, 0) for token in ids])
    grids = {kind: torch.stack(found) if found else None for kind, found in grids.items()}
    patches = {kind: torch.cat(found) if found else None for kind, found in patches.items()}
    positions = torch.arange(len(ids)).expand(3, -1)
    if hasattr(model.model, "get_rope_index") and len(types.unique()) > 1:
        positions = model.model.get_rope_index(ids[None], mm_token_type_ids=types[None], image_grid_thw=grids[1], video_grid_thw=grids[2])[0][:, 0]
    return {"ids": ids, "types": types, "positions": positions, "grids": grids, "prompt_length": prompt_length, "patches": patches}


@functools.lru_cache(maxsize=256)
def rendered_template(tokenizer, kinds: tuple) -> tuple:
    """Token ids of the chat template around parts of these kinds, with SENTINEL where user text goes."""
    parts = [{"type": "text", "text": SENTINEL} if kind == "text" else {"type": kind} for kind in kinds]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    return tuple(token for piece in text.split(SENTINEL) for token in (SENTINEL, *tokenize(tokenizer, piece, plain=False)))[1:]


def collate(encoded: list, side: str, pad_id: int, device) -> dict:
    """Inputs of the model's forward for a batch, padded on `side` ("left" to continue, "right" to train). Pictures follow row order."""
    length = max(len(e["ids"]) for e in encoded)
    pad = lambda x, value: F.pad(x, (length - x.shape[-1], 0) if side == "left" else (0, length - x.shape[-1]), value=value)
    batch = {"input_ids": torch.stack([pad(e["ids"], pad_id) for e in encoded]),  # [B, L]
             "attention_mask": torch.stack([pad(torch.ones_like(e["ids"]), 0) for e in encoded]),  # [B, L]
             "position_ids": torch.stack([pad(e["positions"], 0) for e in encoded], dim=1),  # [3, B, L]
             "mm_token_type_ids": torch.stack([pad(e["types"], 0) for e in encoded])}  # [B, L]
    seen = {}
    for kind, name, pixels, grid in ((1, "image", "pixel_values", "image_grid_thw"), (2, "video", "pixel_values_videos", "video_grid_thw")):
        if rows := [e for e in encoded if e["grids"][kind] is not None]:
            batch[grid] = torch.cat([e["grids"][kind] for e in rows])
            if "features" in rows[0]:  # in the place of what the model's own tower would give it
                first, *deep = ([torch.cat(layer)] for layer in zip(*(e["features"][kind] for e in rows)))
                seen[name] = SimpleNamespace(pooler_output=first, deepstack_features=deep)
            else:
                batch[pixels] = torch.cat([e["patches"][kind] for e in rows])
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return batch | ({"mm_encoder_outputs": seen} if seen else {})


@torch.no_grad()
def encode_vision(model, encoded: list) -> None:
    """Runs a vision tower that does not learn once for all passes over these prompts, in place: "features", for types 1 and 2 a list of [n, d], one
    and with Qwen3-VL more for its first layers, stand in for "patches" from here on, for every model with the same tower. Nothing happens to
    prompts of LLaVA-OneVision, whose features depend on the rest of the prompt, and of a model that is sharded."""
    if model.config.model_type == "llava_onevision" or isinstance(model, FSDPModule) or next(model.model.visual.parameters()).requires_grad:
        return
    if len(encoded) > 1 and sum(len(patches) for e in encoded for patches in e["patches"].values() if patches is not None) > SEEN:
        return encode_vision(model, encoded[::2]), encode_vision(model, encoded[1::2])
    for kind in (1, 2):
        if rows := [e for e in encoded if e["grids"][kind] is not None]:
            patches, grids = (torch.cat([e[name][kind] for e in rows]).to(device_of(model)) for name in ("patches", "grids"))
            made = model.get_image_features(patches, grids, return_dict=True)  # of pairs of frames, too
            lengths = [int(e["grids"][kind].prod(1).sum()) // model.model.visual.spatial_merge_size**2 for e in rows]
            layers = [torch.cat(layer).split(lengths) for layer in (made.pooler_output, *getattr(made, "deepstack_features", ()))]
            for e, *layers_of_row in zip(rows, *layers):
                e.setdefault("features", {})[kind] = layers_of_row


# --------------------------------------------------------------------------------------------------------------- sampling

class PromptCache(DynamicLayer):
    """One layer's keys and values in memory allocated once: prompts, then the completions, written in place. A cache that grows by
    concatenation copies everything at every token."""

    def __init__(self, keys, values, room: int):
        super().__init__()
        self.length, self.is_initialized = keys.shape[2], True
        self.keys, self.values = (F.pad(x, (0, 0, 0, room)) for x in (keys, values))

    def update(self, keys, values, *args, **kwargs):
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


class SharedPrompt(DynamicLayer):
    """One layer's keys and values, for completion_logprobs, in two roles. Without `join` it keeps those of the prompts that pass, once: to a layer
    that is run again in backward it gives back its own. With `join` it puts the prompts' before those of their completions, and keeps nothing."""

    def __init__(self, keys=None, values=None, join=None):
        super().__init__()
        self.keys, self.values, self.join, self.is_initialized = keys, values, join, keys is not None

    def update(self, keys, values, *args, **kwargs):
        if self.join:
            return self.join(self.keys, keys), self.join(self.values, values)
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values


def shared_prompt_mask(mask: torch.Tensor, owner: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds, 0 or -inf: completions of `width` tokens see their prompt, mask [P, L], and what stands before. Their own padding comes
    last and is seen by padding only. One mask for all layers, and for all rows where no prompt is padded: [B or 1, 1, T, L + T]"""
    prompts = (mask[:1] if mask.all() else mask[owner]).bool()
    own = torch.ones(width, width, dtype=torch.bool, device=mask.device).tril().expand(len(prompts), -1, -1)
    unseen = ~torch.cat([prompts[:, None].expand(-1, width, -1), own], 2)[:, None]
    return torch.zeros(unseen.shape, dtype=dtype, device=mask.device).masked_fill(unseen, float("-inf"))


def banned_ids(model, tokenizer) -> torch.Tensor:
    """Tokens that are never sampled: a sampled placeholder would ask the next forward for an image that is not there."""
    find, own = tokenizer.backend_tokenizer.token_to_id, model.config
    return torch.tensor(sorted({*map(find, VISION), own.image_token_id, own.video_token_id} - {None}))


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, banned: torch.Tensor, temperature: float, with_entropy: bool = True) -> tuple:
    """log softmax(logits / T) at `ids`, in fp32, without the banned tokens: exactly the distribution `generate` samples from; and, if asked
    for, its entropy, without gradient. logits [..., V], ids [...] -> ([...], [...]), else ([...],)"""
    logprobs = (logits.float() / temperature).index_fill_(-1, banned, float("-inf")).log_softmax(-1)
    with torch.no_grad():
        entropy = (-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1),) if with_entropy else ()  # clamped: 0 times -inf is not a number
    return logprobs.gather(-1, ids[..., None])[..., 0], *entropy


@contextlib.contextmanager
def headless(model):
    """The model returns the last hidden states [B, L, d] in the place of logits."""
    model.lm_head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del model.lm_head.forward


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
             batch_rows: int = 256, seeds: list | None = None, label: str = "") -> Completions:
    """Samples `group_size` completions for each encoded prompt; row p * G + g is completion g of prompt p. temperature 0 is greedy. Its seed, one
    of `seeds`, decides what a prompt's completions are: in whatever batch or process it is sampled, they are the same.

    Our own loop, since a checkpoint's generation_config.json can silently set top-k or a temperature near 0, and GRPO needs the
    log-probabilities of the very distribution that was sampled. Each prompt is run once, and completions that are still equal are one
    text, run once, until they part; rows that have ended are dropped then, or as soon as they are a quarter; prompts are batched by length."""
    device, eos = device_of(model.eval()), processor.tokenizer.eos_token_id
    banned = banned_ids(model, processor.tokenizer).to(device)
    total = len(prompts) * group_size
    ids = torch.full((total, max_new_tokens), processor.tokenizer.pad_token_id, device=device)
    logprobs = torch.zeros(total, max_new_tokens, device=device)
    seeds = torch.randint(2**32, (len(prompts),)).tolist() if seeds is None else seeds
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]["ids"]))
    size = max(1, batch_rows // group_size)
    batches = [order[k : k + size] for k in range(0, len(order), size)]
    for batch in config.progress(batches, label) if label else batches:
        inputs = collate([prompts[p] for p in batch], "left", processor.tokenizer.pad_token_id, device)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        prompt, logits = output.past_key_values, output.logits[:, -1]  # [N, V]; N different texts so far, at first the prompts
        fast = decode.Decoder(model, prompt, inputs["attention_mask"]) if decode.fits(model) else None
        cache = Cache(layers=[PromptCache(layer.keys, layer.values, max_new_tokens) for layer in prompt.layers if not fast])
        del output, prompt  # what is needed of them stands in `fast` or `cache`
        rows = torch.tensor([p * group_size + g for p in batch for g in range(group_size)], device=device)  # [B]
        mask, position = F.pad(inputs["attention_mask"], (0, max_new_tokens), value=1), inputs["position_ids"].amax((0, 2)) + 1  # [N, L + T], [N]
        text = torch.arange(len(batch), device=device).repeat_interleave(group_size)  # [B], which of the N texts a row has so far
        alive = torch.ones(len(rows), dtype=torch.bool, device=device)
        uniform = [torch.rand(group_size, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[p])) for p in batch]
        uniform = torch.cat(uniform).to(device)  # [B, T]
        for step in range(max_new_tokens):
            scores = (logits.float() / (temperature or 1.0)).index_fill(-1, banned, float("-inf")).log_softmax(-1)  # [N, V]
            if not temperature:
                token = scores.argmax(-1)[text]
            else:  # the first whose cumulated probability exceeds the row's number; in fp32 a large vocabulary would lose its unlikely ones
                cumulated = scores.exp().cumsum(-1, dtype=torch.float64)
                token = torch.searchsorted(cumulated[text], (uniform[:, step] * cumulated[text, -1])[:, None], right=True)[:, 0]
            ids[rows, step], logprobs[rows, step] = token, scores[text, token]  # of rows that have ended, too: cleared below
            alive &= token != eos
            left = int(alive.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            vocabulary = scores.shape[1]
            longer = text * vocabulary + token.where(alive, eos)  # [B], a text and what follows it as one number; those that have ended stay together
            if moved := len(longer.unique()) > len(scores) or left <= 0.75 * len(alive):  # texts part, or rows have ended: these are dropped
                rows, uniform, longer, alive = (x[alive] for x in (rows, uniform, longer, alive))
            different, text = longer.unique(return_inverse=True)  # [N], sorted, so that the texts of a prompt stay beside each other
            before, last = different // vocabulary, different % vocabulary  # the text that each has grown from, its last token
            if moved:  # else each of the texts, in their order, has grown by a token
                mask, position = mask[before], position[before]
                for part in [fast] if fast else cache.layers:
                    part.batch_select_indices(before)
            logits = fast.step(last, position + step) if fast else model(
                input_ids=last[:, None], attention_mask=mask[:, : cache.get_seq_length() + 1], past_key_values=cache,
                position_ids=(position + step)[None, :, None].expand(3, -1, 1), use_cache=True).logits[:, -1]
    ends = ids == eos
    after = ends.cumsum(1) > ends.long()  # an end stands before
    lengths = (~after).sum(1)
    width = max(lengths.tolist(), default=0)
    ids, logprobs = ids.masked_fill(after, processor.tokenizer.pad_token_id), logprobs.masked_fill(after, 0.0)
    return Completions(ids[:, :width], lengths, logprobs[:, :width], ~ends.any(1))


# ---------------------------------------------------------------------------------------------------------------- scoring

def completion_logprobs(model, processor: Processor, prompts: list, ids: torch.Tensor, lengths: torch.Tensor, temperature: float = 1.0,
                        share_prompt: bool = True, with_entropy: bool = False):
    """log pi(y_t | x, y_<t) of sampled completions, in fp32: ids [P * G, T], lengths [P * G] -> [P * G, T] (0 after the end).

    share_prompt: the prompt is run once, with gradient, and its completions on top of its cache, repeated for each; the gradient of every
    completion flows back into the one prompt pass. Completions that are equal are run once: a small policy repeats itself. With share_prompt=False
    prompt and completion are run as one sequence per row, the plain form: same numbers, G times the prompt's cost.
    Only completion positions reach the vocabulary. `with_entropy` adds the entropy of the sampling distribution [P * G, T], without gradient."""
    device, tokenizer = device_of(model), processor.tokenizer
    banned = banned_ids(model, tokenizer).to(device)
    width, owner = ids.shape[1], torch.arange(len(prompts), device=device).repeat_interleave(len(ids) // len(prompts))  # whose completion a row is
    model.train(model.is_activation_checkpointing and torch.is_grad_enabled())  # layers are run again in training mode only; none has dropout
    if share_prompt:
        # From here on rows are the B different completions [B, 2 + T]: whose, how long, which tokens; row [P * G] says which of them each one is.
        different, row = torch.cat([owner[:, None], lengths[:, None], ids], 1).unique(dim=0, return_inverse=True)
        owner, lengths, ids = different[:, 0], different[:, 1], different[:, 2:]
    else:
        prompts, owner = [prompts[p] for p in owner.tolist()], torch.arange(len(ids), device=device)
        row = owner
    mask = torch.arange(width, device=device) < lengths[:, None]
    inputs = collate(prompts, "left", tokenizer.pad_token_id, device)
    start = inputs["position_ids"].amax((0, 2))[owner] + 1  # [B]
    positions = (start[:, None] + torch.arange(width, device=device)).expand(3, -1, -1)  # [3, B, T]
    with headless(model):
        if share_prompt:
            cache = Cache(layers=[SharedPrompt() for _ in model.model.language_model.layers])
            prefill = model(**inputs, past_key_values=cache, use_cache=False, logits_to_keep=1)
            steps = max(1, width - 1)  # the last token is not run; but one at least, since processes of a sharded model wait for each other's layers
            latest = collections.deque(maxlen=2)  # keys and values of the layer that is running

            def join(past, own):  # [P, K, L, d], [B, K, steps, d] -> [B, K, L + steps, d]; the backward of an index would add up in any order
                latest.append((torch.cat([past.index_select(0, owner), own], 2), past, own))
                return latest[-1][0]

            # What an operation needs in backward passes through `pack` when kept and through `unpack` when used. Attention keeps joined keys
            # and values, so the prompt's once per completion: of these only the two parts are kept, and joined anew. (Where layers are run
            # again it is so anyway. Where several heads share keys, transformers repeats them first, and the copies are kept.) All else is kept as
            # it is, but detached: an operation that keeps its own output would hold itself.
            pack = lambda x: next((parts for joined, *parts in latest if x.is_set_to(joined)), x.detach())
            unpack = lambda kept: join(*kept) if isinstance(kept, list) else kept
            past = Cache(layers=[SharedPrompt(layer.keys, layer.values, join) for layer in cache.layers])
            for layer in cache.layers:
                layer.keys = layer.values = None  # the graph holds this cache: it would hold itself
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                rest = model(input_ids=ids[:, :steps], position_ids=positions[:, :, :steps], past_key_values=past, use_cache=False,
                             attention_mask=shared_prompt_mask(inputs["attention_mask"], owner, steps, prefill.logits.dtype))
            latest.clear()
            hidden = torch.cat([prefill.logits.index_select(0, owner), rest.logits], 1)[:, :width]  # [B, T, d], the first by the prompt's last token
        else:
            inputs |= {"input_ids": torch.cat([inputs["input_ids"], ids], 1), "attention_mask": torch.cat([inputs["attention_mask"], mask.long()], 1),
                       "position_ids": torch.cat([inputs["position_ids"], positions], 2),
                       "mm_token_type_ids": F.pad(inputs["mm_token_type_ids"], (0, width))}
            hidden = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]  # [B, T, d]

    # Piece by piece, and anew in backward: the logits of eight completions of 2,048 tokens, at 152,000 entries, would be 10 GB in fp32.
    head = model.lm_head.weight.float()  # of a bf16 model, the gradients of the pieces are added up in fp32
    score = lambda states, ids: token_logprobs(F.linear(states, head.to(states.dtype)), ids, banned, temperature, with_entropy)
    size = max(1, PIECE // len(head))
    pieces = zip(hidden[mask].split(size), ids[mask].split(size))
    made = zip(*[checkpoint(score, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces])
    logprobs, *entropy = (torch.zeros(mask.shape, device=device).masked_scatter(mask, torch.cat(values)).index_select(0, row) for values in made)
    return (logprobs, *entropy) if with_entropy else logprobs


# ---------------------------------------------------------------------------------------------------------- real backbones

def placeholders(tokenizer, model, part: dict, token: int, grid: torch.Tensor) -> list:
    """Ids that stand for one image or video: `token` as often as it has features. Qwen3-VL shows a clip as pairs of frames, each between
    markers and after its time, here at two frames a second, which is also the pace of Qwen2.5-VL's positions."""
    vision, model_type, clip = model.config.vision_config, model.config.model_type, part["type"] == "video"
    if model_type == "llava_onevision":  # counted by shaping empty features as the model will
        empty = torch.zeros(grid[0], (vision.image_size // vision.patch_size) ** 2, 1)
        if clip:
            return [token] * (model.model.apply_pooling(empty)[..., 0].numel() + 1)
        return [token] * len(model.model.pack_image_features([empty], grid[None, 1:], torch.zeros(1), model.config.vision_aspect_ratio)[0][0])
    count = int(grid.prod()) // vision.spatial_merge_size**2
    if model_type == "qwen2_5_vl" or not clip:
        return [token] * count
    ids, last = [], len(part["video"]) - 1
    for frame in range(0, last + 1, 2):
        ids += tokenize(tokenizer, f"<{(frame + min(frame + 1, last)) / 4:.1f} seconds>", plain=True)
        ids += [model.config.vision_start_token_id] + [token] * (count // int(grid[0])) + [model.config.vision_end_token_id]
    return ids[:-1]


def llava_inputs(module, args, inputs: dict) -> tuple:
    """A hook that lets LLaVA-OneVision take what Qwen takes: positions are plain, tokens have no types, a grid is (tiles or frames, height, width).
    One image is cut into tiles, several are a tile each. Clips are encoded one by one: transformers stacks them, at equal numbers of frames only."""
    images, clips, at, _ = (inputs.pop(name, None) for name in ("image_grid_thw", "video_grid_thw", "position_ids", "mm_token_type_ids"))
    inputs |= {"position_ids": at[0] if at is not None and at.ndim == 3 else at, "mm_encoder_outputs": {}}
    if images is not None:
        tiled, length = torch.unique_consecutive(images[:, 0] > 1, return_counts=True)
        counts = sum([[1] * n if t else [n] for t, n in zip(tiled.tolist(), length.tolist())], [])  # 1: an image alone in its prompt
        inputs["mm_encoder_outputs"]["image"] = module.get_image_features(inputs.pop("pixel_values"), images[:, 1:], batch_num_images=counts)
    if clips is not None:
        features = [module.get_video_features(clip[None]).pooler_output for clip in inputs.pop("pixel_values_videos").split(clips[:, 0].tolist())]
        inputs["mm_encoder_outputs"]["video"] = BaseModelOutputWithPooling(pooler_output=torch.cat(features, 1))
    return args, inputs
