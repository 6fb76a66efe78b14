"""Qwen2.5-VL, Qwen3-VL and LLaVA-OneVision: tiny random models of the real classes, written as their releases are laid out on the hub.

Weights bear the names and the files the structure of the released checkpoints; the official processors, where they run without
torchvision, and transformers' own forward, positions and decoding are what ours is held against.
"""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from transformers.models.llava_onevision import modeling_llava_onevision
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import config
import data
import grpo
import model as M
import sft
from base import pretrain
from pretend_gpu import a_gpu

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
QWEN_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAVA_TEMPLATE = (  # all images, then all videos, then all text, as the released one has it
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ '\n' + c.text }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

# ----------------------------------------------------------------------------------------------- releases in miniature


def tiny_config(family: str, tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"}, image_grid_pinpoints=[[h * 56, w * 56] for h in range(1, 7) for w in range(1, 7)],
            vision_config=dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                               image_size=56, patch_size=14, vision_use_head=False),
            image_token_index=ids("<image>"), video_token_index=ids("<video>"))
    own = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"), map(ids, M.VISION)))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    if family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope}, **own,
            vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2,
                               window_size=112, out_hidden_size=32, fullatt_block_indexes=[1], tokens_per_second=2))
    return transformers.Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | {"mrope_interleaved": True}, "head_dim": 8}, **own,
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=16, spatial_merge_size=2, temporal_patch_size=2,
                           out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]))


def released_name(family: str, name: str) -> str:
    """What a weight is called in the released files: only Qwen3-VL's are named as transformers names them now."""
    if family == "qwen2_5_vl":
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    if family == "llava_onevision":
        return ("language_model." + name if name.startswith("lm_head") else name.replace("model.language_model.", "language_model.model.")
                if "language_model" in name else name.removeprefix("model."))
    return name


def write_release(folder: Path, family: str, texts: list) -> Path:
    tokenizer = pretrain.train_tokenizer(texts, 400)
    llava = family == "llava_onevision"
    tokenizer.chat_template = None if llava else QWEN_TEMPLATE
    if llava:
        tokenizer.add_special_tokens({"additional_special_tokens": [M.IM_START, "<image>", "<video>"]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    model = transformers.AutoModelForImageTextToText.from_config(tiny_config(family, tokenizer))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    with torch.no_grad():  # random weights hardly ever end a text
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    state = {released_name(family, name): value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    write = lambda name, made: (folder / name).write_text(json.dumps(made))
    write("config.json", model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"})
    write("generation_config.json", {"do_sample": True, "eos_token_id": [tokenizer.eos_token_id], "repetition_penalty": 1.05, "temperature": 1e-6})
    if llava:
        pictures = {"image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor", "resample": 3, **HALF,
                    "size": {"height": 56, "width": 56}, "image_grid_pinpoints": model.config.image_grid_pinpoints}
        write("processor_config.json", {"processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
                                        "num_image_tokens": 16, "vision_aspect_ratio": "anyres_max_9", "vision_feature_select_strategy": "full"})
        write("chat_template.json", {"chat_template": LLAVA_TEMPLATE})
        write("video_preprocessor_config.json", {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 56, "width": 56}, **HALF})
    elif family == "qwen2_5_vl":
        pictures = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
                    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        write("chat_template.json", {"chat_template": QWEN_TEMPLATE})
    else:
        pictures = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
                    "temporal_patch_size": 2, "merge_size": 2, "size": {"longest_edge": 16777216, "shortest_edge": 4096}, **HALF}
        write("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16, "fps": 2, **HALF})
    write("preprocessor_config.json", pictures)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def release(request, samples, tmp_path_factory) -> Path:
    texts = [part["text"] for s in samples for mode in ("think", "answer") for part in data.build_prompt(s, mode) if part["type"] == "text"]
    return write_release(tmp_path_factory.mktemp("hub") / request.param, request.param, texts)


@pytest.fixture(scope="module")
def backbone(release) -> tuple:
    return M.load(str(release))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list:
    """Pictures of noise in five sizes, wide and tall, then six frames of one size."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    sizes = [(64, 64), (120, 70), (70, 120), (56, 56), (30, 180)] + [(64, 96)] * 6
    made = [folder / f"{k}.png" for k in range(len(sizes))]
    for file, (height, width) in zip(made, sizes):
        Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)).resize((width, height)).save(file)
    return [str(file) for file in made]


def part(kind: str, value) -> dict:
    return {"type": kind, kind: value}


def mixture(files: list) -> list:
    """Prompts of every composition: 1, 2 and 3 pictures, clips of 1 to 4 frames and two at once, pictures beside clips, text alone."""
    image, text, frames = (lambda k: part("image", files[k])), (lambda words: part("text", words)), files[5:]
    return [[image(0), text("Which?")], [text("Image 1: "), image(1), text("Image 2: "), image(2), text("\nCaption: a red circle.")],
            [part("video", frames[:4]), text("Question: what moves?\nAnswer 1: it.")],
            [part("video", frames[:2]), part("video", frames[1:4]), text("Compare.")],
            [text("a"), part("video", frames[:3]), image(3), text("b" * 40)], [text("No picture <image> <|image_pad|> at all.")],
            [image(4), image(0), text("and"), image(2), part("video", frames[:1])], [image(1), text("One wide picture.")]]


@pytest.fixture(scope="module")
def mixed(backbone, files) -> list:
    return [M.encode(backbone[1], backbone[0], parts, data.THINK if k % 2 else "") for k, parts in enumerate(mixture(files))]


def logits_of(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# ---------------------------------------------------------------------------------------------- the batch and the sample alone


def test_loading_finds_every_weight_and_uses_it(backbone, release):
    model, processor = backbone
    family = release.name
    assert model.config.model_type == family and next(model.parameters()).dtype == torch.float32 and not model.training
    written = safetensors.torch.load_file(release / "model.safetensors")
    assert len(written) == len(list(model.parameters()))
    for name, value in model.named_parameters():
        assert torch.equal(value.cpu(), written[released_name(family, name)].float()), name


def test_a_batch_of_everything_equals_each_sample_alone(backbone, mixed):
    model, processor = backbone
    assert len({len(e["ids"]) for e in mixed}) > 5
    for side in ("left", "right"):
        together = logits_of(model, M.collate(mixed, side, processor.tokenizer.pad_token_id, M.device_of(model)))
        for row, encoded in zip(together, mixed):
            alone = logits_of(model, M.collate([encoded], side, processor.tokenizer.pad_token_id, M.device_of(model)))[0]
            assert (alone - (row[-len(alone) :] if side == "left" else row[: len(alone)])).abs().max() < 1e-5


def test_every_picture_and_every_frame_is_seen_and_in_its_place(backbone, mixed, files):
    """Another picture or frame in any one place changes the logits; so does another order."""
    model, processor = backbone
    score = lambda parts: logits_of(model, M.collate([M.encode(processor, model, parts)], "left", 0, M.device_of(model)))[0, -1]
    for parts in mixture(files):
        for k, shown in enumerate(parts):
            for f in range(len(shown["video"]) if shown["type"] == "video" else shown["type"] == "image"):
                other = part("image", files[9])
                if shown["type"] == "video":
                    other = part("video", shown["video"][:f] + [files[10]] + shown["video"][f + 1 :])
                assert (score(parts[:k] + [other] + parts[k + 1 :]) - score(parts)).abs().max() > 1e-4
    two = [part("image", files[1]), part("image", files[2]), part("text", "x")]
    assert (score(two) - score([two[1], two[0], two[2]])).abs().max() > 1e-4


def test_generation_equals_scoring_in_both_forms(backbone, mixed):
    model, processor = backbone
    made = M.generate(model, processor, mixed, 3, 24, seeds=range(len(mixed)), batch_rows=12)
    assert made.truncated.any() and not made.truncated.all()
    assert not torch.isin(made.ids, M.banned_ids(model, processor.tokenizer).to(made.ids.device)).any()
    for share_prompt in (True, False):
        with torch.no_grad():
            scored = M.completion_logprobs(model, processor, mixed, made.ids, made.lengths, share_prompt=share_prompt)
        assert (scored - made.logprobs).abs().max() < 1e-5


def test_greedy_decoding_is_that_of_whole_sequences_without_a_cache(backbone, mixed):
    """Every token from a new forward of everything before it; positions are transformers' own."""
    model, processor = backbone
    greedy = M.generate(model, processor, mixed, 1, 12, temperature=0)
    for encoded, ours, length in zip(mixed, greedy.ids, greedy.lengths):
        inputs = M.collate([encoded], "left", processor.tokenizer.pad_token_id, M.device_of(model))
        start = inputs["input_ids"].shape[1]
        del inputs["position_ids"]
        for token in ours[:length]:
            ids = inputs["input_ids"]
            scores = logits_of(model, inputs | {"attention_mask": torch.ones_like(ids)})[0, -1]
            scores[M.banned_ids(model, processor.tokenizer)] = float("-inf")
            assert scores.argmax() == token
            inputs["input_ids"] = torch.cat([ids, token.view(1, 1)], 1)
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
        assert inputs["input_ids"].shape[1] == start + length


def test_control_strings_in_text_show_no_picture(backbone, files):
    model, processor = backbone
    special = {processor.tokenizer.backend_tokenizer.token_to_id(token) for token in (M.IM_START, M.IM_END, "<image>", "<video>", *M.VISION)} - {None}
    ids = lambda text: M.encode(processor, model, [part("image", files[0]), part("text", text)], text, text)["ids"].tolist()
    controls = lambda text: [k for k in ids(text) if k in special]
    assert controls("<|im_end|>\n<|im_start|>assistant\n<image><video><|vision_start|><|image_pad|><|video_pad|><|vision_end|>") == controls("a cat")


def test_a_template_that_drops_a_picture_is_refused(backbone, files):
    model, processor = backbone
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = "{% for c in messages[0].content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    with pytest.raises(config.UserError, match="template"):
        M.encode(M.Processor(tokenizer, processor.image_processor), model, [part("image", files[0]), part("text", "x")])


# ------------------------------------------------------------------------------------------------- the official processors


class ImagesOnly:
    """The official processor less its video processor, which cannot be built without torchvision. ProcessorMixin finds out what a processor
    consists of from the arguments of __init__."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, num_image_tokens=16, vision_aspect_ratio="anyres_max_9"):
        self.num_image_tokens, self.vision_aspect_ratio, self.vision_feature_select_strategy = num_image_tokens, vision_aspect_ratio, "full"
        llava = hasattr(image_processor, "image_grid_pinpoints")
        self.image_token, self.video_token = ("<image>", "<video>") if llava else M.VISION[2:]
        self.image_token_id, self.video_token_id = map(tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token))
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def official_processor(release: Path, chat_template: str):
    parent = {"qwen2_5_vl": transformers.Qwen2_5_VLProcessor, "qwen3_vl": transformers.Qwen3VLProcessor,
              "llava_onevision": transformers.LlavaOnevisionProcessor}[release.name]
    processor = type(parent.__name__, (parent,), {"__init__": ImagesOnly.__init__})
    return processor(transformers.AutoImageProcessor.from_pretrained(release, backend="pil"),
                     transformers.AutoTokenizer.from_pretrained(release, padding_side="left"), chat_template=chat_template)


def test_pictures_are_what_the_official_processor_makes_of_them(backbone, release, files):
    """Ids, pixels and logits, for one, two and three pictures of several sizes in one batch, from the official processor's inputs alone."""
    model, processor = backbone
    official = official_processor(release, processor.tokenizer.chat_template)
    prompts = [parts for parts in mixture(files) if {shown["type"] for shown in parts} == {"image", "text"}]
    prompts.append([part("image", files[k]) for k in (3, 1, 0)] + [part("text", "three")])
    bare = lambda shown: shown if shown["type"] == "text" else {"type": "image"}
    turns = [[{"role": "user", "content": list(map(bare, parts))}] for parts in prompts]
    texts = [official.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    pictures = [[Image.open(shown["image"]).convert("RGB") for shown in parts if shown["type"] == "image"] for parts in prompts]
    theirs = official(text=texts, images=pictures, padding=True, return_tensors="pt").to(M.device_of(model))
    ours = M.collate([M.encode(processor, model, parts) for parts in prompts], "left", processor.tokenizer.pad_token_id, M.device_of(model))
    assert torch.equal(theirs["input_ids"], ours["input_ids"]) and torch.equal(theirs["attention_mask"], ours["attention_mask"])
    assert (ours["input_ids"] == model.config.image_token_id).sum() > 20
    plain = transformers.AutoModelForImageTextToText.from_pretrained(release, dtype=torch.float32).to(M.device_of(model)).eval()
    difference = (logits_of(plain, theirs) - logits_of(model, ours)).abs().amax(-1)
    assert difference[ours["attention_mask"].bool()].max() < 1e-5


def test_clips_are_what_the_official_video_code_makes_of_them(backbone, release, files):
    """Placeholders from the official processor's method, pixels from its own arithmetic, and positions from transformers' forward."""
    model, processor = backbone
    clips = [files[5:9], files[6:9]] if release.name != "llava_onevision" else [files[5:8], files[6:9]]  # transformers stacks LLaVA's
    parts = [part("video", clips[0]), part("video", clips[1]), part("text", "compare")]
    encoded = M.encode(processor, model, parts)
    ours = M.collate([encoded], "left", 0, M.device_of(model))
    tokenizer, frames = processor.tokenizer, [[Image.open(file).convert("RGB") for file in clip] for clip in clips]
    mean, std = np.array(processor.image_processor.image_mean), np.array(processor.image_processor.image_std)
    resized = lambda image, size: np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    normal = lambda image, size: torch.from_numpy((resized(image, size) / 255 - mean) / std).float().permute(2, 0, 1)
    namespace = SimpleNamespace(video_token=tokenizer.decode([model.config.video_token_id]), num_image_tokens=16, vision_start_token=M.VISION[0],
                                vision_end_token=M.VISION[1], video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2))
    if release.name == "llava_onevision":
        pixels = torch.stack([torch.stack([normal(frame, (56, 56)) for frame in clip]) for clip in frames])
        made = {"pixel_values_videos": pixels}
        text = [transformers.LlavaOnevisionProcessor.replace_video_token(namespace, made, k) for k in (0, 1)]
    else:
        size = processor.image_processor.patch_size
        width, height = (96 // (2 * size) * 2 * size, 64 // (2 * size) * 2 * size) if size == 16 else (84, 56)
        pixels = [torch.stack([normal(frame, (width, height)) for frame in clip])[None] for clip in frames]
        layout = [Qwen3VLVideoProcessor.patchify(None, clip, size, 2, 2) for clip in pixels]
        patches, grids = [made[0][0] for made in layout], [made[1:] for made in layout]  # tensor arithmetic that needs no torchvision
        made = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        times = [SimpleNamespace(fps=2.0, frames_indices=list(range(len(clip)))) for clip in frames]
        class_ = transformers.Qwen3VLProcessor if release.name == "qwen3_vl" else transformers.Qwen2_5_VLProcessor
        namespace._calculate_timestamps = lambda *rest: transformers.Qwen3VLProcessor._calculate_timestamps(namespace, *rest)
        text = [class_.replace_video_token(namespace, made | {"video_metadata": times}, k) for k in (0, 1)]
        assert torch.equal(made["video_grid_thw"], ours["video_grid_thw"].cpu())
    pixels = made["pixel_values_videos"].flatten(0, int(release.name == "llava_onevision"))
    assert (pixels - ours["pixel_values_videos"].cpu()).abs().max() < 0.02, "bicubic rounding"
    turn = {"role": "user", "content": [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "compare"}]}
    template = tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    # The released processor of Qwen3-VL, and vLLM, replace the markers round a clip, too: each pair of frames brings its own.
    shown = "".join([M.VISION[0], namespace.video_token, M.VISION[1]] if release.name == "qwen3_vl" else [namespace.video_token])
    first, second, third = template.split(shown)
    ids = tokenizer(first + text[0] + second + text[1] + third, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, ours["input_ids"].cpu())
    plain = transformers.AutoModelForImageTextToText.from_pretrained(release, dtype=torch.float32).to(M.device_of(model)).eval()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {name: value.cpu() for name, value in ours.items() if "video" in name}
    if release.name == "llava_onevision":
        inputs["pixel_values_videos"] = inputs["pixel_values_videos"].view(2, 3, 3, 56, 56)
        inputs.pop("video_grid_thw")
    else:
        inputs["mm_token_type_ids"] = (ids == model.config.video_token_id) * 2
    theirs = logits_of(plain, {name: value.to(M.device_of(model)) for name, value in inputs.items()})
    assert (theirs - logits_of(model, ours)).abs().max() < 1e-5


def test_what_a_frozen_tower_has_seen_stands_in_for_patches(backbone, release, files, monkeypatch):
    """Sampling, scoring and its gradient, in both forms and with another model of the same tower, are those of a tower that is run in every pass;
    it is run twice for all of them, once for pictures and once for clips. A tower that learns, and LLaVA-OneVision's, is run in every pass."""
    model, reference = (copy.deepcopy(backbone[0]) for _ in range(2))
    processor, runs, moved = backbone[1], mixture(files), []
    encode = lambda: [M.encode(processor, model, parts) for parts in runs]
    for one in (model, reference):
        tower = one.model.vision_tower if release.name == "llava_onevision" else one.model.visual
        tower.register_forward_pre_hook(lambda *_: moved.append(1))
    learning, plain = encode(), encode()
    M.encode_vision(model, learning)
    M.freeze_vision(model)
    with torch.no_grad():
        for parameter in reference.model.language_model.parameters():
            parameter.mul_(1.01)
    seen = encode()
    M.encode_vision(model, seen)
    if release.name != "llava_onevision":  # few patches at a time: the same
        pieces, features = encode(), lambda some: [part for one in some for layers in one.get("features", {}).values() for part in layers]
        with monkeypatch.context() as patched:
            patched.setattr(M, "SEEN", 20)
            M.encode_vision(model, pieces)
        assert len(moved) > 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(features(pieces), features(seen), strict=True))
        del moved[2:]
    assert moved == [1, 1] * (release.name != "llava_onevision") and not any("features" in one for one in learning)
    made, results = M.generate(model, processor, seen, 2, 8, seeds=range(len(seen))), []
    assert torch.equal(made.ids, M.generate(model, processor, plain, 2, 8, seeds=range(len(plain))).ids)
    for prompts in (seen, plain):
        before = len(moved)
        for share_prompt in (True, False):
            model.zero_grad()
            scored = M.completion_logprobs(model, processor, prompts, made.ids, made.lengths, share_prompt=share_prompt)
            scored.sum().backward()
            with torch.no_grad():
                other = M.completion_logprobs(reference, processor, prompts, made.ids, made.lengths, share_prompt=share_prompt)
            assert (scored - other).abs().max() > 1e-4
            results.append([scored.detach(), other, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert (len(moved) == before) == (prompts is seen and release.name != "llava_onevision")
    for result in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(result[:2], results[0]))
        assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(result[2:], results[0][2:]))  # single sums of a gradient are rounded more


@pytest.mark.parametrize("release", ["llava_onevision"], indirect=True)
def test_clips_of_different_length_are_encoded_one_by_one(backbone, files):
    """LLaVA-OneVision in transformers cannot batch them at all; ours equals its features clip by clip."""
    model, processor = backbone
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(lambda module, args, inputs: seen.append(inputs["inputs_embeds"]), with_kwargs=True)
    clips = [files[5:6], files[5:9], files[6:8]]
    inputs = M.collate([M.encode(processor, model, [part("video", clip) for clip in clips])], "left", 0, M.device_of(model))
    logits_of(model, inputs)
    hook.remove()
    shown = seen[0][inputs["input_ids"] == model.config.video_token_id]
    with torch.no_grad():
        pixels = [M.encode_media(processor, part("video", clip))[0][None].to(M.device_of(model)) for clip in clips]
        alone = [model.model.get_video_features(clip).pooler_output[0] for clip in pixels]
    assert [len(a) for a in alone] == [5, 17, 9] and torch.equal(torch.cat(alone), shown)


@pytest.mark.parametrize("release", ["llava_onevision"], indirect=True)
@pytest.mark.parametrize("height, width", [(1, 1), (56, 56), (57, 56), (40, 300), (300, 40), (200, 333), (1000, 1000), (2000, 90)])
def test_llava_has_as_many_placeholders_as_the_official_formula_says(release, backbone, height, width):
    official = official_processor(release, "")
    tiles = modeling_llava_onevision.image_size_to_num_patches([height, width], backbone[0].config.image_grid_pinpoints, 56)
    ours = M.placeholders(None, backbone[0], part("image", ""), 7, torch.tensor([tiles, height, width]))
    assert ours == [7] * official._get_number_of_features(height, width, 56, 56)


# -------------------------------------------------------------------------------------------------------- the whole way round


def train(release, samples, folder: Path) -> tuple:
    """One SFT step, sampling, one GRPO step and saving, by the functions of the scripts: (folder, weights before, in between, model, processor)."""
    model, processor = M.load(str(release))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    chosen = [next(s for s in samples if s.task == task) for task in data.TASKS]
    verdict = lambda s: data.verdict_string(s.task, s.label)
    examples = [(data.build_prompt(s, "think"), data.write_reasoning(s.task, s.reasons, s.scores, verdict(s))) for s in chosen[:2]]
    examples += [(data.build_prompt(s, "answer"), f"<answer>{verdict(s)}</answer>") for s in chosen[2:]]
    step = config.SFT(lr=1e-3, epochs=1, batch_size=4, micro_tokens=1500, gradient_checkpointing=True)
    sft.train(model, processor, examples, step, folder, "seed", "cold start")
    middle = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.activation_checkpointing_disable()
    own = config.GRPO(group_size=3, max_new_tokens=8, micro_prompts=2, lr=1e-3)
    reference, optimizer = copy.deepcopy(model), sft.optimizer_for(model, own)
    optimizer.param_groups[0]["lr"] = own.lr
    prompts = [M.encode(processor, model, data.build_prompt(s, "think"), data.THINK) for s in chosen]
    made, texts, rewards = grpo.rollout(model, processor, chosen, own, prompts)
    assert len(texts) == 12 and rewards["format"].shape == (4, 3)
    with torch.no_grad():
        ref_logprobs = M.completion_logprobs(reference, processor, prompts, made.ids, made.lengths)
    advantages = grpo.group_advantages(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)))
    metrics = grpo.update(model, processor, optimizer, prompts, made, advantages, ref_logprobs, own)
    assert metrics["grad_norm"] > 0 and metrics["kl"] == pytest.approx(0, abs=1e-6)
    M.save(model, processor, folder)
    return folder, before, middle, model, processor


@pytest.fixture(scope="module")
def trained(release, samples, tmp_path_factory) -> tuple:
    return train(release, samples, tmp_path_factory.mktemp("trained"))


def test_nothing_is_left_behind_where_there_is_a_gpu(trained, release, samples, tmp_path):
    """All of it again on the GPU that tests/pretend_gpu.py pretends, with the same SFT step; what is sampled then is another draw."""
    with a_gpu():
        _, _, middle, *_ = train(release, samples, tmp_path)
        middle = {name: value.cpu() for name, value in middle.items()}
    assert all((value - middle[name]).abs().mean() < 0.02 * 1e-3 for name, value in trained[2].items()), "the step is one of 1e-3"
    assert (tmp_path / "model.safetensors").is_file()


def test_only_the_language_model_has_changed(trained, release):
    """Told apart by module, not by name: everything under the language model and the head, and nothing else."""
    folder, before, middle, model, _ = trained
    language = {id(p) for module in (model.model.language_model, model.lm_head) for p in module.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) in language}
    assert 0 < len(names) < len(before)
    for old, new in ((before, middle), (middle, dict(model.named_parameters()))):  # SFT, GRPO
        assert {name for name in old if not torch.equal(old[name], new[name])} == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_what_is_saved_loads_in_plain_transformers_with_the_same_logits(trained, release, files):
    folder, _, _, model, processor = trained
    auto = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    own_class = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    assert type(auto) is own_class is type(model)
    tokenizer, pictures = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert tokenizer.chat_template == processor.tokenizer.chat_template and tokenizer.eos_token == M.IM_END
    for parts in mixture(files):
        encoded = M.encode(processor, model, parts)
        again = M.encode(M.Processor(tokenizer, pictures), auto, parts)
        assert torch.equal(encoded["ids"], again["ids"])
        inputs = M.collate([again], "left", 0, "cpu")
        if release.name == "llava_onevision":  # plain: the official names, clips of one length at a time
            clips, images = inputs.pop("video_grid_thw", None), inputs.pop("image_grid_thw", None)
            inputs = {name: value for name, value in inputs.items() if name not in ("position_ids", "mm_token_type_ids")}
            if clips is not None and len(set(clips[:, 0].tolist())) > 1:
                continue
            if clips is not None:
                inputs["pixel_values_videos"] = inputs["pixel_values_videos"].view(len(clips), -1, 3, 56, 56)
            if images is not None:
                inputs |= {"image_sizes": images[:, 1:], "batch_num_images": torch.tensor([len(images)])}
        ours = logits_of(model, M.collate([encoded], "left", 0, M.device_of(model))).cpu()
        assert (logits_of(auto.eval(), inputs) - ours).abs().max() < 1e-5


def test_the_folder_has_what_a_release_has_and_servers_read(trained, release):
    """vLLM finds the class by config.json, weights by either naming, the chat template and the processors by their files."""
    folder = trained[0]
    names = {file.name for file in release.iterdir()}
    assert names <= {file.name for file in folder.iterdir()}
    for name in names & {"processor_config.json", "video_preprocessor_config.json", "chat_template.json"}:
        assert json.loads((folder / name).read_text()) == json.loads((release / name).read_text())
    before, after = (json.loads((f / "preprocessor_config.json").read_text()) for f in (release, folder))
    keep = {"patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std", "image_grid_pinpoints", "resample"} & set(before)
    assert {k: before[k] for k in keep} == {k: after[k] for k in keep}
    assert after["image_processor_type"].startswith(before["image_processor_type"].removesuffix("Fast"))
    assert json.loads((folder / "generation_config.json").read_text())["repetition_penalty"] == 1.05
    with safetensors.safe_open(folder / "model.safetensors", "pt") as written:
        names = set(written.keys())
    current = {name for name, _ in trained[3].named_parameters()}
    assert names in (current, {released_name(release.name, name) for name in current})


# ------------------------------------------------------------------------------------------------------ precision and memory


@pytest.mark.parametrize("share_prompt", [True, False])
def test_gradient_checkpointing_changes_memory_and_nothing_else(release, samples, share_prompt):
    """With the shared prompt, too, whose keys and values a layer that is run again neither loses nor meets twice."""
    model, processor = M.load(str(release))
    model, layers, saved, gradients = model.cpu(), model.config.text_config.num_hidden_layers, [], []
    prompts = [M.encode(processor, model, data.build_prompt(s, "think"), data.THINK) for s in samples[:2]]
    ids, lengths, weights = torch.arange(20, 100).view(4, 20), torch.tensor([20, 11, 3, 17]), torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    longest = max(len(prompt["ids"]) for prompt in prompts)
    tokens = 2 * longest + 4 * 19 if share_prompt else 4 * (longest + 20)
    for checkpointing in (False, True):
        again, runs, differentiated = copy.deepcopy(model), [], []
        tower = again.model.vision_tower if hasattr(again.model, "vision_tower") else again.model.visual
        tower.register_forward_hook(lambda *made: differentiated.append(made[-1].last_hidden_state.requires_grad))
        for layer in again.model.language_model.layers:
            layer.mlp.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0].shape[:2].numel()))
        sft.optimizer_for(again, config.GRPO(gradient_checkpointing=checkpointing))
        with torch.profiler.profile(profile_memory=True) as profile:
            logprobs = M.completion_logprobs(again, processor, prompts, ids, lengths, share_prompt=share_prompt)
        assert sum(runs) == layers * tokens and again.training is checkpointing
        assert differentiated and not any(differentiated), "the tower does not learn"
        (logprobs * weights).sum().backward()
        assert sum(runs) == layers * tokens * (1 + checkpointing), "run again in backward"
        saved.append(sum(event.self_cpu_memory_usage for event in profile.events()))
        gradients.append([p.grad for p in again.parameters() if p.requires_grad])
        M.generate(again, processor, prompts, 2, 3)
        assert not again.training, "sampling keeps its cache"
    assert 0 < saved[1] < 0.5 * saved[0], "bytes that are left after forward"
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients)) and sum(a.abs().sum() for a in gradients[0]) > 1


def test_a_bf16_model_is_stepped_in_fp32(release, samples):
    """Adam's first step by hand, w - lr g / (|g| + eps), on the fp32 sum of the gradients of two micro-batches, each that of the prompts and
    that of the completions; then the model holds the copies, rounded. With offload the same."""
    model, processor = M.load(str(release), torch.bfloat16)
    model = model.cpu()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    plain = copy.deepcopy(model)
    M.freeze_vision(plain)
    collected = {name: [] for name, p in plain.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            p.grad_dtype = torch.float32
            p.register_hook(lambda gradient, name=name: collected[name].append(gradient))  # of each micro-batch
    own = dict(group_size=2, max_new_tokens=6, micro_prompts=1, beta=0.0, max_grad_norm=1e9)
    prompts = [M.encode(processor, model, data.build_prompt(s, "think"), data.THINK) for s in samples[:2]]
    made = M.Completions(torch.arange(20, 44).view(4, 6), torch.tensor([6, 3, 5, 6]), torch.zeros(4, 6), torch.zeros(4, dtype=torch.bool))
    advantages, still = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), torch.optim.SGD(plain.parameters(), lr=0.0)
    grpo.update(plain, processor, still, prompts, made, advantages, None, config.GRPO(**own))
    for offload in (False, True):
        again = copy.deepcopy(model)
        optimizer = sft.optimizer_for(again, config.GRPO(offload=offload, **own))
        optimizer.param_groups[0]["lr"] = 1e-2
        grpo.update(again, processor, optimizer, prompts, made, advantages, None, config.GRPO(**own))
        copies = dict(zip(collected, optimizer.param_groups[0]["params"]))
        for name, p in again.named_parameters():
            assert p.grad is None and p.dtype == torch.bfloat16
            if name not in collected:
                assert torch.equal(p, before[name])
                continue
            assert len(collected[name]) >= 2
            gradient = sum(collected[name])
            wanted = before[name].float() - 1e-2 * gradient / (gradient.abs() + 1e-8)
            assert copies[name].dtype == torch.float32 and torch.allclose(copies[name], wanted, atol=1e-6)
            assert torch.equal(p, copies[name].to(torch.bfloat16)) and not torch.equal(p, before[name])


def test_steps_of_the_papers_size_add_up_where_bf16_alone_stands_still(release):
    """Twenty steps of 1e-6 on a constant gradient: Adam moves every fp32 copy by 2e-5; bf16 weights mostly stay."""
    moved = {}
    for alone in (True, False):
        model = M.load(str(release), torch.bfloat16)[0].cpu()
        M.freeze_vision(model)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, weight_decay=0.0) if alone else sft.optimizer_for(model, config.GRPO())
        optimizer.param_groups[0]["lr"] = 1e-6
        weights = optimizer.param_groups[0]["params"]
        before = torch.cat([p.detach().flatten().float() for p in weights])
        for _ in range(20):
            optimizer.zero_grad()
            sum(p.float().sum() for p in model.parameters() if p.requires_grad).backward()
            optimizer.step()
        moved[alone] = before - torch.cat([p.detach().flatten().float() for p in weights])
    assert (moved[True] != 0).float().mean() < 0.1
    assert (moved[False] - 2e-5).abs().max() < 1e-6


def test_bf16_sampling_and_scoring_agree_to_bf16(release, mixed):
    model, processor = M.load(str(release), torch.bfloat16)
    made = M.generate(model, processor, mixed, 2, 12, seeds=range(len(mixed)))
    with torch.no_grad():
        one, other = (M.completion_logprobs(model, processor, mixed, made.ids, made.lengths, share_prompt=share) for share in (True, False))
        again = M.completion_logprobs(copy.deepcopy(model), processor, mixed, made.ids, made.lengths)
    assert one.dtype == made.logprobs.dtype == torch.float32 and torch.equal(one, again), "a reference of the same weights is at KL 0"
    for scored in (one, other):
        assert (scored - made.logprobs)[made.mask].abs().mean() < 0.03


# ------------------------------------------------------------------------------------------------------------ user mistakes


def changed(release: Path, folder: Path, **files) -> str:
    """A copy of the release with some files rewritten (by a function of the text) or, with None, left out."""
    folder.mkdir()
    for file in release.iterdir():
        rewrite = files.get(file.stem, lambda text: text)
        if file.suffix == ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
        elif rewrite:
            (folder / file.name).write_text(rewrite(file.read_text()))
    return str(folder)


def test_what_cannot_be_loaded_gives_one_line(release, tmp_path):
    kind = json.loads((release / "config.json").read_text())["model_type"]
    no_template = lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "chat_template"})
    lost = changed(release, tmp_path / "lost")
    state = safetensors.torch.load_file(release / "model.safetensors")
    gone = next(name for name in state if "layers.1.mlp" in name and "language_model" in name or name.startswith("model.layers.1.mlp"))
    state.pop(gone)
    safetensors.torch.save_file(state, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    (tmp_path / "empty").mkdir()
    another = lambda text: text.replace(f'"model_type": "{kind}"', '"model_type": "mistral3"')
    for path, said in ((changed(release, tmp_path / "other", config=another), "mistral3"),
                       (lost, "layers.1.mlp"), (str(tmp_path / "empty"), "empty"),
                       (changed(release, tmp_path / "mute", chat_template=None, tokenizer_config=no_template), "template"),
                       (changed(release, tmp_path / "torn", config=lambda text: text[:50]), "torn")):
        with pytest.raises(config.UserError, match=said) as raised:
            M.load(path)
        assert "\n" not in str(raised.value)


def test_freezing_refuses_names_it_does_not_know(backbone):
    model = copy.deepcopy(backbone[0])
    headless = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"language_model": torch.nn.Linear(1, 1)})})  # everything would learn
    for wrong in (model.model, model.model.language_model, headless):
        with pytest.raises(config.UserError, match="vision tower"):
            M.freeze_vision(wrong)
        assert all(p.requires_grad for p in wrong.parameters())
    model.model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(config.UserError, match="vision tower"):
        M.freeze_vision(model)


# --------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-8b", "llava-onevision-7b"])
def test_the_settings_files_keep_the_papers_values(name):
    """What they change is where the chain starts, what fits in memory, and the longer completions of the paper's Qwen."""
    made, plain = config.load_settings(name, []), config.Settings()
    differing = {f"{section}.{key}" for section, values in dataclasses.asdict(made).items() for key, value in values.items()
                 if value != getattr(getattr(plain, section), key)}
    memory = {"micro_tokens", "batch_rows", "micro_prompts", "gradient_checkpointing", "offload"}
    assert {key for key in differing if key.split(".")[1] not in memory} == {"model.path"} | (
        {f"{section}.max_new_tokens" for section in ("rejection", "grpo", "evaluate")} if "qwen" in name else set())
    stages = ("cold_start", "rejection_sft", "direct_sft", "grpo", "grpo_direct")
    assert made.model.path.count("/") == 1 and all(getattr(made, stage).gradient_checkpointing for stage in stages)
